"""Evaluation batches of universal segmentation: resized by the short side, padded to few sizes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.eval_batches import Batch, EvalBatches, image_sizes
from effseg_jax.input_pipeline.transforms_universal import resize_image, shortest_edge_size


@dataclasses.dataclass(frozen=True)
class ShortestEdgeRule:
  """The size at which the network sees an image, and that of the array it comes in.

  Attributes:
    short_side: length of the short side; 0: the image stays as it is.
    max_size: limit of the long side.
    multiple: the sides of the array are multiples of this.
  """

  short_side: int
  max_size: int
  multiple: int

  def image(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the image -> (rows, cols) it is resized to."""
    if not self.short_side:
      return size
    return shortest_edge_size(size, self.short_side, self.max_size)

  def array(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the image -> (rows, cols) of the padded array."""
    rows, cols = (-(-side // self.multiple) * self.multiple for side in self.image(size))
    return rows, cols


class UniversalEvalBatches(EvalBatches):
  """Whole images in batches of one padded size; the ground truth stays in the data set.

  A batch holds `image` uint8 (B, H, W, 3), padded right and bottom with 0; `valid_size` int32
  (B, 2), the rows and columns that are picture; `label_size` int32 (B, 2), the original ones;
  `index` int32 (B,), for the data set's `ground_truth`; and `weight` float32 (B,).
  """

  def __init__(self, dataset: Any, rule: ShortestEdgeRule, *, num_threads: int = 4, **loading: Any):
    """Plans the batches from the images' sizes.

    Args:
      dataset: with `image_size(index)`.
      rule: of sizes.
      num_threads: that read and decode.
      **loading: see `EvalBatches`.
    """
    self._rule = rule
    groups: dict[Hashable, list[int]] = collections.defaultdict(list)
    for index, size in enumerate(image_sizes(dataset, num_threads)):
      groups[rule.array(size)].append(index)
    super().__init__(dataset, groups, num_threads=num_threads, **loading)

  def filler(self, shape: Any) -> Batch:
    """Black; its sizes are those of the array."""
    return {
      "image": np.zeros((*shape, 3), np.uint8),
      "valid_size": np.array(shape, np.int32),
      "label_size": np.array(shape, np.int32),
    }

  def prepare(self, example: Example, shape: Any) -> Batch:
    """The image resized and padded."""
    batch = self.filler(shape)
    size = example["image"].shape[:2]
    rows, cols = self._rule.image(size)
    batch["image"][:rows, :cols] = resize_image(example["image"], (rows, cols))
    batch["valid_size"] = np.array((rows, cols), np.int32)
    batch["label_size"] = np.array(size, np.int32)
    return batch


def universal_eval_batches(
  dataset: Any, options: Mapping[str, Any], **loading: Any
) -> UniversalEvalBatches:
  """Batches for `options.short_side`, `options.max_size` and `options.multiple`.

  Raises:
    UserError: for sizes that make no sense.
  """
  rule = ShortestEdgeRule(options["short_side"], options["max_size"], options["multiple"])
  if rule.multiple < 1 or rule.short_side < 0 or (rule.short_side and rule.max_size < 1):
    raise UserError(
      f"eval.short_side, max_size and multiple are {rule.short_side}, {rule.max_size} and"
      f" {rule.multiple}; expected lengths in pixels, a short_side of 0 for images as they are."
    )
  return UniversalEvalBatches(dataset, rule, **loading)
