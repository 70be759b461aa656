"""From logits to a class for every pixel of the original image.

Everything here is a pure function of arrays, to be jitted by the caller. `forward` stands for the
model: normalised images (B, h, w, 3) float32 -> logits (B, h', w', K) of any resolution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.ops.resize import PYTORCH_CUBIC, cubic, resize_bilinear

Forward = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Inference:
  """How an image is evaluated.

  Attributes:
    mode: "whole", or "slide": windows of `crop` every `stride`, their logits averaged.
    crop: rows and columns of a window.
    stride: rows and columns between windows.
    scales: factors of the network's input size; class probabilities are averaged over them.
    flip: also average over the mirrored image.
    interpolation: of the logits: "bilinear", to the network's input and on to the original size; or
      "bicubic" (PyTorch's, a = -0.75), of whole images once, to the original size.
    scores: whether the network's outputs are scores, which are averaged over views as they are;
      otherwise they are logits, whose probabilities are.
  """

  mode: str = "whole"
  crop: tuple[int, int] = (512, 512)
  stride: tuple[int, int] = (341, 341)
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False
  interpolation: str = "bilinear"
  scores: bool = False


def forward_pass(model: nn.Module, task: Any, variables: Any) -> Forward:
  """The model as the functions here take it.

  Args:
    model: image -> outputs.
    task: with `pixel_scores`, which makes logits or scores of pixels of these.
    variables: of the model.
  """
  usable = getattr(task, "usable", lambda scores: scores)
  return lambda images: usable(
    task.pixel_scores(model.apply(variables, images, train=False), images.shape[1:3])
  )


def class_scores(
  forward: Forward,
  images: jax.Array,
  label_size: jax.Array,
  label_shape: tuple[int, int],
  inference: Inference,
) -> jax.Array:
  """Class scores at the original resolution.

  One view gives logits resized twice, to the network's input and to the original size, as the
  official evaluation does. Several views (scales, mirrored) give their mean softmax.

  Args:
    forward: the model.
    images: (B, h, w, 3) float32, normalised.
    label_size: int32 (B, 2), the original rows and columns.
    label_shape: (Hb, Wb), at least every `label_size`; scores beyond a `label_size` mean nothing.
    inference: how.

  Returns:
    float32 (B, Hb, Wb, K).
  """
  total, count = 0.0, num_views(inference)
  for logits in view_logits(forward, images, inference):
    scores = resize_to_labels(logits, label_size, label_shape, inference.interpolation)
    if count == 1:
      return scores
    total += (scores if inference.scores else jax.nn.softmax(scores)) / count
  return total


def num_views(inference: Inference) -> int:
  """Number of views of an image: scales, each optionally mirrored as well."""
  return len(inference.scales) * len(_flips(inference))


def view_logits(forward: Forward, images: jax.Array, inference: Inference) -> Iterator[jax.Array]:
  """Logits of each view, not mirrored any more, float32 (B, h_view, w_view, K)."""
  for scale in inference.scales:
    size = tuple(max(32, round(n * scale)) for n in images.shape[1:3])
    view = resize_bilinear(images, size)
    for flip in _flips(inference):
      logits = full_logits(forward, view[:, :, ::-1] if flip else view, inference)
      yield logits[:, :, ::-1] if flip else logits


def tile_classes(
  views: Sequence[jax.Array],
  row: jax.Array,
  label_size: jax.Array,
  origin: jax.Array,
  tile: tuple[int, int],
  *,
  averages_scores: bool = False,
) -> jax.Array:
  """`class_map` of one image, a tile at a time: any label size, one program, little memory.

  Args:
    views: of `view_logits`.
    row: int32, the image's place in the batch.
    label_size: int32 (2,), its original rows and columns.
    origin: int32 (2,), first row and column of the tile.
    tile: rows and columns; values beyond `label_size` are undefined.
    averages_scores: see `Inference.scores`.

  Returns:
    uint8 (tile rows, tile columns).
  """
  total = 0.0
  for logits in views:
    scores = jax.lax.dynamic_index_in_dim(logits, row, keepdims=False)
    for axis in (0, 1):
      scores = _take_lines(scores, axis, label_size[axis], tile[axis], origin[axis])
    if len(views) > 1 and not averages_scores:
      scores = jax.nn.softmax(scores)
    total += scores / len(views)
  return jnp.argmax(total, axis=-1).astype(jnp.uint8)


def class_map(
  forward: Forward,
  images: jax.Array,
  label_size: jax.Array,
  label_shape: tuple[int, int],
  inference: Inference,
) -> jax.Array:
  """The most likely class of every original pixel, int32 (B, Hb, Wb); see `class_scores`."""
  scores = class_scores(forward, images, label_size, label_shape, inference)
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def full_logits(forward: Forward, images: jax.Array, inference: Inference) -> jax.Array:
  """Logits at the images' own size, float32 (B, h, w, K), of the whole image or of windows.

  Those of whole images that are resized once come as they are.
  """
  if inference.mode == "whole":
    logits = forward(images).astype(jnp.float32)
    once = inference.interpolation == "bicubic"
    return logits if once else resize_bilinear(logits, images.shape[1:3])
  return _slide(forward, images, inference)


def resize_to_labels(
  logits: jax.Array,
  label_size: jax.Array,
  label_shape: tuple[int, int],
  interpolation: str = "bilinear",
) -> jax.Array:
  """Resizes each example to its own size, inside a common shape.

  The sizes are data and not shapes: images of many sizes share one program.

  Args:
    logits: (B, h, w, K).
    label_size: int32 (B, 2).
    label_shape: (Hb, Wb).
    interpolation: "bilinear" or "bicubic".

  Returns:
    (B, Hb, Wb, K); pixels beyond an example's size repeat its border.
  """
  if logits.shape[1:3] == tuple(label_shape):
    same = jnp.all(label_size == jnp.asarray(label_shape))
    return jax.lax.cond(
      same, lambda x: x, lambda x: _resize_each(x, label_size, label_shape, interpolation), logits
    )
  return _resize_each(logits, label_size, label_shape, interpolation)


def _resize_each(logits, label_size, label_shape, interpolation):
  lines = _take_lines if interpolation == "bilinear" else _take_lines_bicubic

  def one(image: jax.Array, size: jax.Array) -> jax.Array:
    for axis in (0, 1):
      image = lines(image, axis, size[axis], label_shape[axis])
    return image

  return jax.vmap(one)(logits, label_size)


def _take_lines_bicubic(x: jax.Array, axis: int, size: jax.Array, length: int) -> jax.Array:
  """`_take_lines`, bicubic: four neighbours, those beyond the ends replaced by the last ones."""
  source = x.shape[axis]
  position = (jnp.arange(length, dtype=jnp.float32) + 0.5) * (source / size) - 0.5
  lower = jnp.floor(position)
  shape = [1, 1, 1]
  shape[axis] = length
  total = 0.0
  for tap in range(-1, 3):
    index = jnp.clip(lower.astype(jnp.int32) + tap, 0, source - 1)
    weight = cubic(position - lower - tap, PYTORCH_CUBIC).reshape(shape)
    total += jnp.take(x, index, axis=axis) * weight
  return total


def _take_lines(
  x: jax.Array, axis: int, size: jax.Array, length: int, start: jax.Array | int = 0
) -> jax.Array:
  """Bilinear resize along one axis to a traced `size`: `length` lines of it from `start` on."""
  source = x.shape[axis]
  index = (start + jnp.arange(length)).astype(jnp.float32)
  position = jnp.clip((index + 0.5) * (source / size) - 0.5, 0.0, source - 1.0)
  lower = jnp.floor(position).astype(jnp.int32)
  upper = jnp.minimum(lower + 1, source - 1)
  shape = [1, 1, 1]
  shape[axis] = length
  weight = (position - lower).reshape(shape)
  low, high = jnp.take(x, lower, axis=axis), jnp.take(x, upper, axis=axis)
  return low + (high - low) * weight


def _slide(forward: Forward, images: jax.Array, inference: Inference) -> jax.Array:
  """Averages the logits of overlapping windows; the last of a row is moved back inside."""
  rows, cols = images.shape[1:3]
  crop = min(inference.crop[0], rows), min(inference.crop[1], cols)
  total, count = None, jnp.zeros((1, rows, cols, 1), jnp.float32)
  for top in _window_starts(rows, crop[0], inference.stride[0]):
    for left in _window_starts(cols, crop[1], inference.stride[1]):
      window = (slice(None), slice(top, top + crop[0]), slice(left, left + crop[1]))
      logits = resize_bilinear(forward(images[window]).astype(jnp.float32), crop)
      if total is None:
        total = jnp.zeros((*images.shape[:3], logits.shape[-1]), jnp.float32)
      total, count = total.at[window].add(logits), count.at[window].add(1.0)
  return total / count


def _window_starts(length: int, crop: int, stride: int) -> list[int]:
  windows = max(-(-(length - crop) // stride), 0) + 1
  return [min(i * stride, length - crop) for i in range(windows)]


def _flips(inference: Inference) -> tuple[bool, ...]:
  return (False, True) if inference.flip else (False,)
