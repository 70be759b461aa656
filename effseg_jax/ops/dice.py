"""Soft Dice loss of upsampled logits without ever holding the upsampled logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops.resize import bilinear_matrix, resize_bilinear

# Output rows worked on at a time, at most.
_STRIP_ROWS = 32


def upsampled_dice(logits: jax.Array, labels: jax.Array, *, smooth: float = 1.0) -> jax.Array:
  """Dice loss of V-Net (Milletari et al. 2016), `1 - 2 sum(p g) / (sum(p^2) + sum(g))` per class.

  The probabilities are the softmax of the logits resized (bilinear, corners not aligned) to the
  labels. They exist for one strip of rows at a time, and again in the backward pass: what stays
  are three sums per class.

  Args:
    logits: (B, h, w, K) floating.
    labels: int (B, H, W), a class; pixels of any other number count nowhere.
    smooth: added above and below, so that an absent class that nobody predicts costs nothing.

  Returns:
    float32 (B,), the mean over the classes.
  """
  batch, rows, cols, num_classes = logits.shape
  height, width = labels.shape[1:]
  strips = -(-height // _STRIP_ROWS)
  strip_rows = -(-height // strips)
  row_matrix = np.zeros((strips * strip_rows, rows), np.float32)
  row_matrix[:height] = bilinear_matrix(height, rows)
  row_matrix = jnp.asarray(row_matrix.reshape(strips, strip_rows, rows))
  col_matrix = jnp.asarray(bilinear_matrix(width, cols), jnp.float32)
  padding = ((0, 0), (0, strips * strip_rows - height), (0, 0))
  labels = jnp.pad(labels.astype(jnp.int32), padding, constant_values=-1)
  labels = labels.reshape(batch, strips, strip_rows, width).swapaxes(0, 1)
  planes = logits.astype(jnp.float32).transpose(0, 3, 1, 2)  # sums over classes: of whole planes

  @jax.checkpoint
  def sums(planes: jax.Array, to_rows: jax.Array, label: jax.Array) -> jax.Array:
    narrow = jnp.einsum("rh,bkhw->bkrw", to_rows, planes)
    full = jnp.einsum("bkrw,cw->bkrc", narrow, col_matrix)
    classes = jnp.arange(num_classes, dtype=jnp.int32)[None, :, None, None]
    return _sums(jax.nn.softmax(full, axis=1), label[:, None] == classes, label, (2, 3))

  def strip(total: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return total + sums(planes, *inputs), None

  total, _ = jax.lax.scan(strip, jnp.zeros((3, batch, num_classes)), (row_matrix, labels))
  return _loss(total, smooth)


def reference_dice(logits: jax.Array, labels: jax.Array, *, smooth: float = 1.0) -> jax.Array:
  """`upsampled_dice` as it is defined."""
  full = jax.nn.softmax(resize_bilinear(logits.astype(jnp.float32), labels.shape[1:3]))
  num_classes = logits.shape[-1]
  members = labels[..., None] == jnp.arange(num_classes)
  sums = functools.partial(_sums, label=labels, axes=(1, 2), class_axis=-1)
  return _loss(sums(full, members), smooth)


def _sums(
  probability: jax.Array,
  members: jax.Array,
  label: jax.Array,
  axes: tuple[int, int],
  class_axis: int = 1,
) -> jax.Array:
  """`sum(p g)`, `sum(p^2)` and `sum(g)` over counted pixels, float32 (3, B, K)."""
  num_classes = probability.shape[class_axis]
  counted = jnp.expand_dims((label >= 0) & (label < num_classes), class_axis)
  overlap = jnp.sum(probability * members, axes)
  squares = jnp.sum(jnp.square(probability) * counted, axes)
  return jnp.stack([overlap, squares, jnp.sum(members, axes, dtype=jnp.float32)])


def _loss(sums: jax.Array, smooth: float) -> jax.Array:
  overlap, squares, sizes = sums
  return jnp.mean(1.0 - (2.0 * overlap + smooth) / (squares + sizes + smooth), axis=-1)
