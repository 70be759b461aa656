"""Bilinear and bicubic resizing as PyTorch defines it, and matrices of antialiased resizes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops import backend

PYTORCH_CUBIC = -0.75  # its kernel's parameter, and OpenCV's; elsewhere it is often -0.5


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
    The lower and the upper source index, int (size,), and the upper one's weight, float64 (size,).
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


def bicubic_matrix(size: int, source_size: int) -> np.ndarray:
  """A bicubic resize along one axis as PyTorch has it: a = -0.75, not antialiased.

  Pixels beyond the border repeat it, and corners are not aligned.

  Args:
    size: outputs.
    source_size: inputs.

  Returns:
    float64 (size, source_size).
  """
  x = (np.arange(size) + 0.5) * source_size / size - 0.5
  lower = np.floor(x).astype(np.int64)
  matrix = np.zeros((size, source_size))
  for tap in range(-1, 3):
    source = np.clip(lower + tap, 0, source_size - 1)
    np.add.at(matrix, (np.arange(size), source), cubic(x - (lower + tap), PYTORCH_CUBIC))
  return matrix


def antialiased_bicubic_matrix(size: int, source_size: int) -> np.ndarray:
  """A bicubic resize along one axis with a = -0.5 whose kernel widens when it shrinks.

  This is PyTorch's `antialias=True`: weights beyond the border are left out, and the others scaled
  to a sum of 1.

  Args:
    size: outputs.
    source_size: inputs.

  Returns:
    float64 (size, source_size).
  """
  widening = max(source_size / size, 1.0)
  centre = (np.arange(size) + 0.5) * source_size / size - 0.5
  matrix = cubic((np.arange(source_size) - centre[:, None]) / widening, -0.5)
  return matrix / matrix.sum(axis=1, keepdims=True)


def cubic(x: Any, a: float) -> Any:
  """Keys' cubic convolution kernel (1981, equation 15), of numpy or jax arrays."""
  xp = jnp if isinstance(x, jax.Array) else np
  x = xp.abs(x)
  near = ((a + 2.0) * x - (a + 3.0)) * x**2 + 1.0
  far = a * (((x - 5.0) * x + 8.0) * x - 4.0)
  return xp.where(x <= 1.0, near, xp.where(x < 2.0, far, 0.0))


def resize_bicubic(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes both spatial axes: `F.interpolate(mode="bicubic", align_corners=False)`.

  Args:
    x: (B, H, W, C), floating.
    size: (rows, cols) of the result.

  Returns:
    (B, rows, cols, C) of the same dtype.
  """
  if x.shape[1] != size[0]:
    matrix = jnp.asarray(bicubic_matrix(size[0], x.shape[1]), x.dtype)
    x = jnp.einsum("yh,bhwc->bywc", matrix, x, precision="highest")
  if x.shape[2] != size[1]:
    matrix = jnp.asarray(bicubic_matrix(size[1], x.shape[2]), x.dtype)
    x = jnp.einsum("xw,bywc->byxc", matrix, x, precision="highest")
  return x


def resize_bilinear(x: jax.Array, size: tuple[int, int], align_corners: bool = False) -> jax.Array:
  """Resizes both spatial axes.

  Args:
    x: (B, H, W, C), floating.
    size: (rows, cols) of the result.
    align_corners: PyTorch's argument of that name.

  Returns:
    (B, rows, cols, C) of the same dtype.
  """
  rule = "align_corners" if align_corners else "half_pixel"
  resize = lambda x: _along(  # noqa: E731
    _along(x, 1, size[0], align_corners), 2, size[1], align_corners
  )
  return backend.as_operator(f"resize_bilinear:{rule}", resize, x)


def _along(x: jax.Array, axis: int, size: int, align_corners: bool) -> jax.Array:
  if x.shape[axis] == size:
    return x
  if 2 * x.shape[axis] == size and not align_corners:
    return _double(x, axis)
  return _interpolate(x, axis, size, align_corners)


def _interpolate(x: jax.Array, axis: int, size: int, align_corners: bool) -> jax.Array:
  lower, upper, weight = source_coordinates(size, x.shape[axis], align_corners)
  shape = [1] * x.ndim
  shape[axis] = size
  weight = jnp.asarray(weight.reshape(shape), x.dtype)
  low, high = jnp.take(x, lower, axis=axis), jnp.take(x, upper, axis=axis)
  return low + (high - low) * weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _double(x: jax.Array, axis: int) -> jax.Array:
  """Twice the size, whose gradient is four strided sums instead of a scatter."""
  return _interpolate(x, axis, 2 * x.shape[axis], False)


def _double_forward(x: jax.Array, axis: int) -> tuple[jax.Array, None]:
  return _double(x, axis), None


def _double_backward(axis: int, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
  # Cell i gives 3/4 to the outputs 2 i and 2 i + 1, and 1/4 to 2 i - 1 and 2 i + 2; the outer cells
  # replace their missing neighbours.
  size = cotangent.shape[axis] // 2
  pairs = cotangent.reshape(*cotangent.shape[:axis], size, 2, *cotangent.shape[axis + 1 :])
  even, odd = (jax.lax.index_in_dim(pairs, k, axis + 1, keepdims=False) for k in (0, 1))
  cut = functools.partial(jax.lax.slice_in_dim, axis=axis)
  before = jnp.concatenate([cut(even, 0, 1), cut(odd, 0, size - 1)], axis)
  after = jnp.concatenate([cut(even, 1, size), cut(odd, size - 1, size)], axis)
  return (0.75 * (even + odd) + 0.25 * (before + after),)


_double.defvjp(_double_forward, _double_backward)
