"""The required content of a file with official names: one row per tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of an official state dict.

  Attributes:
    name: the official name.
    path: ours, `collection/module/.../leaf`; empty for what we do not keep (counters of batches,
      tables of indices).
    layout: a key of `LAYOUTS`.
    canonical: where modules share the tensor and PyTorch lists it once for each of them: the name
      under which it appears first. Empty for a name that is the first or only one.
    dead: the official model never uses it.
    constant: what an export holds for a row without a path; a file's own value is ignored.
    meaning: what its sizes stand for, where an error should say so.
  """

  name: str
  path: str
  layout: str = "same"
  canonical: str = ""
  dead: bool = False
  constant: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((), np.int64), compare=False
  )
  meaning: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a model that can be loaded alone.

  Attributes:
    names: regular expression that the part's official names match from their start.
    paths: the same of our paths, `collection/module/.../leaf`.
    beginnings: of the names in a file that holds that part alone, and may leave out its prefix.
  """

  names: str
  paths: str
  beginnings: tuple[str, ...] = ()


# Layout -> axes of the official array in our order, and back. Depthwise kernels (C, 1, k, k) are
# OIHW with I = 1, so one rule serves all convolutions.
LAYOUTS: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]] = {
  "same": (None, None),
  "conv": ((2, 3, 1, 0), (3, 2, 0, 1)),  # OIHW <-> HWIO
  "transposed_conv": ((2, 3, 0, 1), (2, 3, 0, 1)),  # IOHW <-> HWIO
  "linear": ((1, 0), (1, 0)),  # (out, in) <-> (in, out)
  "packed": ((2, 0, 1), (1, 2, 0)),  # (3 out, in) <-> (in, 3, out)
  "packed_bias": (None, None),  # (3 out) <-> (3, out)
}

# The first axis of these holds queries, keys and values one after the other.
_PACKED = ("packed", "packed_bias")


def to_ours(array: np.ndarray, layout: str) -> np.ndarray:
  """An official array in our layout, contiguous float32."""
  axes = LAYOUTS[layout][0]
  if layout in _PACKED:
    array = array.reshape(3, -1, *array.shape[1:])
  array = array if axes is None else np.transpose(array, axes)
  return np.ascontiguousarray(array, np.float32).reshape(array.shape)


def to_official(array: np.ndarray, layout: str) -> np.ndarray:
  """Our array in the official layout, contiguous float32."""
  axes, shape = LAYOUTS[layout][1], official_shape(array.shape, layout)
  array = array if axes is None else np.transpose(array, axes)
  return np.ascontiguousarray(array, np.float32).reshape(shape)


def official_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
  """The official shape of a tensor that has `shape` here."""
  axes = LAYOUTS[layout][1]
  shape = tuple(shape) if axes is None else tuple(shape[axis] for axis in axes)
  return (shape[0] * shape[1], *shape[2:]) if layout in _PACKED else shape


# --- Layers, as PyTorch lists them ---------------------------------------------------------------


def conv(name: str, path: str, bias: bool = False) -> Iterator[Row]:
  """A convolution, dense or depthwise: `weight` and perhaps `bias`."""
  yield Row(f"{name}.weight", f"{path}/kernel", "conv")
  if bias:
    yield Row(f"{name}.bias", f"{path}/bias")


def linear(name: str, path: str) -> Iterator[Row]:
  """A linear layer with bias."""
  yield Row(f"{name}.weight", f"{path}/kernel", "linear")
  yield Row(f"{name}.bias", f"{path}/bias")


def norm(name: str, path: str, dead: bool = False) -> Iterator[Row]:
  """A layer or group normalisation."""
  yield Row(f"{name}.weight", f"{path}/scale", dead=dead)
  yield Row(f"{name}.bias", f"{path}/bias", dead=dead)


def batch_norm(name: str, path: str) -> Iterator[Row]:
  """A batch normalisation: `path` without the collection."""
  yield from norm(name, f"params/{path}")
  yield Row(f"{name}.running_mean", f"batch_stats/{path}/mean")
  yield Row(f"{name}.running_var", f"batch_stats/{path}/var")
  yield Row(f"{name}.num_batches_tracked", "")


def conv_norm(name: str, path: str) -> Iterator[Row]:
  """A convolution without bias and its batch normalisation: `path` without the collection."""
  yield from conv(f"{name}.conv", f"params/{path}/conv")
  yield from batch_norm(f"{name}.bn", f"{path}/norm")


def aliases(rows: Iterable[Row], prefix: str, canonical_prefix: str) -> Iterator[Row]:
  """The same tensors again, under another parent."""
  for row in rows:
    name = prefix + row.name.removeprefix(canonical_prefix)
    yield dataclasses.replace(row, name=name, canonical=row.name)
