"""Reads tensors by name from other people's files, without PyTorch and without running their code.

A pickle is a program. Here it can only put tensors into dictionaries: every name it asks
for is answered from one short table of our own inert stand-ins, and any other name ends the
reading with an error that says which one it was. The layout of the two `torch.save` formats is the
one of PyTorch's `torch/serialization.py` (zip archives since 1.6, the stream before).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from effseg_jax.errors import UserError
from effseg_jax.file_kinds import mistaken_for

# What such files are called; which kind one is, its content says.
SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors", ".npz", ".bin", ".tar", ".ckpt")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_WRAPPERS = ("state_dict", "model")
_LARGEST_EXPANSION = 1 << 24  # elements; with strides of 0 a small file could fill the memory


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a checkpoint by their official names.

  `{"state_dict": ...}` and `{"model": ...}` are unwrapped, a `module.` before every name is
  dropped, and everything else (epoch, settings, optimizer) is omitted.

  Args:
    path: either format of `torch.save` (`.pth`, `.pt`, `pytorch_model.bin`, `.pth.tar`, `.ckpt`), a
      pickled dictionary of arrays or tensors (`.pkl`, as detectron2 writes), `.safetensors` or
      `.npz`. The content counts, not the name.

  Returns:
    Name -> array in the file's order and dtype; bfloat16 comes as float32.

  Raises:
    UserError: if the file is missing, empty, damaged, of another kind, without tensors, or if its
      pickle refers to anything but tensors.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path} is missing; expected a file of weights ({', '.join(SUFFIXES)}).")
  if path.stat().st_size == 0:
    raise UserError(f"{path} is empty; download or copy it again.")
  read = _reader_of(path)
  try:
    with path.open("rb") as file:
      content = read(file)
    return tensors_by_name(content)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except Exception as error:  # a damaged file can make these parsers raise nearly anything
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise UserError(
      f"{path} is damaged, cut short or no {path.suffix} file ({reason}); get it again."
    ) from None


def _reader_of(path: Path) -> Callable[[BinaryIO], Any]:
  """Which kind of file it is, by its content; a file without its end is told by its name.

  Raises:
    UserError: if it is of no known kind, a web page or a git-lfs pointer.
  """
  with path.open("rb") as file:
    head = file.read(256)
  if (wrong := mistaken_for(head)) is not None:
    raise UserError(f"{path} {wrong}.")
  if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      arrays = all(name.endswith(".npy") for name in archive.namelist())
    return _read_npz if arrays else _read_pickled
  if is_safetensors(head):
    return _read_safetensors
  by_name = {".safetensors": _read_safetensors, ".npz": _read_npz}
  if head.startswith((b"PK\x03\x04", b"\x80")) and path.suffix not in by_name:
    return _read_pickled
  if path.suffix not in SUFFIXES:
    raise UserError(
      f"{path} is of no known kind; expected one of {', '.join(SUFFIXES)}: a file of torch.save, a"
      " pickle of arrays, safetensors or numpy arrays."
    )
  return by_name.get(path.suffix, _read_pickled)


def is_safetensors(head: bytes) -> bool:
  """Whether a file that begins so is in the safetensors format."""
  return len(head) > 8 and head[8:9] == b"{" and 1 < int.from_bytes(head[:8], "little") < 1 << 27


def tensors_by_name(content: Any) -> dict[str, np.ndarray]:
  """Finds the state dict in a checkpoint's content; see `read_state_dict`.

  Raises:
    UserError: if there is no tensor in it.
  """
  for _ in range(3):  # few wrappers, for a pickle can hold a dictionary that holds itself
    wrapped = content if isinstance(content, Mapping) else {}
    content = next((wrapped[k] for k in _WRAPPERS if isinstance(wrapped.get(k), Mapping)), content)
  if not isinstance(content, Mapping):
    raise UserError(f"holds a {type(content).__name__}; expected a dictionary of named tensors.")
  tensors = {
    name: value
    for name, value in ((name, _finished(value)) for name, value in content.items())
    if isinstance(name, str) and hasattr(value, "shape") and hasattr(value, "dtype")
  }
  if not tensors:
    keys = ", ".join(map(repr, list(content)[:8])) or "nothing"
    raise UserError(f"holds no named tensors; found {keys}.")
  if all(name.startswith("module.") for name in tensors):  # saved from DataParallel
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
  return tensors


# --- The other containers ------------------------------------------------------------------------

_SAFETENSORS_DTYPES = {
  "F64": "f8",
  "F32": "f4",
  "F16": "f2",
  "BF16": "bf16",
  "I64": "i8",
  "I32": "i4",
  "I16": "i2",
  "I8": "i1",
  "U64": "u8",
  "U32": "u4",
  "U16": "u2",
  "U8": "u1",
  "BOOL": "?",
}


def _read_safetensors(file: BinaryIO) -> dict[str, np.ndarray]:
  # Not `safetensors.numpy`, which does not know bfloat16 in the older versions that we allow.
  tensors = {}
  for name, entry in safetensors.deserialize(file.read()):
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
      raise UserError(f"{name} is of the unsupported type {entry['dtype']}.")
    array = _from_bytes(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]], "<")
    tensors[name] = array.reshape(entry["shape"])
  return tensors


def _read_npz(file: BinaryIO) -> dict[str, np.ndarray]:
  with np.load(file, allow_pickle=False) as archive:
    return {name: archive[name] for name in archive.files}


def _read_pickled(file: BinaryIO) -> Any:
  """A zip archive of `torch.save`, its older stream, or a plain pickle, by content."""
  if zipfile.is_zipfile(file):
    return _read_archive(file)
  file.seek(0)
  if file.read(4) == b"PK\x03\x04":  # begins as an archive, but its directory (at the end) is gone
    raise EOFError("the archive has no end")
  file.seek(0)
  return _read_stream(file)


def _read_archive(file: BinaryIO) -> Any:
  with zipfile.ZipFile(file) as archive:
    names = archive.namelist()
    program = next((name for name in names if name.endswith("/data.pkl")), None)
    if program is None:
      raise UserError("is a zip archive without data.pkl; expected one written by torch.save.")
    folder = program.removesuffix("data.pkl")
    order = "<"
    if f"{folder}byteorder" in names:
      order = ">" if archive.read(f"{folder}byteorder").strip() == b"big" else "<"
    storages: dict[str, np.ndarray] = {}

    def load_storage(reference: tuple) -> np.ndarray:
      dtype, key, size = reference[1].code, str(reference[2]), reference[4]
      if key not in storages:
        entry = archive.getinfo(f"{folder}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:  # torch.save never does; a small file could
          raise UserError("has compressed tensors; expected a file written by torch.save.")
        storages[key] = np.frombuffer(archive.read(entry), np.uint8)
      return _from_bytes(storages[key], dtype, order, size)

    return _Unpickler(io.BytesIO(archive.read(program)), load_storage).load()


def _read_stream(file: BinaryIO) -> Any:
  """The stream of `torch.save` before 1.6: header, pickle, keys, then the storages' bytes."""
  start = file.tell()
  if _Unpickler(file).load() != _LEGACY_MAGIC:
    file.seek(start)
    return _Unpickler(file).load()  # a plain pickle
  _Unpickler(file).load()  # the version of the protocol
  system = _Unpickler(file).load()
  order = "<" if system.get("little_endian", True) else ">"
  storages: dict[str, _PendingStorage] = {}

  def load_storage(reference: tuple) -> _PendingStorage:
    code, key, size, view = reference[1].code, str(reference[2]), reference[4], None
    if len(reference) > 5 and reference[5] is not None:
      view = reference[5]
    root = storages.setdefault(key, _PendingStorage(code, size))
    return root if view is None else _PendingStorage(code, view[2], root, view[1])

  content = _Unpickler(file, load_storage).load()
  for key in _Unpickler(file).load():
    (size,) = struct.unpack(f"{order}q", file.read(8))
    storage = storages[str(key)]
    if size != storage.size:
      raise ValueError(f"storage {key} has {size} elements, not {storage.size}")
    storage.array = _from_bytes(
      file.read(size * _itemsize(storage.code)), storage.code, order, size
    )
  return content


def _itemsize(code: str) -> int:
  return 2 if code == "bf16" else np.dtype(code).itemsize


def _from_bytes(data: Any, code: str, order: str, size: int | None = None) -> np.ndarray:
  """Bytes -> a flat array in the machine's own byte order; bfloat16 -> float32."""
  stored = np.dtype("u2" if code == "bf16" else code).newbyteorder(order)
  if size is not None and len(data) != size * stored.itemsize:
    raise ValueError(f"a storage has {len(data)} bytes, not {size * stored.itemsize}")
  array = np.frombuffer(data, stored)
  array = array.astype(stored.newbyteorder("="), copy=False)
  if code == "bf16":  # the upper half of a float32
    array = (array.astype(np.uint32) << 16).view(np.float32)
  return array


# --- The restricted pickle -----------------------------------------------------------------------


class _PendingStorage:
  """A storage of the old stream, whose bytes come after the pickle that mentions it."""

  __slots__ = ("array", "begin", "code", "root", "size")

  def __init__(self, code: str, size: int, root: _PendingStorage | None = None, begin: int = 0):
    self.code, self.size, self.root, self.begin = code, size, root, begin
    self.array: np.ndarray | None = None

  def __setstate__(self, state: Any) -> None:
    raise UserError("its pickle changes the state of a storage; this is never done by torch.save.")

  def flat(self) -> np.ndarray:
    """The elements, once they were read."""
    if self.root is not None:
      return self.root.flat()[self.begin : self.begin + self.size]
    if self.array is None:
      raise EOFError("a storage is missing")
    return self.array


class _Tensor:
  """A window of a storage, not yet taken: the storage's bytes may still have to come."""

  __slots__ = ("offset", "shape", "storage", "strides")

  def __init__(self, storage: Any, offset: int, shape: Any, strides: Any):
    self.storage, self.offset = storage, offset
    self.shape, self.strides = tuple(shape), tuple(strides)

  def __setstate__(self, state: Any) -> None:
    """Attributes of a tensor subclass: not needed."""

  def array(self) -> np.ndarray:
    """The elements, (shape), contiguous.

    Raises:
      ValueError: if the window leaves its storage.
    """
    flat = self.storage.flat() if isinstance(self.storage, _PendingStorage) else self.storage
    numbers = (self.offset, *self.shape, *self.strides)
    if len(self.shape) != len(self.strides) or not all(
      isinstance(number, int) and number >= 0 for number in numbers
    ):
      raise ValueError(f"a tensor of shape {self.shape} has strides {self.strides}")
    if 0 in self.shape:
      return np.zeros(self.shape, flat.dtype)
    last = self.offset + sum(
      (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
    )
    if math.prod(self.shape) > max(flat.size, _LARGEST_EXPANSION):
      raise ValueError(f"a tensor of shape {self.shape} repeats a storage of {flat.size}")
    if last >= flat.size:
      raise ValueError(f"a tensor of shape {self.shape} ends beyond its storage of {flat.size}")
    window = np.lib.stride_tricks.as_strided(
      flat[self.offset :], self.shape, [stride * flat.itemsize for stride in self.strides]
    )
    return window.copy()


class _Dtype:
  """Stands for `numpy.dtype`: a plain type of numbers or characters, and never of objects."""

  __slots__ = ("order", "spec")

  def __init__(self, spec: Any):
    self.spec = spec.decode("latin1") if isinstance(spec, bytes) else spec
    self.order = "="
    if np.dtype(self.spec).kind not in "biufcSU":
      raise UserError(f"holds an array of the type {self.spec!r}; expected numbers.")

  def __setstate__(self, state: tuple) -> None:
    order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
    if order in ("<", ">"):
      self.order = order

  def numpy(self) -> np.dtype:
    """The real one."""
    return np.dtype(self.spec).newbyteorder(self.order)


class _Array:
  """Stands for `numpy.ndarray` while it is rebuilt from shape, type and bytes."""

  __slots__ = ("value",)

  def __init__(self) -> None:
    self.value: np.ndarray | None = None

  def __setstate__(self, state: tuple) -> None:
    _, shape, dtype, fortran, data = state
    self.value = _decode_array(data, dtype, shape, "F" if fortran else "C")


def _decode_array(data: Any, dtype: _Dtype, shape: Any, order: str = "C") -> np.ndarray:
  if isinstance(data, str):  # bytes, as Python 2 wrote them
    data = data.encode("latin1")
  kind = dtype.numpy()
  if len(data) != math.prod(shape) * kind.itemsize:
    raise ValueError(f"an array of shape {tuple(shape)} has {len(data)} bytes")
  array = np.frombuffer(data, kind).reshape(shape, order=order)
  return np.ascontiguousarray(array.astype(kind.newbyteorder("="))).reshape(shape)


class _Settings:
  """Stands for objects without tensors (`argparse.Namespace`): takes any state and drops it."""

  __slots__ = ()

  def __new__(cls, *args: Any, **kwargs: Any) -> _Settings:
    del args, kwargs
    return super().__new__(cls)

  def __setstate__(self, state: Any) -> None:
    """Nothing of it is kept."""


class _Call:
  """The value of a permitted name: callable, and immune to a pickle's changes of state."""

  __slots__ = ("_function",)

  def __init__(self, function: Callable[..., Any]):
    self._function = function

  def __call__(self, *args: Any) -> Any:
    return self._function(*args)

  def __setstate__(self, state: Any) -> None:
    raise UserError("its pickle changes a function; this is never done by torch.save.")


class _StorageType:
  """Stands for `torch.FloatStorage` and its like."""

  __slots__ = ("code",)

  def __init__(self, code: str):
    self.code = code

  def __setstate__(self, state: Any) -> None:
    raise UserError("its pickle changes a type; this is never done by torch.save.")


def _encode(text: str, encoding: str = "utf-8") -> bytes:
  """How protocol 2 writes bytes: as text in latin1."""
  if encoding != "latin1":
    raise UserError(f"its pickle encodes text as {encoding!r}; expected bytes as latin1.")
  return text.encode("latin1")


def _load_from_bytes(data: bytes) -> Any:
  """A storage that was pickled outside `torch.save`: a stream within the pickle."""
  storage = _read_stream(io.BytesIO(data))
  if not isinstance(storage, _PendingStorage):
    raise UserError("its pickle holds a storage that is none.")
  return storage.flat()


_STORAGES = {
  "DoubleStorage": "f8",
  "FloatStorage": "f4",
  "HalfStorage": "f2",
  "BFloat16Storage": "bf16",
  "LongStorage": "i8",
  "IntStorage": "i4",
  "ShortStorage": "i2",
  "CharStorage": "i1",
  "ByteStorage": "u1",
  "BoolStorage": "?",
}

_NUMPY_CORE = ("numpy.core", "numpy._core")

# Everything that a pickle may ask for. None of these runs anything that the file could choose.
_PERMITTED: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): OrderedDict,
  ("collections", "Counter"): _Call(dict),  # of a learning-rate schedule
  ("argparse", "Namespace"): _Settings,
  ("_codecs", "encode"): _Call(_encode),
  ("__builtin__", "set"): _Call(list),
  ("builtins", "set"): _Call(list),
  ("torch", "Size"): _Call(tuple),
  ("torch", "device"): _Call(lambda *parts: "cpu"),
  ("torch._utils", "_rebuild_tensor"): _Call(_Tensor),
  ("torch._utils", "_rebuild_tensor_v2"): _Call(
    lambda storage, offset, shape, strides, *rest: _Tensor(storage, offset, shape, strides)
  ),
  ("torch._utils", "_rebuild_parameter"): _Call(lambda tensor, *rest: tensor),
  ("torch.storage", "_load_from_bytes"): _Call(_load_from_bytes),
  ("numpy", "ndarray"): _Call(lambda *args: _Array()),
  ("numpy", "dtype"): _Call(lambda spec, *rest: _Dtype(spec)),
  **{("torch", name): _StorageType(code) for name, code in _STORAGES.items()},
  **{(f"{core}.multiarray", "_reconstruct"): _Call(lambda *args: _Array()) for core in _NUMPY_CORE},
  **{
    (f"{core}.multiarray", "scalar"): _Call(
      lambda dtype, data=b"": _decode_array(data, dtype, ())[()]
    )
    for core in _NUMPY_CORE
  },
  **{  # how protocol 5 writes an array
    (f"{core}.numeric", "_frombuffer"): _Call(_decode_array) for core in _NUMPY_CORE
  },
}


class _Unpickler(pickle.Unpickler):
  """Resolves the names of `_PERMITTED` only."""

  def __init__(self, file: BinaryIO, load_storage: Callable[[tuple], Any] | None = None):
    super().__init__(file, encoding="latin1")  # detectron2's own files come from Python 2
    self._load_storage = load_storage

  def find_class(self, module: str, name: str) -> Any:
    """The stand-in of a name.

    Raises:
      UserError: if the name is not permitted.
    """
    if (module, name) not in _PERMITTED:
      raise UserError(
        f"its pickle refers to {module}.{name}, which weights do not need; nothing was executed. If"
        " you trust the file, save its state dict alone, as .safetensors for example."
      )
    return _PERMITTED[module, name]

  def persistent_load(self, reference: Any) -> Any:
    """The storage that a tensor is a window of."""
    if (
      self._load_storage is None
      or not isinstance(reference, tuple)
      or len(reference) < 5
      or reference[0] != "storage"
      or not isinstance(reference[1], _StorageType)
    ):
      raise UserError("its pickle refers to something that is no tensor's storage.")
    return self._load_storage(reference)


def _finished(value: Any) -> Any:
  """Stand-ins -> arrays; anything else stays."""
  if isinstance(value, _Tensor):
    return value.array()
  return value.value if isinstance(value, _Array) else value
