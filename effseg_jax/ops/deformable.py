"""Multi-scale deformable attention: every query reads a few points of every level's map.

Zhu et al., Deformable DETR, ICLR 2021 (arXiv 2010.04159), equation 3. A point is read bilinearly,
cells outside the map count as zero (PyTorch's `grid_sample` with `align_corners=False`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

LevelSizes = Sequence[tuple[int, int]]


def deformable_attention(
  value: jax.Array, level_sizes: LevelSizes, locations: jax.Array, weights: jax.Array
) -> jax.Array:
  """Weighted sum of bilinear samples, per head.

  Args:
    value: (B, S, M, D): the tokens of all levels, each level row by row; M heads of D channels.
    level_sizes: (rows, columns) of each level; their areas add up to S.
    locations: float32 (B, Q, M, L, P, 2), (x, y) of the sampled points, from 0 to 1 across a level.
    weights: float32 (B, Q, M, L, P).

  Returns:
    float32 (B, Q, M, D). Sampling is float32 whatever the dtype of `value`.
  """
  return deformable_attention_reference(value, level_sizes, locations, weights)


def deformable_attention_reference(
  value: jax.Array, level_sizes: LevelSizes, locations: jax.Array, weights: jax.Array
) -> jax.Array:
  """`deformable_attention` as its formula reads, with derivatives by JAX: the reference form."""
  batch = jnp.arange(value.shape[0])[:, None, None, None]
  head = jnp.arange(value.shape[2])[:, None]
  value = value.astype(jnp.float32)
  total, start = 0.0, 0
  for level, (rows, cols) in enumerate(level_sizes):
    x = locations[:, :, :, level, :, 0] * cols - 0.5
    y = locations[:, :, :, level, :, 1] * rows - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    for column, x_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
      for row, y_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        inside = (column >= 0) & (column < cols) & (row >= 0) & (row < rows)
        token = jnp.clip(row, 0, rows - 1) * cols + jnp.clip(column, 0, cols - 1)
        cell = value[batch, start + token.astype(jnp.int32), head]
        share = jnp.where(inside, x_weight * y_weight, 0.0) * weights[:, :, :, level]
        total = total + jnp.einsum("bqmp,bqmpd->bqmd", share, cell)
    start += rows * cols
  return total
