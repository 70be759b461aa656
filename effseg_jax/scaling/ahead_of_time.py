"""Compiles the training step for devices that are not attached, and analyses its cost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core
from jax.sharding import Mesh
from ml_collections import ConfigDict

from effseg_jax import experiment
from effseg_jax.errors import UserError
from effseg_jax.ops.backend import target_platform
from effseg_jax.run import chips
from effseg_jax.scaling import collectives
from effseg_jax.scaling.program import read_program
from effseg_jax.scaling.topologies import Topology
from effseg_jax.training import sharding, trees
from effseg_jax.training.state import TrainState

# A copy on every device of an array that is larger than this deserves a remark.
_LARGE = 64 * 2**20
_MOST_WARNINGS = 10  # of kinds of exchanges
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class TracedStep:
  """The training step of a configuration for a mesh, before it is compiled.

  Attributes:
    mesh: of devices that need not be here.
    state: shapes, dtypes and shardings.
    batch: the same of a global batch.
    products: FLOPs of all matrix products and convolutions of one step, over all devices; what is
      computed again in the backward pass counts again.
    lowered: to be compiled.
    seconds: that tracing took.
  """

  mesh: Mesh
  state: TrainState
  batch: Mapping[str, jax.ShapeDtypeStruct]
  products: int
  lowered: Any
  seconds: float


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """The compiler's analysis of the step.

  Attributes:
    peak_bytes: of main memory that one device needs: state, batch, temporaries and program.
    temporary_bytes: part of them, allocated during a step only.
    moved_bytes: between main memory and cores, per device and step; None if it did not fit.
    exchanged: the collectives; None if it did not fit.
    error: why there is no program, or an empty string.
    seconds: wall time of compilation.
    cpu_seconds: of all threads; more meaningful on a busy machine.
  """

  peak_bytes: int
  temporary_bytes: int
  moved_bytes: int | None
  exchanged: list[collectives.Collective] | None
  error: str
  seconds: float
  cpu_seconds: float


def next_batch_size(config: ConfigDict, mesh: Mesh) -> int:
  """The smallest global batch, not below the configured one, that every device gets its part of."""
  unit = sharding.batch_ways(mesh) * config.train.accumulate
  return -(-config.train.batch_size // unit) * unit


def trace_step(config: ConfigDict, dataset: Any, mesh: Mesh) -> TracedStep:
  """Traces the step that `effseg train` would compile.

  Args:
    config: the experiment.
    dataset: the training data, or its substitute of `input_pipeline.datasets.stand_in`.
    mesh: from `sharding.make_mesh`; its devices are the target.

  Raises:
    UserError: for a batch that cannot be divided over the mesh, and other mistakes in the
      configuration.
  """
  begin = time.monotonic()
  with target_platform(mesh.devices.flat[0].platform):
    parts = experiment.build(config, dataset=dataset, mesh=mesh)
    state, batch = parts.abstract_state, parts.batch_shapes
    traced = parts.step.trace(state, batch)
    products = 2 * _multiply_accumulates(traced.jaxpr.jaxpr)
    lowered = traced.lower()
  return TracedStep(mesh, state, batch, products, lowered, time.monotonic() - begin)


def compile_step(step: TracedStep) -> CompiledStep:
  """Compiles; a step that needs more memory than there is comes back with an `error`.

  Raises:
    UserError: if jax cannot read what another version of libtpu has compiled.
  """
  begin, begin_cpu = time.monotonic(), _cpu_seconds()
  try:
    with _without_cache(step.mesh):
      compiled = step.lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = _needed_memory(str(error))
    if needed is None:
      raise
    seconds, cpu = time.monotonic() - begin, _cpu_seconds() - begin_cpu
    return CompiledStep(needed, needed, None, None, _reason(str(error)), seconds, cpu)
  seconds, cpu = time.monotonic() - begin, _cpu_seconds() - begin_cpu
  program = read_program(_text(compiled))
  return CompiledStep(
    chips.peak_bytes(compiled),
    compiled.memory_analysis().temp_size_in_bytes,
    program.main_memory_bytes(),
    collectives.read_collectives(program, step.mesh),
    "",
    seconds,
    cpu,
  )


def _text(compiled: jax.stages.Compiled) -> str:
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"jax cannot read the compiled program ({str(error).splitlines()[0]}); pip install 'jax[tpu]'"
      " installs the libtpu that matches this jax."
    ) from None


@contextlib.contextmanager
def _without_cache(mesh: Mesh) -> Iterator[None]:
  """Programs for devices that are not here can be written to jax's cache, but not read."""
  setting = "jax_persistent_cache_min_compile_time_secs"
  seconds = getattr(jax.config, setting)
  if mesh.devices.flat[0].platform != jax.default_backend():
    jax.config.update(setting, math.inf)
  try:
    yield
  finally:
    jax.config.update(setting, seconds)


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Lower bounds of a step's time at a chip's published rates, in seconds.

  Attributes:
    compute: products and convolutions at the bfloat16 peak.
    memory: traffic with main memory.
    network: collectives, without their latency.
  """

  compute: float
  memory: float
  network: float

  @property
  def step(self) -> float:
    """If all three overlap completely."""
    return max(self.compute, self.memory, self.network)

  @property
  def bound(self) -> str:
    """Which one it is."""
    return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(step: TracedStep, compiled: CompiledStep, topology: Topology) -> Roofline:
  """The bounds for a compiled step."""
  sent = sum(entry.bytes_sent for entry in compiled.exchanged or ())
  return Roofline(
    step.products / step.mesh.size / topology.peak_flops,
    (compiled.moved_bytes or 0) / topology.hbm_rate,
    sent / topology.link_rate,
  )


def warnings(step: TracedStep, compiled: CompiledStep, topology: Topology) -> list[str]:
  """Possible problems to check before renting chips; a line each."""
  found = []
  if compiled.error:
    found.append(f"does not fit: {compiled.error}")
  elif compiled.peak_bytes > topology.hbm:
    found.append(
      f"does not fit: {compiled.peak_bytes / 2**30:.2f} GiB of {topology.hbm / 2**30:.0f} GiB"
    )
  mesh = step.mesh
  for name, leaf in zip(trees.leaf_names(step.state), jax.tree.leaves(step.state), strict=True):
    nbytes = leaf.size * leaf.dtype.itemsize
    if nbytes > _LARGE and mesh.size > 1 and leaf.sharding.is_fully_replicated:
      found.append(f"replicated: every device holds all {nbytes / 2**20:.0f} MiB of {name}")
  largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.state.params))
  cut = mesh.shape["fsdp"] * mesh.shape["model"] > 1
  unexpected: Counter[str] = Counter()
  for entry in compiled.exchanged or ():
    if entry.kind in ("all-reduce", "reduce-scatter") or not entry.axes:
      continue
    if cut and "data" not in entry.axes and entry.nbytes <= largest:
      continue  # parameters are gathered where they are used
    unexpected[
      f"{entry.kind} of {entry.nbytes / 2**20:.2f} MiB over {'+'.join(entry.axes)}: {entry.source}"
    ] += 1
  for text, times in unexpected.most_common(_MOST_WARNINGS):
    found.append(f"unexpected {text}" + (f" ({times} times)" if times > 1 else ""))
  if len(unexpected) > _MOST_WARNINGS:
    found.append(f"unexpected: {len(unexpected) - _MOST_WARNINGS} more kinds of exchanges")
  return found


def _multiply_accumulates(jaxpr: core.Jaxpr) -> int:
  """Of convolutions and matrix products; loops of unknown length count as one turn."""
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (axes, _), _ = params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in axes)
    elif name == "conv_general_dilated":
      kernel = equation.invars[1].aval
      taps = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
      total += equation.outvars[0].aval.size * taps // math.prod(params["lhs_dilation"])
    inner = [_multiply_accumulates(body) for body in core.jaxprs_in_params(params)]
    if name == "cond":
      total += max(inner)
    else:
      total += sum(inner) * (params["length"] if name == "scan" else 1)
  return total


def _cpu_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def _needed_memory(message: str) -> int | None:
  """Bytes that a program would need, from the TPU compiler's words; None for another error."""
  match = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
  return int(float(match.group(1)) * _UNITS[match.group(2)]) if match else None


def _reason(message: str) -> str:
  match = re.search(r"Used [\d.]+[KMGT]? of [\d.]+[KMGT]? hbm[^.]*\.[^.]*\.", message)
  return match.group(0) if match else message.splitlines()[0]
