"""Puts the masks of overlapping windows together to class scores of a whole picture."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from effseg_jax.inference.mask_readout import Outputs, class_map_of, network_scores


def window_scores(
  probabilities: jax.Array, mask_logits: jax.Array, starts: jax.Array, stride: int
) -> jax.Array:
  """The mean class scores of a grid of windows (EoMT's semantic evaluation).

  Args:
    probabilities: float32 (r, c, Q, K), without that of no object.
    mask_logits: float32 (r, c, Q, h, w), of r x c windows of (stride h, stride w) pixels.
    starts: int32 (r, c, 2), the row and the column at which each window begins.
    stride: pixels per mask logit.

  Returns:
    float32 (r * rows, K, c * cols) for windows of rows x cols pixels; what lies behind the last
    window means nothing.
  """
  grid_rows, grid_cols = starts.shape[:2]
  rows, cols = (stride * n for n in mask_logits.shape[-2:])
  lines = jnp.arange(grid_rows * rows), jnp.arange(grid_cols * cols)
  total, count = 0.0, 0.0
  for i in range(grid_rows):
    for j in range(grid_cols):
      scores = network_scores(probabilities[i, j], mask_logits[i, j], stride)[:rows]
      (top, inside_rows), (left, inside_cols) = (
        (jnp.clip(line - start, 0, size - 1), (line >= start) & (line < start + size))
        for line, start, size in zip(lines, starts[i, j], (rows, cols), strict=True)
      )
      inside = (inside_rows[:, None] & inside_cols).astype(jnp.float32)[:, None]
      total += scores[top][:, :, left] * inside
      count += inside
  return total / jnp.maximum(count, 1.0)


def window_class_maps(
  outputs: Outputs,
  valid_size: jax.Array,
  label_size: jax.Array,
  canvas: tuple[int, int],
  stride: int,
) -> jax.Array:
  """Class maps of a batch of pictures that were seen in windows.

  Args:
    outputs: `class_logits` (B, r, c, Q, K + 1), `mask_logits` (B, r, c, Q, h, w) and `starts` int32
      (B, r, c, 2).
    valid_size: int32 (B, 2), rows and columns of the picture that the windows were cut from.
    label_size: int32 (B, 2), rows and columns of the results.
    canvas: (Hb, Wb), at least every `label_size`.
    stride: pixels per mask logit.

  Returns:
    uint8 (B, Hb, Wb); 0 outside a `label_size`.
  """

  def one(
    logits: jax.Array, masks: jax.Array, starts: jax.Array, valid: jax.Array, label: jax.Array
  ):
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))[..., :-1]
    scores = window_scores(probabilities, masks.astype(jnp.float32), starts, stride)
    return class_map_of(scores, valid, label, canvas)

  arrays = (outputs[name] for name in ("class_logits", "mask_logits", "starts"))
  return jax.vmap(one)(*arrays, valid_size, label_size)
