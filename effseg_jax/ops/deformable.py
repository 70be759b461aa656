"""Multi-scale deformable attention: every query reads a few points of every level's map.

Zhu et al., Deformable DETR, ICLR 2021 (arXiv 2010.04159), equation 3. A point is read bilinearly;
cells outside the map count as zero (PyTorch's `grid_sample` with `align_corners=False`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.ops import backend

Sizes = tuple[tuple[int, int], ...]

# Queries per step of the backward pass on the CPU: what a step holds of a sample, four cells of 128
# bytes for each of them, stays in a core's cache. It is twice as slow without steps.
_STEP_QUERIES = 1400


def deformable_attention(
  value: jax.Array,
  level_sizes: Sequence[tuple[int, int]],
  locations: jax.Array,
  weights: jax.Array,
) -> jax.Array:
  """Weighted sum of bilinear samples, per head.

  Args:
    value: (B, S, M, D): the tokens of all levels, each level row by row; M heads of D channels.
    level_sizes: (rows, columns) of each level; their areas add up to S.
    locations: float32 (B, M, L, P, 2, Q), (x, y) of the sampled points, from 0 to 1 across a level.
      Queries come last, because everything up to the samples is computed along them.
    weights: float32 (B, M, L, P, Q).

  Returns:
    float32 (B, Q, M, D). Sampling is float32 whatever the dtype of `value`.

  Raises:
    UserError: if the levels do not hold as many tokens as there are values.
  """
  sizes = tuple((int(rows), int(cols)) for rows, cols in level_sizes)
  if sum(rows * cols for rows, cols in sizes) != value.shape[1]:
    raise UserError(f"there are {value.shape[1]} values; expected those of the levels {sizes}.")
  if backend.platform() == "cpu":
    return _by_rows(value, sizes, locations, weights)
  if backend.platform() == "export":
    return _by_grids(value, sizes, locations, weights)
  form = _by_quads if backend.platform() == "tpu" else deformable_attention_reference
  # The samples are read again in the backward pass: they take 4 L P times the memory of the result.
  return jax.checkpoint(form, static_argnums=(1,))(value, sizes, locations, weights)


def deformable_attention_reference(
  value: jax.Array, level_sizes: Sizes, locations: jax.Array, weights: jax.Array
) -> jax.Array:
  """`deformable_attention` with one gather per level: the reference form, and for GPUs."""
  total, start = 0.0, 0
  for level, (rows, cols) in enumerate(level_sizes):
    x = _neighbours(locations[:, :, level, :, 0], cols)
    y = _neighbours(locations[:, :, level, :, 1], rows)
    index, shares = [], []
    for i, j in _CORNERS:
      row, col = jnp.clip(y.lower + i, 0, rows - 1), jnp.clip(x.lower + j, 0, cols - 1)
      index.append(row * cols + col)
      shares.append(weights[:, :, level] * y.shares[i] * x.shares[j])
    tokens = value[:, start : start + rows * cols]
    cells = _gather(tokens, jnp.stack(index, axis=-1)).astype(jnp.float32)  # (B, M, P, Q, 4, D)
    total = total + jnp.sum(jnp.stack(shares, axis=-1)[..., None] * cells, axis=(2, 4))
    start += rows * cols
  return total.swapaxes(1, 2)


def _gather(tokens: jax.Array, index: jax.Array) -> jax.Array:
  """Tokens (B, S, M, D) at (B, M, ...) -> (B, M, ..., D)."""
  return jax.vmap(jax.vmap(lambda cells, index: cells[index], (1, 0)))(tokens, index)


# The four cells around a point, as steps down and to the right from the upper left one.
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


class _Neighbours(NamedTuple):
  """The two cells around a coordinate, along one axis of a level.

  Attributes:
    lower: int32, index of the first; -1 for a cell before the level.
    shares: of both in the interpolation; 0 outside the level.
    slopes: derivatives of the shares by the coordinate, in cells.
  """

  lower: jax.Array
  shares: tuple[jax.Array, jax.Array]
  slopes: tuple[jax.Array, jax.Array]


def _neighbours(coordinate: jax.Array, size: Any) -> _Neighbours:
  """Around coordinates from 0 to 1 across `size` cells."""
  position = coordinate * size - 0.5
  lower = jnp.floor(position)
  first, second = (lower >= 0) & (lower < size), (lower >= -1) & (lower < size - 1)
  distance = position - lower
  return _Neighbours(
    jnp.clip(lower, -1, size - 1).astype(jnp.int32),
    (jnp.where(first, 1 - distance, 0.0), jnp.where(second, distance, 0.0)),
    (jnp.where(first, -1.0, 0.0), jnp.where(second, 1.0, 0.0)),
  )


# --- In inference runtimes -----------------------------------------------------------------------


def _by_grids(
  value: jax.Array, level_sizes: Sizes, locations: jax.Array, weights: jax.Array
) -> jax.Array:
  """One `grid_sample` per level, each head being an image of its own."""
  batch, _, heads, channels = value.shape
  samples, start = [], 0
  for level, (rows, cols) in enumerate(level_sizes):
    tokens = value[:, start : start + rows * cols].transpose(0, 2, 1, 3)
    points = jnp.moveaxis(locations[:, :, level], 3, -1)  # (B, M, P, Q, 2)
    samples.append(
      backend.as_operator(
        "grid_sample",
        grid_sample,
        tokens.reshape(batch * heads, rows, cols, channels),
        2.0 * points.reshape(batch * heads, *points.shape[2:]) - 1.0,
      )
    )
    start += rows * cols
  cells = jnp.concatenate(samples, axis=1)  # (B M, L P, Q, D)
  shares = weights.reshape(batch * heads, -1, weights.shape[-1])
  total = jnp.sum(cells * shares[..., None], axis=1)
  return total.reshape(batch, heads, -1, channels).swapaxes(1, 2)


def grid_sample(images: jax.Array, points: jax.Array) -> jax.Array:
  """Bilinear samples; cells outside count as zero (PyTorch's function, `align_corners=False`).

  Args:
    images: (N, H, W, C).
    points: float32 (N, P, Q, 2), (x, y) from -1 to 1 across the image.

  Returns:
    float32 (N, P, Q, C).
  """
  rows, cols, channels = images.shape[1:]
  x = _neighbours((points[..., 0] + 1.0) / 2.0, cols)
  y = _neighbours((points[..., 1] + 1.0) / 2.0, rows)
  tokens, total = images.reshape(images.shape[0], -1, channels), 0.0
  for i, j in _CORNERS:
    row, col = jnp.clip(y.lower + i, 0, rows - 1), jnp.clip(x.lower + j, 0, cols - 1)
    cells = jax.vmap(lambda cells, index: cells[index])(tokens, row * cols + col)
    total = total + (y.shares[i] * x.shares[j])[..., None] * cells.astype(jnp.float32)
  return total


# --- On the TPU ----------------------------------------------------------------------------------


def _by_quads(
  value: jax.Array, level_sizes: Sizes, locations: jax.Array, weights: jax.Array
) -> jax.Array:
  """Reads the four cells of a sample at once, from a map that holds them side by side.

  A TPU stores and moves 128 numbers where a row has 32; with four cells in a row none is wasted. By
  the compiler's account value and gradients move a quarter of the reference form's bytes.
  """
  channels, corners = value.shape[-1], len(_CORNERS)
  corner_of = jnp.arange(corners * channels) // channels
  total, start = 0.0, 0
  for level, (rows, cols) in enumerate(level_sizes):
    x = _neighbours(locations[:, :, level, :, 0], cols)
    y = _neighbours(locations[:, :, level, :, 1], rows)
    quads = _quads(value[:, start : start + rows * cols], rows, cols)
    cells = _gather(quads, (y.lower + 1) * (cols + 1) + x.lower + 1)  # (B, M, P, Q, 4 D)
    shares = [weights[:, :, level] * y.shares[i] * x.shares[j] for i, j in _CORNERS]
    # Chosen and not repeated: that would need arrays of 4 x 32, which are stored as 4 x 128.
    shares = jnp.select(
      [corner_of == corner for corner in range(corners)], [share[..., None] for share in shares]
    )
    total = total + jnp.sum(shares * cells.astype(jnp.float32), axis=2)
    start += rows * cols
  return sum(jnp.split(total, corners, axis=-1)).swapaxes(1, 2)


def _quads(tokens: jax.Array, rows: int, cols: int) -> jax.Array:
  """A level's tokens (B, rows cols, M, D) -> (B, (rows + 1) (cols + 1), M, 4 D).

  From the quad around the upper left corner, three of whose cells are outside and zero.
  """
  batch, _, heads, channels = tokens.shape
  grid = tokens.reshape(batch, rows, cols, heads, channels)
  grid = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
  quads = [grid[:, i : i + rows + 1, j : j + cols + 1] for i, j in _CORNERS]
  return jnp.concatenate(quads, axis=-1).reshape(batch, -1, heads, 4 * channels)


# --- On the CPU ----------------------------------------------------------------------------------
#
# The cells of a sample are at fixed distances from its upper left one; where one of them is outside
# the level, another cell is read with weight 0. Heads come before queries, because
# the map of a single head stays in the cache.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_rows(value: jax.Array, sizes: Sizes, locations: jax.Array, weights: jax.Array) -> jax.Array:
  """Each cell of a sample is a gather of contiguous rows, added up where they are read."""
  batch, heads, levels, points, queries = weights.shape
  cells = _with_margins(value, sizes)
  begins = np.arange(heads, dtype=np.int32)[:, None, None] * cells.shape[2]
  cells = cells.swapaxes(0, 1).reshape(batch, -1, cells.shape[-1])
  # A loop, because what is in a loop is not computed in an order that suits the result's reader.
  # (A loop of one turn would be none: a level's points take two turns.)
  turns = 2 if points % 2 == 0 else points
  starts, rows, cols = (x.repeat(turns) for x in _levels(sizes))

  def per_turn(x: jax.Array) -> jax.Array:
    """(B, M, L, P, ...) -> (turns, B, M, P of a turn, ...)."""
    x = x.reshape(*x.shape[:2], levels * turns, points // turns, *x.shape[4:])
    return jnp.moveaxis(x, 2, 0)

  def turn(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    start, rows, cols, locations, weights = inputs
    x, y = _neighbours(locations[..., 0, :], cols), _neighbours(locations[..., 1, :], rows)
    first = begins + start + y.lower * cols + x.lower
    y_shares = [weights * share for share in y.shares]
    for point in range(points // turns):
      for i, j in _CORNERS:
        rows_read = _take(cells, first[:, :, point] + (i * cols + j))
        share = y_shares[i][:, :, point] * x.shares[j][:, :, point]
        total = total + share[..., None] * rows_read
    return total, None

  total, _ = jax.lax.scan(
    turn,
    jnp.zeros((batch, heads, queries, cells.shape[-1])),
    (starts, rows, cols, per_turn(locations), per_turn(weights)),
  )
  return total.swapaxes(1, 2)


def _by_rows_forward(value, sizes, locations, weights):
  return _by_rows(value, sizes, locations, weights), (value, locations, weights)


def _by_rows_backward(sizes, residuals, cotangent):
  """Scatters to the cells, and products of the cells with the cotangent, some queries at a time."""
  value, locations, weights = residuals
  batch, _, levels, points, queries = weights.shape
  size = -(-queries // -(-queries * batch // _STEP_QUERIES))
  starts, rows, cols = (x.repeat(points)[:, None, None] for x in _levels(sizes))
  distances = np.concatenate([i * cols + j for i, j in _CORNERS], axis=-1)[:, 0]

  def steps(x: jax.Array) -> jax.Array:
    """(..., Q) -> (steps, ..., size)."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -queries % size)])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, size), -2, 0)

  def head(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    cells, cotangent, locations, weights = inputs

    def step(gradient, inputs):
      cotangent, (x, y), weights = inputs
      x, y = _neighbours(x, cols), _neighbours(y, rows)
      first = starts + y.lower * cols + x.lower

      def sample(gradient, inputs):
        first, distances, y_shares, x_shares = inputs
        index = first[..., None] + distances
        shares = _products(y_shares, x_shares)
        gradient = _add(gradient, index, shares[..., None] * cotangent[:, :, None])
        return gradient, _row_sums(_take(cells, index) * cotangent[:, :, None])

      y_shares = tuple(weights * share for share in y.shares)
      gradient, products = jax.lax.scan(sample, gradient, (first, distances, y_shares, x.shares))

      def weighted(y_factors: Sequence[jax.Array], x_factors: Sequence[jax.Array]) -> jax.Array:
        return sum(
          products[..., corner] * y_factors[i] * x_factors[j]
          for corner, (i, j) in enumerate(_CORNERS)
        )

      of_weights = weighted(y.shares, x.shares)
      of_x = weights * cols * weighted(y.shares, x.slopes)
      of_y = weights * rows * weighted(y.slopes, x.shares)
      return gradient, (of_weights, of_x, of_y)

    def from_steps(slopes: jax.Array) -> jax.Array:
      """(steps, L P, B, size) -> (B, L, P, Q)."""
      slopes = slopes.transpose(2, 1, 0, 3).reshape(batch, levels, points, -1)
      return slopes[..., :queries]

    samples = lambda x: steps(jnp.moveaxis(x, 0, -2))  # noqa: E731
    gradient, slopes = jax.lax.scan(
      step,
      jnp.zeros_like(cells),
      (
        steps(cotangent.swapaxes(1, 2)).swapaxes(2, 3),
        samples(locations.transpose(0, 3, 1, 2, 4).reshape(batch, 2, -1, queries)),
        samples(weights.reshape(batch, -1, queries)),
      ),
    )
    of_weights, of_x, of_y = (from_steps(x) for x in slopes)
    return gradient, jnp.stack([of_x, of_y], axis=3), of_weights

  inputs = (_with_margins(value, sizes), cotangent.transpose(2, 0, 1, 3))
  gradient, *slopes = jax.lax.map(head, (*inputs, *_heads_first(locations, weights)))
  of_value = _without_margins(gradient, sizes).astype(value.dtype)
  return of_value, *_heads_first(*slopes)


_by_rows.defvjp(_by_rows_forward, _by_rows_backward)


def _products(
  upper_lower: tuple[jax.Array, jax.Array], left_right: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """All products of two pairs of (...), as (..., 4)."""
  lower, right = np.asarray(_CORNERS, bool).T
  first = jnp.where(lower, upper_lower[1][..., None], upper_lower[0][..., None])
  return first * jnp.where(right, left_right[1][..., None], left_right[0][..., None])


def _levels(sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """First cell, rows and columns of each level, int32 (L,)."""
  rows, cols = np.asarray(sizes, np.int32).T
  return _margin(sizes) + np.cumsum(rows * cols, dtype=np.int32) - rows * cols, rows, cols


def _margin(sizes: Sizes) -> int:
  """How far from a level the cells around a point can be."""
  return max(cols for _, cols in sizes) + 1


def _with_margins(value: jax.Array, sizes: Sizes) -> jax.Array:
  """(B, S, M, D) -> float32 (M, B, N, D): the levels' cells between two margins of zeros."""
  margins = ((0, 0), (0, 0), (_margin(sizes), _margin(sizes)), (0, 0))
  return jnp.pad(value.astype(jnp.float32).transpose(2, 0, 1, 3), margins)


def _without_margins(cells: jax.Array, sizes: Sizes) -> jax.Array:
  """(M, B, N, D) -> (B, S, M, D)."""
  margin = _margin(sizes)
  return cells[:, :, margin:-margin].transpose(1, 2, 0, 3)


def _heads_first(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """(B, M, ...) -> (M, B, ...), and back."""
  return tuple(x.swapaxes(0, 1) for x in arrays)


def _take(cells: jax.Array, index: jax.Array) -> jax.Array:
  """cells (B, N, D) at index (B, ...) -> (B, ..., D)."""
  return jax.vmap(lambda c, i: c.at[i].get(mode="promise_in_bounds"))(cells, index)


def _add(cells: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
  """Adds rows (B, ..., D) to the cells (B, N, D) at index (B, ...)."""
  return jax.vmap(lambda c, i, r: c.at[i].add(r, mode="promise_in_bounds"))(cells, index, rows)


def _row_sums(rows: jax.Array) -> jax.Array:
  """Sums (..., D) over the channels by halves: XLA on the CPU would add one by one."""
  while rows.shape[-1] % 2 == 0:
    half = rows.shape[-1] // 2
    rows = rows[..., :half] + rows[..., half:]
  return jnp.sum(rows, axis=-1)
