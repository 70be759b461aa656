"""Evaluation batches of classification: the centre of each image, resized to one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.eval_batches import Batch, EvalBatches
from effseg_jax.input_pipeline.transforms_classification import resize_and_crop


class ClassificationEvalBatches(EvalBatches):
  """Resizes the short side and crops the centre; one size for all, so planning opens no image.

  A batch holds `image` uint8 (B, crop, crop, 3), `label` int32 (B,), `valid_size` int32 (B, 2),
  `index` int32 (B,) and `weight` float32 (B,).
  """

  def __init__(self, dataset: Any, *, resize: int, crop: int, **loading: Any):
    """Plans the batches.

    Args:
      dataset: of a classification task.
      resize: length of the short side.
      crop: side of the square that the network sees, `resize` at most.
      **loading: see `EvalBatches`.

    Raises:
      UserError: if the crop does not fit.
    """
    if crop > resize:
      raise UserError(f"eval.resize is {resize}; expected at least the crop's side, {crop}.")
    self._resize = resize
    super().__init__(dataset, {(crop, crop): range(len(dataset))}, **loading)

  def filler(self, shape: Any) -> Batch:
    """Black, of class 0."""
    return {
      "image": np.zeros((*shape, 3), np.uint8),
      "label": np.int32(0),
      "valid_size": np.array(shape, np.int32),
    }

  def prepare(self, example: Example, shape: Any) -> Batch:
    """The centre of the resized image."""
    image = resize_and_crop(example["image"], self._resize, shape[0])
    return {**self.filler(shape), "image": image, "label": example["label"]}


def classification_eval_batches(
  dataset: Any, options: Mapping[str, Any], **loading: Any
) -> ClassificationEvalBatches:
  """Batches for `options.resize` and `options.crop`."""
  return ClassificationEvalBatches(
    dataset, resize=options["resize"], crop=options["crop"], **loading
  )
