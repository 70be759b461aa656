"""TPU slices that are not here: their chips, and devices to compile for."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from effseg_jax.errors import UserError, suggestion
from effseg_jax.run import chips

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published properties of a TPU chip.

  Attributes:
    devices: that jax lists per chip.
    hbm: bytes of its main memory.
    hbm_rate: bytes per second between memory and cores.
    link_rate: bytes per second that it can send to adjacent chips, over all links.
    source: of the numbers.
  """

  devices: int
  hbm: int
  hbm_rate: float
  link_rate: float
  source: str


# Interconnects are published as the sum of both directions; a chip sends half of that.
CHIPS = {
  "v4": Chip(1, 32 * _GIB, 1200e9, 300e9, "cloud.google.com/tpu/docs/v4, arXiv 2304.01433"),
  "v5e": Chip(1, 16 * _GIB, 819e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
  "v5p": Chip(1, 95 * _GIB, 2765e9, 600e9, "cloud.google.com/tpu/docs/v5p"),
  "v6e": Chip(1, 32 * _GIB, 1638e9, 400e9, "cloud.google.com/tpu/docs/v6e"),
  "TPU7x": Chip(2, 192 * _GIB, 7380e9, 600e9, "cloud.google.com/tpu/docs/tpu7x"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of a TPU pod, or several.

  Attributes:
    name: kind of chip and their arrangement, for example `v5e:4x4`.
    chip: its kind.
    devices: to make a mesh of; programs are compiled for them, and cannot run.
  """

  name: str
  chip: Chip
  devices: tuple[Any, ...]

  @property
  def num_chips(self) -> int:
    """Chips in the slice."""
    return len(self.devices) // self.chip.devices

  @property
  def num_hosts(self) -> int:
    """Machines that the chips are in: as many processes train."""
    where = {(getattr(device, "slice_index", 0), device.process_index) for device in self.devices}
    return len(where)

  @property
  def hbm(self) -> int:
    """Bytes of main memory per device."""
    return self.chip.hbm // self.chip.devices

  @property
  def peak_flops(self) -> float:
    """bfloat16 FLOP/s per device."""
    return chips.peak_flops(self.devices[0])

  @property
  def hbm_rate(self) -> float:
    """Bytes per second per device."""
    return self.chip.hbm_rate / self.chip.devices

  @property
  def link_rate(self) -> float:
    """Bytes per second that a device can send."""
    return self.chip.link_rate / self.chip.devices


def find_topology(name: str) -> Topology:
  """Describes a slice by its name; no TPU is needed.

  Args:
    name: `v5e:4x4`, `v4:2x2x2`, `v5p:4x4x4`, `v6e:16x16`, `TPU7x:2x2x1`: kind of chip, and how many
      along each direction; `v5e:16x16*2`: two such slices.

  Raises:
    UserError: if libtpu is not installed, or there is no such slice.
  """
  match = re.fullmatch(r"([A-Za-z0-9]+):(\d+(?:x\d+)+)(?:\*([1-9]\d*))?", name)
  kinds = {kind.lower(): kind for kind in CHIPS}
  kind = kinds.get(match.group(1).lower()) if match else None
  if kind is None:
    found = name.partition(":")[0]
    raise UserError(
      f"--topology={name}: expected a chip ({', '.join(CHIPS)}) and how many along each direction,"
      f" v5e:4x4 for example.{suggestion(found, CHIPS)}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("compiling for TPUs needs libtpu, on any machine: pip install 'jax[tpu]'.")
  shape = match.group(2)
  options: dict[str, Any] = {"num_slices": int(match.group(3))} if match.group(3) else {}
  if kind == "v4":  # both cores of a chip are one device, as on the real machine
    options["chip_config_name"] = "megacore"
  if set(shape.split("x")) == {"1"}:  # hosts with a single chip
    options["chips_per_host_bounds"] = (1, 1, 1)
  _keep_libtpu_quiet()
  from jax.experimental import topologies

  try:
    description = topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **options)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"--topology={name}: {kind} has no such slice ({reason}).") from None
  full_name = f"{kind}:{shape}" + (f"*{match.group(3)}" if match.group(3) else "")
  return Topology(full_name, CHIPS[kind], tuple(description.devices))


def _keep_libtpu_quiet() -> None:
  """Lets libtpu describe chips without looking for them, and several processes do so at a time."""
  settings = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  }
  for name, value in settings.items():
    os.environ.setdefault(name, value)
