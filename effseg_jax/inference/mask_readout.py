"""Reads a set of (class, mask) pairs in the original size of a picture, on the device.

`segment_batch` is a pure function to be jitted by the caller: sizes of pictures are data, and only
the canvas that holds the results is a shape. Masks at the original resolution exist for one strip
of rows at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops.mask_scores import class_scores
from effseg_jax.ops.resize import bilinear_matrix

Outputs = Mapping[str, Any]

# Rows of results worked on at a time.
_STRIP_ROWS = 32


@dataclasses.dataclass(frozen=True)
class MaskInference:
  """How a set of masks is read.

  Attributes:
    is_thing: per class, whether its objects are separate segments; other classes are merged into
      one segment, and are no instances.
    panoptic: whether panoptic results are made.
    instance: whether instances are made.
    semantic: whether class maps are made. On their own, class scores are computed at the network's
      resolution and then resized, as the official semantic models do it; beside the others, the
      mask logits are resized first.
    score_threshold: a query becomes a panoptic segment if its class probability is above it,
    overlap_threshold: and if other queries leave it at least this share of its mask.
    detections: instances per image, at most.
    stride: input pixels per mask logit, along both axes.
  """

  is_thing: tuple[bool, ...]
  panoptic: bool = True
  instance: bool = True
  semantic: bool = True
  score_threshold: float = 0.8
  overlap_threshold: float = 0.8
  detections: int = 100
  stride: int = 4


class Segmentations(NamedTuple):
  """Results of a batch on a canvas of (Hb, Wb); None for results that were not requested.

  Attributes:
    semantic: uint8 (B, Hb, Wb), class ids.
    panoptic: int32 (B, Hb, Wb), number of the segment, from 1 on; 0 for none.
    segment_classes: int32 (B, Q), the class of segment i + 1; -1 where there is no such segment.
    segment_scores: float32 (B, Q), the class probability of the query that gave segment i + 1.
    masks: uint8 (B, Q, Hb, Wb / 8), the mask of every query (logit above 0), eight pixels a byte as
      `numpy.packbits` does it.
    instance_queries: int32 (B, D), the query of each instance, by falling class probability.
    instance_classes: int32 (B, D); -1 where there is no instance.
    instance_scores: float32 (B, D), class probability times mean mask probability.
  """

  semantic: jax.Array | None
  panoptic: jax.Array | None
  segment_classes: jax.Array | None
  segment_scores: jax.Array | None
  masks: jax.Array | None
  instance_queries: jax.Array | None
  instance_classes: jax.Array | None
  instance_scores: jax.Array | None


def segment_batch(
  outputs: Outputs,
  valid_size: jax.Array,
  label_size: jax.Array,
  canvas: tuple[int, int],
  inference: MaskInference,
) -> Segmentations:
  """Reads a model's outputs in the original size of each picture (Mask2Former, section 3).

  Mask logits are resized to the padded input, cropped to the picture, and resized to its original
  size, as the official evaluation does; the two resizes are one matrix per axis.

  Args:
    outputs: `class_logits` (B, Q, K + 1) and `mask_logits` (B, Q, h, w).
    valid_size: int32 (B, 2), rows and columns of picture in the network's input.
    label_size: int32 (B, 2), rows and columns of the results.
    canvas: (Hb, Wb), at least every `label_size`, Wb a multiple of 8. What lies beyond a
      `label_size` is 0.
    inference: how.
  """
  one = functools.partial(_segment_one, canvas=canvas, inference=inference)
  return jax.vmap(one)(
    outputs["class_logits"].astype(jnp.float32),
    outputs["mask_logits"].astype(jnp.float32),
    valid_size,
    label_size,
  )


def _segment_one(
  class_logits: jax.Array,
  mask_logits: jax.Array,
  valid: jax.Array,
  label: jax.Array,
  *,
  canvas: tuple[int, int],
  inference: MaskInference,
) -> Segmentations:
  """`segment_batch` of one image."""
  probabilities = jax.nn.softmax(class_logits)
  together = inference.panoptic or inference.instance
  semantic = None
  if inference.semantic and not together:
    semantic = _semantic_first(
      probabilities[:, :-1], mask_logits, valid, label, canvas=canvas, stride=inference.stride
    )
  if not together:
    return Segmentations(semantic, *(None,) * 7)

  num_queries = class_logits.shape[0]
  height, width = canvas
  strips = -(-height // _STRIP_ROWS)
  rows, cols = label_matrices(
    mask_logits, valid, label, lengths=(strips * _STRIP_ROWS, width), inference=inference
  )
  inside_cols = jnp.arange(width) < label[1]

  def strip(sums: dict[str, jax.Array], inputs: tuple[jax.Array, jax.Array]):
    matrix, row_index = inputs
    inside = (row_index < label[0])[:, None] & inside_cols
    new, maps = read_strip(
      probabilities,
      mask_logits,
      (matrix, cols),
      inside,
      inference=inference,
      score_threshold=inference.score_threshold,
    )
    return {name: sums[name] + value for name, value in new.items()}, maps

  lines = jnp.arange(strips * _STRIP_ROWS).reshape(strips, _STRIP_ROWS)
  sums, maps = jax.lax.scan(
    strip, zero_sums(num_queries, inference), (rows.reshape(strips, _STRIP_ROWS, -1), lines)
  )

  if inference.semantic:
    semantic = maps["semantic"].reshape(-1, width)[:height]
  panoptic, masks = (None,) * 3, None
  instances = (None,) * 3
  if inference.panoptic:
    ids, *table = panoptic_segments(probabilities, sums, inference, inference.score_threshold)
    owner = maps["owner"].reshape(-1, width)[:height]
    panoptic = (jnp.append(ids, 0)[owner], *table)
  if inference.instance:
    masks = jnp.moveaxis(maps["masks"], 1, 0).reshape(num_queries, -1, width // 8)[:, :height]
    instances = top_instances(probabilities, sums, inference)
  return Segmentations(semantic, *panoptic, masks, *instances)


def label_matrices(
  mask_logits: jax.Array,
  valid: jax.Array,
  label: jax.Array,
  *,
  lengths: tuple[int, int],
  inference: MaskInference,
  first_row: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Both resizes, logits -> network's input -> picture, as one matrix along each axis.

  Args:
    mask_logits: (Q, h, w).
    valid: int32 (2,), rows and columns of picture in the network's input.
    label: int32 (2,), rows and columns of the result.
    lengths: rows and columns of the result that are wanted.
    inference: gives the stride.
    first_row: of them.

  Returns:
    float32 (lengths[0], h) and (lengths[1], w).
  """
  up_rows, up_cols = (
    bilinear_matrix(inference.stride * n, n).astype(np.float32) for n in mask_logits.shape[1:]
  )
  rows = _to_label(up_rows, valid[0], label[0], lengths[0], first_row)
  return rows, _to_label(up_cols, valid[1], label[1], lengths[1])


def zero_sums(num_queries: int, inference: MaskInference) -> dict[str, jax.Array]:
  """The sums of `read_strip` before the first strip."""
  zeros = jnp.zeros((num_queries,), jnp.int32)
  sums = {}
  if inference.panoptic:
    sums.update(mask_area=zeros, owned_area=zeros, area=zeros)
  if inference.instance:
    sums.update(foreground=zeros, confidence=zeros.astype(jnp.float32))
  return sums


def read_strip(
  probabilities: jax.Array,
  mask_logits: jax.Array,
  matrices: tuple[jax.Array, jax.Array],
  inside: jax.Array,
  *,
  inference: MaskInference,
  score_threshold: jax.Array | float,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Reads a strip of R rows and C columns at the picture's own resolution.

  Args:
    probabilities: float32 (Q, K + 1), of classes and of no object.
    mask_logits: float32 (Q, h, w).
    matrices: of `label_matrices`, (R, h) and (C, w).
    inside: bool (R, C), what belongs to the picture.
    inference: how.
    score_threshold: a query becomes a panoptic segment above it.

  Returns:
    Sums over strips, (Q,) each: `mask_area`, `owned_area` and `area` of panoptic segments,
    `foreground` and `confidence` of instances. And maps: `semantic` uint8 (R, C); `owner` (R, C),
    the query of each pixel or Q; `masks` uint8 (Q, R, C / 8), packed.
  """
  rows, cols = matrices
  num_queries = mask_logits.shape[0]
  logits = jnp.einsum("rh,qhw->qrw", rows, mask_logits, precision="highest")
  logits = jnp.einsum("qrw,cw->qrc", logits, cols, precision="highest")
  masks = jax.nn.sigmoid(logits)
  count = lambda where: jnp.sum(where & inside, (1, 2), dtype=jnp.int32)  # noqa: E731
  sums, maps = {}, {}
  if inference.semantic:
    class_map = jnp.argmax(class_scores(probabilities[:, :-1], masks), axis=0)
    maps["semantic"] = jnp.where(inside, class_map, 0).astype(jnp.uint8)
  if inference.panoptic:
    _, scores, kept = _kept_queries(probabilities, score_threshold)
    weighted = jnp.where(kept[:, None, None], scores[:, None, None] * masks, -1.0)
    owner = jnp.argmax(weighted, axis=0)
    solid = masks >= 0.5
    owned = owner == jnp.arange(num_queries)[:, None, None]
    sums["mask_area"], sums["owned_area"] = count(solid), count(owned)
    sums["area"] = count(solid & owned)
    visible = jnp.any(solid & owned, axis=0) & inside
    maps["owner"] = jnp.where(visible, owner, num_queries)
  if inference.instance:
    foreground = (logits > 0) & inside
    sums["foreground"] = count(foreground)
    sums["confidence"] = jnp.sum(jnp.where(foreground, masks, 0.0), (1, 2))
    maps["masks"] = jnp.packbits(foreground, axis=-1)
  return sums, maps


def _kept_queries(
  probabilities: jax.Array, score_threshold: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Per query its class, that class's probability, and whether it may become a segment."""
  scores, classes = jnp.max(probabilities, -1), jnp.argmax(probabilities, -1)
  no_object = probabilities.shape[1] - 1
  return classes, scores, (classes != no_object) & (scores > score_threshold)


def panoptic_segments(
  probabilities: jax.Array,
  sums: Mapping[str, jax.Array],
  inference: MaskInference,
  score_threshold: jax.Array | float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Numbers the segments in the order of their queries.

  Args:
    probabilities: float32 (Q, K + 1).
    sums: of `read_strip`, over all strips.
    inference: how.
    score_threshold: as in `read_strip`.

  Returns:
    Each query's segment number, 0 for none, int32 (Q,); and by number the class and the score.
  """
  classes, scores, kept = _kept_queries(probabilities, score_threshold)
  num_queries = classes.shape[0]
  visible = kept & (sums["area"] > 0)
  share = sums["owned_area"] / jnp.maximum(sums["mask_area"], 1)
  valid = visible & (share >= inference.overlap_threshold)
  thing = jnp.asarray(inference.is_thing)[jnp.minimum(classes, len(inference.is_thing) - 1)]
  # The first query of the same segment: itself for a thing, the first of its class for stuff.
  alike = (classes[:, None] == classes) & ~thing[:, None] & ~thing & valid[:, None] & valid
  index = jnp.arange(num_queries)
  first = jnp.where(thing, index, jnp.argmax(alike, axis=1))
  new = valid & (first == index)
  number = jnp.cumsum(new)
  ids = jnp.where(valid, number[first], 0)
  place = jnp.where(new, number - 1, num_queries)
  table = lambda fill, values: fill.at[place].set(values, mode="drop")  # noqa: E731
  segment_classes = table(jnp.full((num_queries,), -1, jnp.int32), classes.astype(jnp.int32))
  return ids, segment_classes, table(jnp.zeros((num_queries,), jnp.float32), scores)


def top_instances(
  probabilities: jax.Array, sums: Mapping[str, jax.Array], inference: MaskInference
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Query, class and score of the most probable (query, class) pairs, (D,) each.

  Args:
    probabilities: float32 (Q, K + 1).
    sums: of `read_strip`, over all strips.
    inference: how.
  """
  probabilities = probabilities[:, :-1]
  num_classes = probabilities.shape[1]
  count = min(inference.detections, probabilities.size)
  top, index = jax.lax.top_k(probabilities.ravel(), count)
  queries, classes = index // num_classes, index % num_classes
  confidence = sums["confidence"] / (sums["foreground"] + 1e-6)
  thing = jnp.asarray(inference.is_thing)[classes]
  return queries, jnp.where(thing, classes, -1), top * confidence[queries]


def _semantic_first(
  probabilities: jax.Array,
  mask_logits: jax.Array,
  valid: jax.Array,
  label: jax.Array,
  *,
  canvas: tuple[int, int],
  stride: int,
) -> jax.Array:
  """Class map, uint8 (Hb, Wb): scores at the network's size, then cropped and resized."""
  scores = network_scores(probabilities, mask_logits, stride)
  return class_map_of(scores, valid, label, canvas)


def class_map_of(
  scores: jax.Array, valid: jax.Array, label: jax.Array, canvas: tuple[int, int]
) -> jax.Array:
  """The class map of `network_scores`, uint8 (Hb, Wb); 0 outside the picture.

  Args:
    scores: (rows, K, cols) at the network's resolution.
    valid: int32 (2,), rows and columns of picture in them.
    label: int32 (2,), rows and columns of the result.
    canvas: (Hb, Wb).
  """
  strips = -(-canvas[0] // _STRIP_ROWS)
  first = jnp.arange(strips) * _STRIP_ROWS
  class_map = jax.lax.map(
    lambda row: label_strip(scores, valid, label, row, (_STRIP_ROWS, canvas[1])), first
  )
  class_map = class_map.reshape(-1, canvas[1])[: canvas[0]]
  rows, cols = (jnp.arange(n) < size for n, size in zip(canvas, label, strict=True))
  return jnp.where(rows[:, None] & cols, class_map, 0).astype(jnp.uint8)


def network_scores(probabilities: jax.Array, mask_logits: jax.Array, stride: int) -> jax.Array:
  """Class scores at the network's resolution, float32 (rows, K, cols); a few rows are added.

  Args:
    probabilities: float32 (Q, K), without that of no object.
    mask_logits: float32 (Q, h, w).
    stride: input pixels per mask logit.
  """
  h, w = mask_logits.shape[1:]
  strips = -(-stride * h // _STRIP_ROWS)
  up_rows = np.zeros((strips * _STRIP_ROWS, h), np.float32)
  up_rows[: stride * h] = bilinear_matrix(stride * h, h)
  up_cols = jnp.asarray(bilinear_matrix(stride * w, w), jnp.float32)

  def network_strip(matrix: jax.Array) -> jax.Array:
    logits = jnp.einsum("rh,qhw->qrw", matrix, mask_logits, precision="highest")
    logits = jnp.einsum("qrw,cw->qrc", logits, up_cols, precision="highest")
    return class_scores(probabilities, jax.nn.sigmoid(logits)).swapaxes(0, 1)

  scores = jax.lax.map(network_strip, jnp.asarray(up_rows).reshape(strips, _STRIP_ROWS, h))
  return scores.reshape(-1, *scores.shape[2:])


def label_strip(
  scores: jax.Array,
  valid: jax.Array,
  label: jax.Array,
  first_row: jax.Array,
  shape: tuple[int, int],
) -> jax.Array:
  """The classes of some rows of the picture, int (rows, cols), from `network_scores`.

  Args:
    scores: (rows, K, cols) at the network's resolution.
    valid: int32 (2,), rows and columns of picture in them.
    label: int32 (2,), rows and columns of the result.
    first_row: of the strip.
    shape: rows and columns of the strip.
  """
  top, bottom, down = _neighbours(valid[0], label[0], shape[0], first_row)
  left, right, along = _neighbours(valid[1], label[1], shape[1])
  rows = scores[top] * (1.0 - down)[:, None, None] + scores[bottom] * down[:, None, None]
  return jnp.argmax(rows[:, :, left] * (1.0 - along) + rows[:, :, right] * along, axis=1)


def _neighbours(
  valid: jax.Array, label: jax.Array, length: int, first: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of a resize from `valid` to `label` pixels: both neighbours, and the second one's weight."""
  position = (first + jnp.arange(length) + 0.5) * (valid / label) - 0.5
  position = jnp.clip(position, 0.0, (valid - 1).astype(jnp.float32))
  lower = jnp.floor(position).astype(jnp.int32)
  return lower, jnp.minimum(lower + 1, valid - 1), position - lower


def _to_label(
  up: np.ndarray, valid: jax.Array, label: jax.Array, length: int, first: jax.Array | int = 0
) -> jax.Array:
  """Both resizes along one axis as one matrix, float32 (length, logits).

  `up` goes from logits to the network's pixels, of which the first `valid` are resized to `label`.
  """
  lower, upper, weight = _neighbours(valid, label, length, first)
  up = jnp.asarray(up)
  return up[lower] * (1.0 - weight)[:, None] + up[upper] * weight[:, None]
