"""Pooling with PyTorch's conventions: adaptive averages, and maxima over windows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops import backend
from effseg_jax.ops.conv import onto_input_grid, windows


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
  if backend.platform() == "cpu":
    return _max_pool_shifts(x, x.shape[1:3], size, stride)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool_shifts(x: jax.Array, grid: tuple[int, int], size: int, stride: int) -> jax.Array:
  """`max_pool` as maxima of shifted arrays, for the CPU; `grid` are x's rows and columns.

  A window reduction takes 4 times as long there. Its gradient and that of a chain of maxima take 20
  to 80 times as long as the value; this one stores the argmax of each window (the first of
  equal cells, as PyTorch), and each cell sums the cotangents of the windows that it won.
  """
  del grid
  return functools.reduce(jnp.maximum, windows(x, size, stride, fill=-np.inf))


def _pool_forward(x: jax.Array, grid: tuple[int, int], size: int, stride: int) -> Any:
  del grid
  first, *others = windows(x, size, stride, fill=-np.inf)
  best, winner = first, jnp.zeros(first.shape, jnp.uint8)
  for number, candidate in enumerate(others, 1):
    winner = jnp.where(candidate > best, jnp.uint8(number), winner)
    best = jnp.maximum(best, candidate)
  return best, winner


def _pool_backward(
  grid: tuple[int, int], size: int, stride: int, winner: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array]:
  nobody = size**2
  winner = onto_input_grid(winner, grid, stride, nobody)
  cotangent = onto_input_grid(cotangent, grid, stride)
  # The window whose last element is on a cell lies before it, hence the turned order.
  offers = zip(
    reversed(windows(winner, size, fill=nobody)), reversed(windows(cotangent, size)), strict=True
  )
  won = [jnp.where(who == number, value, 0) for number, (who, value) in enumerate(offers)]
  return (sum(won[1:], start=won[0]),)


_max_pool_shifts.defvjp(_pool_forward, _pool_backward)
