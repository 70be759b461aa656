"""Writes files as `torch.save` does, opcode by opcode, without PyTorch; evil ones too."""

from __future__ import annotations

import dataclasses
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_STORAGES = {
  "float32": "FloatStorage",
  "float64": "DoubleStorage",
  "float16": "HalfStorage",
  "uint16": "BFloat16Storage",  # numpy has no bfloat16: its bits, then
  "int64": "LongStorage",
  "bool": "BoolStorage",
}


@dataclasses.dataclass
class Window:
  """A tensor: a window of a storage."""

  storage: np.ndarray
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  parameter: bool = False


@dataclasses.dataclass
class Call:
  """What any pickle can hold: a name, and arguments to call it with."""

  module: str
  name: str
  args: tuple = ()


def whole(array: np.ndarray) -> Window:
  """A tensor that is its own storage."""
  array = np.asarray(array)
  strides = tuple(step // array.itemsize for step in np.zeros(array.shape, array.dtype).strides)
  return Window(array.reshape(-1), 0, array.shape, strides)


class Program:
  """A pickle (protocol 2) under construction, and the storages it refers to."""

  def __init__(self, legacy: bool = False):
    self.legacy = legacy
    self.storages: list[np.ndarray] = []

  def dumps(self, value: Any) -> bytes:
    """The whole pickle of a value."""
    return b"\x80\x02" + self.encode(value) + b"."

  def encode(self, value: Any) -> bytes:
    """The opcodes that leave a value on the stack."""
    if value is None:
      return b"N"
    if isinstance(value, bool):
      return b"\x88" if value else b"\x89"
    if isinstance(value, int):
      size = value.bit_length() // 8 + 1
      return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, str):
      text = value.encode()
      return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, tuple):
      return b"(" + b"".join(map(self.encode, value)) + b"t"
    if isinstance(value, dict):
      items = b"".join(self.encode(k) + self.encode(v) for k, v in value.items())
      return b"}(" + items + b"u"
    if isinstance(value, list):
      return b"](" + b"".join(map(self.encode, value)) + b"e"
    if isinstance(value, Call):
      name = f"c{value.module}\n{value.name}\n".encode()
      return name + self.encode(value.args) + b"R"
    if isinstance(value, np.ndarray):
      value = whole(value)
    return self._tensor(value)

  def _tensor(self, window: Window) -> bytes:
    keys = [id(storage) for storage in self.storages]
    if id(window.storage) not in keys:
      self.storages.append(window.storage)
      keys.append(id(window.storage))
    kind = f"ctorch\n{_STORAGES[window.storage.dtype.name]}\n".encode()
    reference = (
      b"(" + self.encode("storage") + kind + self.encode(str(keys.index(id(window.storage))))
    )
    reference += self.encode("cpu") + self.encode(window.storage.size)
    reference += (b"N" if self.legacy else b"") + b"tQ"
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    arguments = b"(" + reference + self.encode(window.offset) + self.encode(tuple(window.shape))
    arguments += self.encode(tuple(window.strides)) + b"\x89}t"
    tensor = name + arguments + b"R"
    if window.parameter:
      tensor = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x88}tR"
    return tensor


def save(path: Path, value: Any) -> Path:
  """Writes the zip format."""
  program = Program()
  content = program.dumps(value)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", content)
    archive.writestr("archive/byteorder", "little")
    for key, storage in enumerate(program.storages):
      archive.writestr(f"archive/data/{key}", storage.tobytes())
    archive.writestr("archive/version", "3\n")
  return path


def save_legacy(path: Path, value: Any) -> Path:
  """Writes the format of before PyTorch 1.6."""
  program = Program(legacy=True)
  content = program.dumps(value)
  header = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
  parts = [Program().dumps(part) for part in header]
  parts += [content, Program().dumps([str(key) for key in range(len(program.storages))])]
  for storage in program.storages:
    parts += [struct.pack("<q", storage.size), storage.tobytes()]
  path.write_bytes(b"".join(parts))
  return path
