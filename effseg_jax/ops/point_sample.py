"""Bilinear values of maps at points, as PyTorch's `grid_sample` defines them.

Points are (x, y) in [0, 1]^2 of the padded image; corners are not aligned, and pixels outside
the map count as 0 (`padding_mode="zeros"`). Points get no gradient.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from effseg_jax.ops import backend

# Points whose dense weights exist at a time where sampling is a product.
_CHUNK = 1024

# No target; see docs/architecture.md for segment maps.
NO_SEGMENT = 255


def sample_points(maps: jax.Array, points: jax.Array) -> jax.Array:
  """Samples maps at points that all maps of an example share.

  Args:
    maps: (..., C, H, W) floating.
    points: float32 (..., P, 2) in [0, 1], x before y.

  Returns:
    float32 (..., C, P), differentiable with respect to `maps`.
  """
  return _sample(maps.astype(jnp.float32), points, maps.shape[-2:])


def splat_points(values: jax.Array, points: jax.Array, size: tuple[int, int]) -> jax.Array:
  """The transpose of `sample_points`: adds values at points to maps of zeros.

  Args:
    values: float32 (..., C, P).
    points: float32 (..., P, 2).
    size: (H, W) of the result.

  Returns:
    float32 (..., C, H, W).
  """
  # TPUs add colliding indices one after the other; products keep them busy.
  splat = _splat_by_products if backend.platform() == "tpu" else _splat_by_scatter
  return _batched(functools.partial(splat, size=size), values.ndim - 2)(values, points)


def sample_segments(segments: jax.Array, points: jax.Array, ids: jax.Array) -> jax.Array:
  """Samples the masks of a segment map without materialising them.

  Args:
    segments: uint8 (..., S, H, W): index of the segment at each pixel of S layers, 255 for none; a
      segment is in one layer only.
    points: float32 (..., P, 2).
    ids: int (..., N), the segments to sample.

  Returns:
    float32 (..., N, P), the bilinear value of mask `ids[n]` at each point, 0 to 1.
  """
  return _batched(_sample_segments, points.ndim - 2)(segments, points, ids)


def sample_by_gather(maps: jax.Array, points: jax.Array) -> jax.Array:
  """`sample_points` of one example by looking up the four surrounding pixels: the reference form.

  Args:
    maps: float32 (C, H, W).
    points: float32 (P, 2).

  Returns:
    float32 (C, P).
  """
  flat = maps.reshape(maps.shape[0], -1)
  return sum(flat[:, index] * weight for index, weight in _corners(points, maps.shape[-2:]))


def sample_by_products(maps: jax.Array, points: jax.Array) -> jax.Array:
  """`sample_by_gather` as products with dense weights, for devices that gather slowly."""

  def chunk(part: jax.Array) -> jax.Array:
    rows, cols = _dense_weights(part, maps.shape[-2:])
    lines = jnp.einsum("chw,pw->chp", maps, cols, precision="highest")
    return jnp.einsum("chp,ph->cp", lines, rows, precision="highest")

  values = jax.lax.map(chunk, _chunks(points))
  return jnp.moveaxis(values, 0, 1).reshape(maps.shape[0], -1)[:, : points.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sample(maps: jax.Array, points: jax.Array, size: tuple[int, int]) -> jax.Array:
  del size
  form = sample_by_gather
  if backend.platform() == "tpu":
    form = sample_by_products if maps.shape[-3] == 1 else _sample_rows
  return _batched(form, maps.ndim - 3)(maps, points)


def _sample_forward(maps, points, size):
  return _sample(maps, points, size), points


def _sample_backward(size, points, cotangent):
  return splat_points(cotangent, points, size), jnp.zeros_like(points)


_sample.defvjp(_sample_forward, _sample_backward)


def _sample_rows(maps: jax.Array, points: jax.Array) -> jax.Array:
  """Looks up the values of all maps at one surrounding pixel as one row."""
  flat = maps.reshape(maps.shape[0], -1).T
  corners = _corners(points, maps.shape[-2:])
  return sum(flat[index] * weight[:, None] for index, weight in corners).T


def _sample_segments(segments: jax.Array, points: jax.Array, ids: jax.Array) -> jax.Array:
  flat = segments.reshape(segments.shape[0], -1)
  total = 0.0
  for index, weight in _corners(points, segments.shape[-2:]):
    here = flat[:, index]
    inside = jnp.any(here[:, None] == ids[None, :, None], axis=0)
    total += jnp.where(inside, weight, 0.0)
  return total


def _splat_by_scatter(values: jax.Array, points: jax.Array, size: tuple[int, int]) -> jax.Array:
  total = jnp.zeros((values.shape[0], size[0] * size[1]), jnp.float32)
  for index, weight in _corners(points, size):
    total = total.at[:, index].add(values * weight)
  return total.reshape(-1, *size)


def _splat_by_products(values: jax.Array, points: jax.Array, size: tuple[int, int]) -> jax.Array:
  def chunk(total: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    part, value = inputs
    rows, cols = _dense_weights(part, size)
    lines = value[:, :, None] * rows
    return total + jnp.einsum("cph,pw->chw", lines, cols, precision="highest"), None

  parts = _chunks(points)
  padding = parts.shape[0] * parts.shape[1] - points.shape[0]
  split = jnp.pad(values, ((0, 0), (0, padding)))
  split = jnp.moveaxis(split.reshape(values.shape[0], *parts.shape[:2]), 1, 0)
  zeros = jnp.zeros((values.shape[0], *size), jnp.float32)
  return jax.lax.scan(chunk, zeros, (parts, split))[0]


def _corners(points: jax.Array, size: tuple[int, int]) -> list[tuple[jax.Array, jax.Array]]:
  """Flat index (row-major, int32 (P,)) and weight (float32 (P,)) of each point's four pixels."""
  height, width = size
  x, y = points[:, 0] * width - 0.5, points[:, 1] * height - 0.5
  left, top = jnp.floor(x), jnp.floor(y)
  right_weight, lower_weight = x - left, y - top
  left, top = left.astype(jnp.int32), top.astype(jnp.int32)
  corners = []
  for row, row_weight in ((top, 1.0 - lower_weight), (top + 1, lower_weight)):
    for col, col_weight in ((left, 1.0 - right_weight), (left + 1, right_weight)):
      inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
      index = jnp.clip(row, 0, height - 1) * width + jnp.clip(col, 0, width - 1)
      corners.append((index, jnp.where(inside, row_weight * col_weight, 0.0)))
  return corners


def _dense_weights(points: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
  """Every row's and every column's weight at each point, float32 (P, H) and (P, W)."""
  position = points * jnp.asarray(size[::-1], jnp.float32) - 0.5
  x, y = position[:, :1], position[:, 1:]
  hat = lambda p, n: jnp.maximum(1.0 - jnp.abs(p - jnp.arange(n)), 0.0)  # noqa: E731
  return hat(y, size[0]), hat(x, size[1])


def _chunks(points: jax.Array) -> jax.Array:
  """Splits (P, 2) into (chunks, at most _CHUNK, 2); what is added lies outside every map."""
  if points.shape[0] <= _CHUNK:
    return points[None]
  padding = -points.shape[0] % _CHUNK
  return jnp.pad(points, ((0, padding), (0, 0)), constant_values=-1.0).reshape(-1, _CHUNK, 2)


def _batched(function, axes: int):
  for _ in range(axes):
    function = jax.vmap(function)
  return function
