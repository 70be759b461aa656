"""Pooling with PyTorch's conventions: adaptive averages, and maxima over windows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops import backend
from effseg_jax.ops.conv import windows


def adaptive_average_matrix(size: int, bins: int) -> np.ndarray:
  """Adaptive average pooling along one axis, as a matrix.

  Bin i covers cells `floor(i n / s)` to `ceil((i + 1) n / s) - 1`; bins may overlap, and repeat
  cells where there are more bins than cells.

  Args:
    size: n, number of cells.
    bins: s, number of outputs.

  Returns:
    float64 (bins, size); rows sum to 1.
  """
  matrix = np.zeros((bins, size))
  for i in range(bins):
    begin, end = i * size // bins, -(-(i + 1) * size // bins)
    matrix[i, begin:end] = 1.0 / (end - begin)
  return matrix


def max_pool(x: jax.Array, size: int = 3, stride: int = 1) -> jax.Array:
  """Maximum over each window; both sides are padded with `size // 2` cells that never win.

  Args:
    x: (B, H, W, C), floating.
    size: of the windows, odd.
    stride: between windows.

  Returns:
    (B, ceil(H / stride), ceil(W / stride), C) of the same dtype.
  """
  if backend.platform() == "cpu":  # a window reduction is 3 to 4 times slower there
    return functools.reduce(jnp.maximum, windows(x, size, stride, fill=-np.inf))
  return max_pool_reduction(x, size, stride)


def max_pool_reduction(x: jax.Array, size: int = 3, stride: int = 1) -> jax.Array:
  """`max_pool` as XLA's window reduction: the reference form."""
  padding = (size // 2, size // 2)
  return jax.lax.reduce_window(
    x,
    -np.inf,
    jax.lax.max,
    (1, size, size, 1),
    (1, stride, stride, 1),
    ((0, 0), padding, padding, (0, 0)),
  )
