"""Memory and cost of a training step on a slice: compiled for it, analysed and printed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

from ml_collections import ConfigDict

_MIB, _GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Account:
  """The numbers of a report. Per device and per step unless stated otherwise.

  Attributes:
    config: the experiment, as on the command line.
    topology: the slice.
    chips: in it.
    hosts: in it.
    devices: of jax; two per chip on some TPUs.
    mesh: sizes of the axes that are longer than 1.
    global_batch: examples of all devices.
    accumulate: parts of a batch, one after the other.
    dtype: of the computation.
    remat: whether activations are computed again.
    parameters: number of them.
    parameter_bytes: of the parameters.
    optimizer_bytes: of the optimizer's state.
    other_state_bytes: statistics and averaged weights.
    peak_bytes: of main memory.
    temporary_bytes: part of them, allocated during a step only.
    hbm_bytes: that there are.
    flops: of matrix products and convolutions.
    moved_bytes: between main memory and cores.
    sent_bytes: to other devices.
    compute_seconds: at the chip's peak.
    memory_seconds: at the chip's peak.
    network_seconds: at the chip's peak, without latency.
    collectives: kind, axes, count, bytes: of all of a kind.
    largest: the largest collective: bytes, kind, source.
    trace_seconds: tracing, wall time.
    compile_seconds: compiling, wall time.
    compile_cpu_seconds: compiling, all threads.
    warnings: possible problems.
    versions: of jax and libtpu.
  """

  config: str
  topology: str
  chips: int
  hosts: int
  devices: int
  mesh: dict[str, int]
  global_batch: int
  accumulate: int
  dtype: str
  remat: bool
  parameters: int
  parameter_bytes: int
  optimizer_bytes: int
  other_state_bytes: int
  peak_bytes: int
  temporary_bytes: int
  hbm_bytes: int
  flops: float
  moved_bytes: int
  sent_bytes: float
  compute_seconds: float
  memory_seconds: float
  network_seconds: float
  collectives: list[list[Any]]
  largest: list[Any]
  trace_seconds: float
  compile_seconds: float
  compile_cpu_seconds: float
  warnings: list[str]
  versions: str

  @property
  def fits(self) -> bool:
    """Whether one device's main memory is enough."""
    return not any(line.startswith("does not fit") for line in self.warnings)

  @property
  def step_seconds(self) -> float:
    """The bound of a step's time."""
    return max(self.compute_seconds, self.memory_seconds, self.network_seconds)

  @property
  def bound(self) -> str:
    """The resource that bounds it."""
    names = ("compute", "memory", "network")
    return max(names, key=lambda name: getattr(self, f"{name}_seconds"))


def account_for(config: ConfigDict, name: str, topology_name: str) -> Account:
  """Compiles a configuration's training step for a slice.

  Args:
    config: the experiment.
    name: of it, for the page.
    topology_name: of the slice, see `topologies.find_topology`.

  Raises:
    UserError: if there is no such slice, or something is wrong in the configuration.
  """
  import jax

  from effseg_jax.input_pipeline.datasets.stand_in import stand_in
  from effseg_jax.scaling import ahead_of_time, collectives, topologies
  from effseg_jax.training import sharding

  topology = topologies.find_topology(topology_name)
  config = config.copy_and_resolve_references()
  mesh = sharding.make_mesh(config.mesh, topology.devices)
  notes = []
  batch_size = ahead_of_time.next_batch_size(config, mesh)
  if batch_size != config.train.batch_size:
    notes.append(
      f"batch not divisible: train.batch_size={config.train.batch_size} cannot be divided over"
      f" {sharding.batch_ways(mesh)} devices; compiled with {batch_size}, the least that can"
    )
    with config.unlocked():
      config.train.batch_size = batch_size
  data = config.data
  dataset = stand_in(data.name, config.task.name, data.options.to_dict())
  step = ahead_of_time.trace_step(config, dataset, mesh)
  compiled = ahead_of_time.compile_step(step)
  bounds = ahead_of_time.roofline(step, compiled, topology)
  exchanged = compiled.exchanged or []
  largest = max(exchanged, key=lambda entry: entry.nbytes, default=None)
  state = step.state
  held = sharding.bytes_per_device
  return Account(
    config=name,
    topology=topology.name,
    chips=topology.num_chips,
    hosts=topology.num_hosts,
    devices=mesh.size,
    mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
    global_batch=batch_size,
    accumulate=config.train.accumulate,
    dtype=str(config.model.get("dtype", "float32")),
    remat=bool(config.model.get("remat", False)),
    parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    parameter_bytes=held(state.params),
    optimizer_bytes=held(state.opt_state),
    other_state_bytes=held((state.model_state, state.average)),
    peak_bytes=compiled.peak_bytes,
    temporary_bytes=compiled.temporary_bytes,
    hbm_bytes=topology.hbm,
    flops=step.products / mesh.size,
    moved_bytes=compiled.moved_bytes or 0,
    sent_bytes=sum(entry.bytes_sent for entry in exchanged),
    compute_seconds=bounds.compute,
    memory_seconds=bounds.memory,
    network_seconds=bounds.network,
    collectives=[
      [total.kind, "+".join(total.axes), total.count, total.nbytes]
      for total in collectives.totals(exchanged)
    ],
    largest=[largest.nbytes, largest.kind, largest.source] if largest else [],
    trace_seconds=step.seconds,
    compile_seconds=compiled.seconds,
    compile_cpu_seconds=compiled.cpu_seconds,
    warnings=notes + ahead_of_time.warnings(step, compiled, topology),
    versions=_versions(),
  )


def page(account: Account) -> str:
  """The report for one configuration on one slice."""
  a = account
  per_device = a.global_batch / a.devices
  parts = f", in {a.accumulate} parts one after the other" if a.accumulate > 1 else ""
  computing = a.dtype + (", activations computed again" if a.remat else "")
  lines = {
    "slice": f"{a.chips} chips in {a.hosts} hosts, {a.devices} devices of"
    f" {a.hbm_bytes / _GIB:.0f} GiB",
    "mesh": ", ".join(f"{axis} {size}" for axis, size in a.mesh.items()) or "one device",
    "batch": f"{a.global_batch} examples, {per_device:g} a device{parts}",
    "computing in": computing,
    "parameters": f"{a.parameters / 1e6:.2f} M; a device holds {_mib(a.parameter_bytes)}, of the"
    f" optimizer {_mib(a.optimizer_bytes)}, of statistics and averages"
    f" {_mib(a.other_state_bytes)}",
    "memory": f"{a.peak_bytes / _GIB:.2f} of {a.hbm_bytes / _GIB:.0f} GiB a device"
    f" ({a.peak_bytes / a.hbm_bytes:.0%}), {a.temporary_bytes / _GIB:.2f} GiB of it temporary",
  }
  if a.fits:
    rate = a.global_batch / a.step_seconds
    lines |= {
      "work": f"{a.flops / 1e9:,.1f} GFLOP in products, {a.moved_bytes / 1e9:.2f} GB moved,"
      f" {a.sent_bytes / 1e6:.2f} MB sent, a device and step",
      "roofline": f"compute {_ms(a.compute_seconds)}, memory {_ms(a.memory_seconds)}, network"
      f" {_ms(a.network_seconds)}: bound by {a.bound}",
      "": f"at least {_ms(a.step_seconds)} a step, at most {rate:,.0f} examples/s",
      "collectives": "; ".join(
        f"{count} {kind} over {axes or 'nothing'}, {nbytes / 1e6:.2f} MB"
        for kind, axes, count, nbytes in a.collectives
      )
      or "none",
    }
    if a.largest:
      nbytes, kind, source = a.largest
      lines["largest"] = f"{kind} of {nbytes / 1e6:.2f} MB, {source}"
  lines |= {
    "compiled in": f"{a.compile_seconds:.0f} s ({a.compile_cpu_seconds:.0f} s of CPU time), after"
    f" {a.trace_seconds:.0f} s of tracing",
    "warnings": a.warnings[0] if a.warnings else "none",
  }
  width = max(map(len, lines))
  text = [f"{a.config} on {a.topology}: computed ahead of time with {a.versions}"]
  text += [f"  {name:<{width}}  {value}" for name, value in lines.items()]
  text += [f"  {'':<{width}}  {warning}" for warning in a.warnings[1:]]
  return "\n".join(text)


def _mib(nbytes: float) -> str:
  return f"{nbytes / _MIB:.1f} MiB"


def _ms(seconds: float) -> str:
  return f"{seconds * 1e3:.3g} ms"


def _versions() -> str:
  return f"jax {importlib.metadata.version('jax')}, libtpu {importlib.metadata.version('libtpu')}"
