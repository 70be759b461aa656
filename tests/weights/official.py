"""Official weights made from their names, as the reference outputs were (specification, 9)."""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np

from effseg_jax import create_model
from effseg_jax.weights import table
from effseg_jax.weights.loading import variable_shapes

SIZES = ("tiny", "small", "base")


def tensor_of(name: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray:
  """The tensor that belongs to a canonical name."""
  seed = zlib.crc32((name + salt).encode())
  z = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)
  tenth = np.float32(0.1)
  if name.endswith("num_batches_tracked"):
    return np.zeros(shape, np.int64)
  if name.endswith("running_var"):
    return np.abs(tenth * z) + np.float32(1)
  if name.endswith("running_mean"):
    return tenth * z
  if len(shape) >= 2:
    return z * np.float32(1 / math.sqrt(math.prod(shape[1:])))
  return np.float32(1) + tenth * z if name.endswith(".weight") else tenth * z


@functools.cache
def rows(size: str) -> tuple[table.Row, ...]:
  """The official state dict of a size, by our table."""
  from effseg_jax.weights import afformer

  model = create_model(f"afformer_{size}")
  return tuple(afformer.rows(model, variable_shapes(model)))


@functools.cache
def _weights(size: str) -> dict[str, np.ndarray]:
  shapes = variable_shapes(create_model(f"afformer_{size}"))
  made = {}
  for row in rows(size):
    shape = table.official_shape(shapes[row.path], row.layout) if row.path else ()
    made[row.name] = tensor_of(row.canonical or row.name, shape)
  return made


def weights(size: str) -> dict[str, np.ndarray]:
  """Official name -> array, for 150 classes; the dictionary is the caller's own."""
  return dict(_weights(size))


def listed(shared: Path, size: str) -> list[list]:
  """[name, shape, dtype, canonical name] as the official model lists them."""
  path = shared / "specs" / "state_dict_shapes" / f"afformer_{size}.json"
  return json.loads(path.read_text())
