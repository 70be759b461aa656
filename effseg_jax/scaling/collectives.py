"""Communication in a compiled program: every collective by kind, mesh axis and bytes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jax.sharding import Mesh

from effseg_jax.scaling.program import ArrayType, Instruction, Program

KINDS = (
  "all-reduce",
  "reduce-scatter",
  "all-gather",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>\[[^)]*\)?)\))?"
  r" \{(?P<over>[^}]*)\}"
)
_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices.

  Attributes:
    kind: one of `KINDS`.
    axes: of the mesh, along which the exchange runs; empty if no devices communicate.
    arrays: what one device reduces, sends or (all-gather) ends up with.
    nbytes: of these arrays.
    times: how often it runs in a step.
    group_size: devices that meet.
    source: where it comes from in our code.
  """

  kind: str
  axes: tuple[str, ...]
  arrays: tuple[ArrayType, ...]
  nbytes: int
  times: int
  group_size: int
  source: str

  @property
  def bytes_sent(self) -> float:
    """Bytes that a device sends in a step, by the best known algorithm on a ring."""
    share = (self.group_size - 1) / self.group_size
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
    return self.nbytes * self.times * factor.get(self.kind, share)


def read_collectives(program: Program, mesh: Mesh) -> list[Collective]:
  """Lists the collectives of a program that was compiled for a mesh.

  Args:
    program: from `program.read_program`.
    mesh: whose devices the program's partitions are, in their order.

  Returns:
    One entry per operation, in the program's order.
  """
  found = []
  for instruction, scope, times in program.walk():
    kind = instruction.opcode.removesuffix("-start")
    # The halves of an asynchronous operation: the second, and one that wraps a computation which
    # is walked, too, say nothing new.
    if kind not in KINDS or (kind != instruction.opcode and instruction.called("calls")):
      continue
    groups = _groups(instruction, mesh.size)
    size = max(map(len, groups))
    arrays = tuple(
      array for name in instruction.operands if name in scope for array in scope[name].result
    )
    if kind == "all-gather":
      arrays = tuple(
        ArrayType(
          array.dtype, (size, *array.shape), array.memory_space, (size, *array.stored_shape)
        )
        for array in arrays
      )
    nbytes = sum(array.nbytes for array in arrays)
    axes = tuple(
      axis
      for position, axis in enumerate(mesh.axis_names)
      if any(len(set(_coordinates(group, mesh)[position])) > 1 for group in groups)
    )
    found.append(Collective(kind, axes, arrays, nbytes, times, size, instruction.source))
  return found


@dataclasses.dataclass(frozen=True)
class Total:
  """All collectives of one kind along the same axes, in one step.

  Attributes:
    kind: one of `KINDS`.
    axes: of the mesh.
    count: how many run.
    nbytes: of their arrays.
    bytes_sent: by a device.
  """

  kind: str
  axes: tuple[str, ...]
  count: int
  nbytes: int
  bytes_sent: float


def totals(collectives: Iterable[Collective]) -> list[Total]:
  """Adds up by kind and axes; the largest first."""
  groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
  for entry in collectives:
    groups.setdefault((entry.kind, entry.axes), []).append(entry)
  found = [
    Total(
      kind,
      axes,
      sum(entry.times for entry in entries),
      sum(entry.nbytes * entry.times for entry in entries),
      sum(entry.bytes_sent for entry in entries),
    )
    for (kind, axes), entries in groups.items()
  ]
  return sorted(found, key=lambda total: -total.nbytes)


def _coordinates(group: Sequence[int], mesh: Mesh) -> tuple[np.ndarray, ...]:
  """Positions in the mesh of a program's partitions, one array per axis."""
  return np.unravel_index(np.asarray(group), mesh.devices.shape)


def _groups(instruction: Instruction, num_partitions: int) -> list[list[int]]:
  """Which partitions meet; for a permutation, each pair of sender and receiver."""
  text = instruction.attributes
  pairs = re.search(r"source_target_pairs=\{([{}\d,]*)\}", text)
  if pairs:
    return _braces(pairs.group(1))
  mesh = _MESH.search(text)
  if mesh:
    return _mesh_groups(mesh)
  iota = re.search(r"replica_groups=" + _IOTA.pattern, text)
  if iota:
    return _iota(iota).tolist()
  listed = re.search(r"replica_groups=\{([{}\d,]*)\}", text)
  groups = _braces(listed.group(1)) if listed else []
  return groups or [list(range(num_partitions))]


def _braces(text: str) -> list[list[int]]:
  """`{0,1},{2,3}` -> [[0, 1], [2, 3]]."""
  return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(match: re.Match[str]) -> np.ndarray:
  """`[4,2]<=[2,4]T(1,0)`: the numbers from 0 reshaped, transposed, and reshaped again."""
  shape, source, order = (
    [int(n) for n in part.split(",")] if part else [] for part in match.groups()
  )
  numbers = np.arange(math.prod(source)).reshape(source)
  return (numbers.transpose(order) if order else numbers).reshape(shape)


def _mesh_groups(match: re.Match[str]) -> list[list[int]]:
  """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`: devices of a mesh that meet along axes.

  An axis may be split: `'a':(2)2` is the part of size 2 after a part of size 2.
  """
  sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(match["axes"])}
  numbers = np.arange(math.prod(sizes.values()))
  if match["ids"]:
    shape, _, order = match["ids"].partition("T")
    source = [int(n) for n in re.findall(r"\d+", shape)]
    numbers = numbers.reshape(source).transpose([int(n) for n in re.findall(r"\d+", order)])
  # Every split axis becomes up to three, and the exchange runs along one of them.
  cuts: dict[str, list[tuple[int, int]]] = {}
  for name, _, before, size in _AXIS.findall(match["over"]):
    cuts.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
  dims: list[int] = []
  along: list[int] = []
  for name, size in sizes.items():
    done = 1
    for before, part in sorted(cuts.get(name, [])):
      dims += [before // done, part]
      along.append(len(dims) - 1)
      done = before * part
    dims.append(size // done)
  numbers = numbers.reshape(dims)
  others = [axis for axis in range(len(dims)) if axis not in along]
  met = functools.reduce(lambda a, b: a * b, (dims[axis] for axis in along), 1)
  return numbers.transpose(others + along).reshape(-1, met).tolist()
