"""Evaluation batches of semantic segmentation: whole images, labels at their own size."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Mapping
from typing import Any

import cv2
import numpy as np

from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL, Example
from effseg_jax.input_pipeline.eval_batches import Batch, EvalBatches, SizeRule, image_sizes

# Labels of an evaluation batch are padded to a multiple of this, so that few shapes compile.
_LABEL_BUCKET = 64

INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


class SemanticEvalBatches(EvalBatches):
  """Whole images in batches of one network size, labels at their own size.

  A batch holds `image` uint8 (B, H, W, 3), `label` uint8 (B, Hb, Wb), `valid_size` and `label_size`
  int32 (B, 2), `index` int32 (B,) and `weight` float32 (B,); see docs/architecture.md.
  """

  def __init__(
    self,
    dataset: Any,
    size_rule: SizeRule,
    *,
    interpolation: str = "bilinear",
    num_threads: int = 4,
    **loading: Any,
  ):
    """Plans the batches from the images' headers.

    Args:
      dataset: with `image_size(index)`.
      size_rule: of the network's input.
      interpolation: of the images, "bilinear" or "bicubic" (OpenCV's).
      num_threads: that read and decode.
      **loading: see `EvalBatches`.
    """
    groups: dict[Hashable, list[int]] = collections.defaultdict(list)
    for index, size in enumerate(image_sizes(dataset, num_threads)):
      bucket = tuple(-(-length // _LABEL_BUCKET) * _LABEL_BUCKET for length in size)
      groups[size_rule(size), bucket].append(index)
    self._interpolation = INTERPOLATIONS[interpolation]
    super().__init__(dataset, groups, num_threads=num_threads, **loading)

  def filler(self, shape: Any) -> Batch:
    """Black, everything ignored."""
    size, bucket = shape
    return {
      "image": np.zeros((*size, 3), np.uint8),
      "label": np.full(bucket, IGNORE_LABEL, np.uint8),
      "valid_size": np.array(size, np.int32),
      "label_size": np.array(size, np.int32),
    }

  def prepare(self, example: Example, shape: Any) -> Batch:
    """The image resized, the label as it is."""
    size, _ = shape
    batch = self.filler(shape)
    rows, cols = example["label"].shape
    batch["image"] = cv2.resize(example["image"], size[::-1], interpolation=self._interpolation)
    batch["label"][:rows, :cols] = example["label"]
    batch["label_size"] = np.array((rows, cols), np.int32)
    return batch


def semantic_eval_batches(
  dataset: Any, options: Mapping[str, Any], **loading: Any
) -> SemanticEvalBatches:
  """Batches for `options.scale` and `options.multiple`, see `SizeRule`.

  `options.interpolation` may be left out.
  """
  rule = SizeRule(tuple(options["scale"]), options["multiple"])
  interpolation = options.get("interpolation", "bilinear")
  return SemanticEvalBatches(dataset, rule, interpolation=interpolation, **loading)
