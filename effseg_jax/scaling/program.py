"""Parses a compiled program: its instructions, how often each runs, and its memory traffic.

XLA's own analysis (`Compiled.cost_analysis`) counts the body of a loop once and does not tell fast
on-chip memory from the device's main memory; here loops count as often as they run, and arrays
that live on the chip cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) (?:\([^{]*)?\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.$-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+[0-9]+(?:e[0-9a-z]+)?)\[([0-9,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
  r"\b(calls|body|condition|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.$-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TILES = re.compile(r"\{([0-9,]*):T\(([0-9,]+)\)")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_REFERENCE = re.compile(r"%([\w.$-]+)")

# What only names a value, or is counted where it begins.
_FREE = (
  *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all"),
  *("while", "conditional", "call", "opt-barrier", "domain", "add-dependency"),
  *("partition-id", "replica-id"),
)


@dataclasses.dataclass(frozen=True)
class ArrayType:
  """One array of an instruction's result.

  Attributes:
    dtype: XLA's name, for example `f32`.
    shape: of the array on one device.
    memory_space: 0: the device's main memory; others are on the chip, or of the host.
    stored_shape: with the padding of a TPU's tiles, 8 x 128 mostly.
  """

  dtype: str
  shape: tuple[int, ...]
  memory_space: int
  stored_shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """Bytes without padding."""
    return math.prod(self.shape) * _bits(self.dtype) // 8

  @property
  def stored_bytes(self) -> int:
    """Bytes including padding, as they are moved."""
    return math.prod(self.stored_shape) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program.

  Attributes:
    name: unique within the program.
    opcode: XLA's name of the operation, for example `all-reduce`.
    result: the arrays it makes.
    operands: names of the instructions it reads.
    attributes: the rest of the line.
    is_root: whether it is its computation's result.
  """

  name: str
  opcode: str
  result: tuple[ArrayType, ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  def called(self, *kinds: str) -> list[str]:
    """Computations that this one runs: those of the attributes named."""
    found = []
    for kind, names in _CALLED.findall(self.attributes):
      if kind in kinds:
        found += [name.strip(" %") for name in names.strip("{}").split(",")]
    return found

  @property
  def source(self) -> str:
    """Where the operation comes from in our code: the path of modules and functions."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match.group(1) if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a compiled program.

  Attributes:
    computations: instructions by computation, in the text's order.
    entry: name of the computation that is run.
  """

  computations: Mapping[str, Sequence[Instruction]]
  entry: str

  @functools.cached_property
  def executions(self) -> Mapping[str, int]:
    """How often each computation runs; those of loops of unknown length as if it were one turn."""
    times = dict.fromkeys(self.computations, 0)
    self._run(self.entry, 1, times)
    return times

  def _run(self, name: str, count: int, times: dict[str, int]) -> None:
    times[name] += count
    for instruction in self.computations[name]:
      turns = self._turns(instruction) if instruction.opcode == "while" else 1
      for called in instruction.called("calls", "body", "condition", "branch_computations"):
        self._run(called, count * turns, times)
      if instruction.opcode == "call":
        for called in instruction.called("to_apply"):
          self._run(called, count, times)

  def _turns(self, loop: Instruction) -> int:
    """A loop's length: as the compiler states it, or the bound that its condition compares with.

    The loops of `jax.lax.scan` count from 0 to a constant.
    """
    known = _TRIPS.search(loop.attributes)
    if known:
      return int(known.group(1))
    bounds = []
    for condition in loop.called("condition"):
      names = [condition]
      while names:
        for instruction in self.computations[names.pop()]:
          names += instruction.called("calls")
          if instruction.opcode == "constant" and instruction.result[0].dtype == "s32":
            value = re.match(r"(-?\d+)\)", instruction.attributes)
            bounds += [int(value.group(1))] if value else []
    return max(bounds) if len(set(bounds)) == 1 and bounds[0] > 0 else 1

  def walk(self) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int]]:
    """Every instruction that runs, those it can refer to, and how often it runs."""
    for name, instructions in self.computations.items():
      if self.executions[name]:
        scope = {instruction.name: instruction for instruction in instructions}
        for instruction in instructions:
          yield instruction, scope, self.executions[name]

  @functools.cached_property
  def _inside_fusions(self) -> frozenset[str]:
    """Computations whose intermediate values are in no memory."""
    return frozenset(
      called
      for instructions in self.computations.values()
      for instruction in instructions
      if instruction.opcode == "fusion"
      for called in instruction.called("calls")
    )

  def main_memory_bytes(self) -> int:
    """Bytes that one device reads from and writes to its main memory in one run.

    An estimate: each operation reads what it needs of its operands and writes its result once,
    with the padding of their layouts.
    """
    total = 0
    for name, instructions in self.computations.items():
      times = self.executions[name]
      if not times or name in self._inside_fusions:
        continue
      scope = {instruction.name: instruction for instruction in instructions}
      total += times * sum(self._traffic(instruction, scope) for instruction in instructions)
    return total

  def _traffic(self, instruction: Instruction, scope: Mapping[str, Instruction]) -> int:
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
      return 0
    if instruction.opcode.endswith("-start"):
      return _moved(instruction, scope)
    body = None
    if instruction.opcode == "fusion":
      (called,) = instruction.called("calls")
      body = self.computations[called]
    updated = _updated_part(instruction, scope, body)
    read = 0
    for index, operand in enumerate(instruction.operands):
      if updated is not None and index == updated[0]:
        continue  # changed in place: all but a part of it stays where it is
      arrays = scope[operand].result if operand in scope else ()
      needed = _needed_part(instruction, index, body)
      whole = _main_memory(arrays)
      read += whole if needed is None else min(whole, needed)
    written = _main_memory(instruction.result)
    return read + (written if updated is None else min(written, updated[1]))


def read_program(text: str) -> Program:
  """Parses `Compiled.as_text()`."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header.group(2), [])
      entry = header.group(2) if header.group(1) else entry
    elif line.startswith("}"):
      current = None
    elif current is not None:
      instruction = _read_instruction(line)
      if instruction is not None:
        current.append(instruction)
  return Program(computations, entry)


def _read_instruction(line: str) -> Instruction | None:
  name = _NAME.match(line)
  if not name:
    return None
  rest = line[name.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opcode = _OPCODE.match(rest, end)
  if not opcode:
    return None
  close = _closing(rest, opcode.end() - 1)
  inside = rest[opcode.end() : close]
  is_value = opcode.group(1) in ("constant", "parameter")  # a literal or a number, no reference
  return Instruction(
    name.group(2),
    opcode.group(1),
    tuple(_read_arrays(rest[:end])),
    () if is_value else tuple(_REFERENCE.findall(inside)),
    rest[opcode.end() :] if is_value else rest[close + 1 :],
    bool(name.group(1)),
  )


def _read_arrays(text: str) -> Iterator[ArrayType]:
  for dtype, sizes, layout in _ARRAY.findall(text):
    space = _MEMORY_SPACE.search(layout)
    shape = tuple(int(size) for size in sizes.split(",") if size)
    memory_space = int(space.group(1)) if space else 0
    yield ArrayType(dtype, shape, memory_space, _stored_shape(shape, layout))


def _stored_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
  """`{1,2,0:T(8,128)}`: axis 1 is stored in whole 128s, and axis 2 in whole 8s."""
  match = _TILES.match(layout)
  if not match or not match.group(1):
    return shape
  axes, tiles = (group.split(",") for group in match.groups())
  stored = list(shape)
  for axis, tile in zip(axes, reversed(tiles), strict=False):
    stored[int(axis)] += -stored[int(axis)] % int(tile)
  return tuple(stored)


def _closing(text: str, opening: int) -> int:
  """Position of the parenthesis that closes the one at `opening`."""
  depth = 0
  for position in range(opening, len(text)):
    depth += {"(": 1, ")": -1}.get(text[position], 0)
    if depth == 0:
      return position
  return len(text) - 1


def _bits(dtype: str) -> int:
  if dtype == "pred":
    return 8
  match = re.match(r"[a-z]+(\d+)", dtype)
  return int(match.group(1)) if match else 0


def _main_memory(arrays: Sequence[ArrayType]) -> int:
  return sum(array.stored_bytes for array in arrays if array.memory_space == 0)


def _moved(start: Instruction, scope: Mapping[str, Instruction]) -> int:
  """Traffic of asynchronous operations; the result refers to the operands again.

  What moves is the smaller side of it: for example, a slice is copied out of a larger array.
  """
  sources = [array for name in start.operands if name in scope for array in scope[name].result]
  made = list(start.result)
  for array in sources:
    if array in made:
      made.remove(array)
  made = [array for array in made if array.stored_bytes > 4]  # semaphores
  part = min(sum(array.stored_bytes for array in arrays) for arrays in (sources, made or sources))
  return min(part, _main_memory(sources)) + min(part, _main_memory(made))


def _needed_part(
  instruction: Instruction, index: int, body: Sequence[Instruction] | None
) -> int | None:
  """Bytes that are read of an operand, where that is not all of it."""
  reading = ("slice", "dynamic-slice", "gather")
  if body is None:
    part = sum(array.stored_bytes for array in instruction.result)
    return part if instruction.opcode in reading and index == 0 else None
  parameter = next(
    (
      inner.name
      for inner in body
      if inner.opcode == "parameter" and inner.attributes.startswith(f"{index})")
    ),
    None,
  )
  users = [inner for inner in body if parameter in inner.operands]
  if not users or any(
    user.opcode not in reading or user.operands[0] != parameter for user in users
  ):
    return None
  return sum(array.stored_bytes for user in users for array in user.result)


def _updated_part(
  instruction: Instruction, scope: Mapping[str, Instruction], body: Sequence[Instruction] | None
) -> tuple[int, int] | None:
  """For an array that is changed in place: which operand it is, and the bytes that change."""
  if body is None:
    if instruction.opcode != "dynamic-update-slice":
      return None
    return 0, sum(array.stored_bytes for array in scope[instruction.operands[1]].result)
  inner = {line.name: line for line in body}
  root = next(line for line in body if line.is_root)
  while root.opcode == "bitcast":
    root = inner[root.operands[0]]
  if root.opcode != "dynamic-update-slice":
    return None
  target = inner[root.operands[0]]
  while target.opcode == "bitcast":
    target = inner[target.operands[0]]
  number = re.match(r"(\d+)\)", target.attributes)
  if target.opcode != "parameter" or not number:
    return None
  return int(number.group(1)), sum(array.stored_bytes for array in inner[root.operands[1]].result)
