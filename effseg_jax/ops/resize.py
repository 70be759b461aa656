"""Bilinear resizing as PyTorch defines it: never antialiased, with or without aligned corners."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def source_coordinates(
  size: int, source_size: int, align_corners: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Where each output of a bilinear resize along one axis comes from.

  With aligned corners `x = i (n_in - 1) / (n_out - 1)`, otherwise
  `x = max((i + 1/2) n_in / n_out - 1/2, 0)`.

  Args:
    size: outputs.
    source_size: inputs.
    align_corners: which of the two rules.

  Returns:
    The lower and the upper neighbour, int (size,), and the upper one's weight, float64 (size,).
  """
  index = np.arange(size)
  if align_corners:
    x = index * ((source_size - 1) / max(size - 1, 1))
  else:
    x = np.maximum((index + 0.5) * source_size / size - 0.5, 0.0)
  lower = np.minimum(np.floor(x).astype(np.int64), source_size - 1)
  return lower, np.minimum(lower + 1, source_size - 1), x - lower


def bilinear_matrix(size: int, source_size: int, align_corners: bool = False) -> np.ndarray:
  """A bilinear resize along one axis, as a float64 matrix (size, source_size)."""
  lower, upper, weight = source_coordinates(size, source_size, align_corners)
  matrix = np.zeros((size, source_size))
  np.add.at(matrix, (np.arange(size), lower), 1.0 - weight)
  np.add.at(matrix, (np.arange(size), upper), weight)
  return matrix


def resize_bilinear(x: jax.Array, size: tuple[int, int], align_corners: bool = False) -> jax.Array:
  """Resizes both spatial axes.

  Args:
    x: (B, H, W, C), floating.
    size: (rows, cols) of the result.
    align_corners: PyTorch's argument of that name.

  Returns:
    (B, rows, cols, C) of the same dtype.
  """
  return _along(_along(x, 1, size[0], align_corners), 2, size[1], align_corners)


def _along(x: jax.Array, axis: int, size: int, align_corners: bool) -> jax.Array:
  if x.shape[axis] == size:
    return x
  lower, upper, weight = source_coordinates(size, x.shape[axis], align_corners)
  shape = [1] * x.ndim
  shape[axis] = size
  weight = jnp.asarray(weight.reshape(shape), x.dtype)
  low, high = jnp.take(x, lower, axis=axis), jnp.take(x, upper, axis=axis)
  return low + (high - low) * weight
