"""Reference outputs of PyTorch models, and how they are compared with ours."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def read(name: str) -> dict[str, np.ndarray]:
  """The arrays of a file in `tests/golden`."""
  with np.load(GOLDEN / f"{name}.npz") as file:
    return dict(file)


def decoded(array: np.ndarray) -> Any:
  """What JSON text, kept as its bytes, stands for."""
  return json.loads(array.tobytes())


def images(rows: int, cols: int, seed: int = 0, batch: int = 1) -> jnp.ndarray:
  """The images that the reference outputs belong to, (B, H, W, 3)."""
  x = np.random.Generator(np.random.PCG64(seed)).standard_normal((batch, 3, rows, cols))
  return channels_last(x.astype(np.float32))


def channels_last(x: np.ndarray) -> jnp.ndarray:
  """(B, C, H, W) -> (B, H, W, C)."""
  return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


def channels_first(x: Any) -> np.ndarray:
  """(B, H, W, C) -> (B, C, H, W)."""
  return np.asarray(x).transpose(0, 3, 1, 2)


def tokens(x: Any) -> np.ndarray:
  """(B, H, W, C) -> (B, H W, C)."""
  return np.asarray(x).reshape(x.shape[0], -1, x.shape[-1])


def assert_close(found: Any, reference: np.ndarray, tolerance: float) -> None:
  """Equal shapes, and differences relative to the reference's largest value."""
  found = np.asarray(found)
  assert found.shape == reference.shape
  assert np.abs(found - reference).max() <= tolerance * np.abs(reference).max()
