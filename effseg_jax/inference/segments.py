"""From a model's set of (class, mask) pairs to one panoptic, instance or semantic result per image.

The names and results are those of Hugging Face's Mask2Former; the computation is
that of the official evaluation (see `tasks.mask_readout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.inference.mask_readout import (
  MaskInference,
  Outputs,
  Segmentations,
  segment_batch,
)
from effseg_jax.inference.windows import window_class_maps

# Canvas sides are multiples of this, so that few shapes compile.
_CANVAS_MULTIPLE = 64


def post_process_panoptic(
  outputs: Outputs,
  target_sizes: Sequence[tuple[int, int]],
  thresholds: tuple[float, float] = (0.8, 0.8),
  *,
  is_thing: Sequence[bool] | None = None,
  valid_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Any]]:
  """Panoptic segmentation of each image.

  Args:
    outputs: of a universal model, B images.
    target_sizes: B times (rows, cols) of the result.
    thresholds: of the class probability above which a query becomes a segment, and of the share of
      its mask that other queries leave to it.
    is_thing: per class; segments of the others are merged. Default: none is merged.
    valid_sizes: B times (rows, cols) of picture in the network's input, which may have been padded
      right and bottom; default: all of it.

  Returns:
    Per image `segmentation`, int32 (rows, cols), the number of the segment of each pixel or 0; and
    `segments_info`, a list of `id`, `label_id` (the class), `is_thing` and `score`.

  Raises:
    UserError: if there are not as many sizes as images.
  """
  things = _things(outputs, is_thing)
  inference = MaskInference(
    things,
    instance=False,
    semantic=False,
    score_threshold=thresholds[0],
    overlap_threshold=thresholds[1],
  )
  found = segment_on_host(outputs, target_sizes, valid_sizes, inference)
  return [panoptic_result(found, i, size, things) for i, size in enumerate(target_sizes)]


def post_process_instance(
  outputs: Outputs,
  target_sizes: Sequence[tuple[int, int]],
  *,
  is_thing: Sequence[bool] | None = None,
  detections: int = 100,
  valid_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, np.ndarray]]:
  """Instances of each image, the most probable first; arguments as in `post_process_panoptic`.

  Args:
    outputs: of a universal model, B images.
    target_sizes: B times (rows, cols) of the result.
    is_thing: per class; the others have no instances. Default: all have.
    detections: that are looked at per image.
    valid_sizes: B times (rows, cols) of picture in the network's input.

  Returns:
    Per image `scores` float32 (D,), `labels` int32 (D,) and `masks` bool (D, rows, cols).

  Raises:
    UserError: if there are not as many sizes as images.
  """
  inference = MaskInference(
    _things(outputs, is_thing), panoptic=False, semantic=False, detections=detections
  )
  found = segment_on_host(outputs, target_sizes, valid_sizes, inference)
  return [instance_result(found, i, size) for i, size in enumerate(target_sizes)]


def post_process_semantic(
  outputs: Outputs,
  target_sizes: Sequence[tuple[int, int]],
  *,
  valid_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[np.ndarray]:
  """The class of every pixel, uint8 (rows, cols) per image; as `post_process_panoptic`."""
  inference = MaskInference(_things(outputs, None), panoptic=False, instance=False)
  found = segment_on_host(outputs, target_sizes, valid_sizes, inference)
  return [found.semantic[i, : size[0], : size[1]] for i, size in enumerate(target_sizes)]


def panoptic_result(
  found: Segmentations, index: int, size: Sequence[int], is_thing: Sequence[bool]
) -> dict[str, Any]:
  """One image of a batch of host arrays, as `post_process_panoptic` returns it."""
  classes, scores = found.segment_classes[index], found.segment_scores[index]
  segments = [
    {
      "id": number + 1,
      "label_id": int(classes[number]),
      "is_thing": bool(is_thing[classes[number]]),
      "score": float(scores[number]),
    }
    for number in range(np.count_nonzero(classes >= 0))
  ]
  rows, cols = size
  return {"segmentation": found.panoptic[index, :rows, :cols], "segments_info": segments}


def instance_result(found: Segmentations, index: int, size: Sequence[int]) -> dict[str, np.ndarray]:
  """One image of a batch of host arrays, as `post_process_instance` returns it."""
  which = found.instance_classes[index] >= 0
  queries = found.instance_queries[index][which]
  rows, cols = size
  masks = np.unpackbits(found.masks[index][queries, :rows], axis=-1, count=cols)
  return {
    "scores": found.instance_scores[index][which],
    "labels": found.instance_classes[index][which],
    "masks": masks.view(bool),
  }


_segment_batch_jitted = jax.jit(segment_batch, static_argnames=("canvas", "inference"))
_window_class_maps_jitted = jax.jit(window_class_maps, static_argnames=("canvas", "stride"))


def segment_on_host(
  outputs: Outputs,
  target_sizes: Sequence[Sequence[int]],
  valid_sizes: Sequence[Sequence[int]] | None,
  inference: MaskInference,
) -> Segmentations:
  """`segment_batch` for sizes and results on the host.

  Args:
    outputs: of a universal model, B images; or of their windows, see `window_class_maps`.
    target_sizes: B times (rows, cols) of the results.
    valid_sizes: B times (rows, cols) of picture in the network's input; None: all of it.
    inference: how masks are read.

  Returns:
    Host arrays, on a canvas that is as large as the largest picture or a little larger.

  Raises:
    UserError: if there are not as many sizes as images.
  """
  batch, h, w = (outputs["mask_logits"].shape[axis] for axis in (0, -2, -1))
  if valid_sizes is None:
    valid_sizes = [(inference.stride * h, inference.stride * w)] * batch
  for name, sizes in (("target_sizes", target_sizes), ("valid_sizes", valid_sizes)):
    if len(sizes) != batch:
      raise UserError(f"{name} has {len(sizes)} entries; the outputs are of {batch} images.")
  canvas = canvas_for(target_sizes)
  names = [name for name in ("class_logits", "mask_logits", "starts") if name in outputs]
  arguments = (
    {name: outputs[name] for name in names},
    jnp.asarray(valid_sizes, jnp.int32),
    jnp.asarray(target_sizes, jnp.int32),
  )
  if "starts" in outputs:
    found = _window_class_maps_jitted(*arguments, canvas=canvas, stride=inference.stride)
    return Segmentations(jax.device_get(found), *(None,) * 7)
  return jax.device_get(_segment_batch_jitted(*arguments, canvas=canvas, inference=inference))


def canvas_for(sizes: Sequence[Sequence[int]]) -> tuple[int, int]:
  """The canvas of `segment_batch` for these sizes; rounded up, so that few shapes compile."""
  rows, cols = np.max(np.asarray(sizes), axis=0)
  rows, cols = (-(-int(n) // _CANVAS_MULTIPLE) * _CANVAS_MULTIPLE for n in (rows, cols))
  return rows, cols


def _things(outputs: Outputs, is_thing: Sequence[bool] | None) -> tuple[bool, ...]:
  num_classes = outputs["class_logits"].shape[-1] - 1
  return (True,) * num_classes if is_thing is None else tuple(map(bool, is_thing))
