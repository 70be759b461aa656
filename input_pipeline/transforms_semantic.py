"""The training transforms of semantic segmentation, with the rules of MMSegmentation 0.21."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL, Example
from effseg_jax.input_pipeline.mixing import Mix
from effseg_jax.input_pipeline.transforms import (
  HorizontalFlip,
  PhotometricDistortion,
  Rng,
  Transform,
  count_values,
  keep_ratio_size,
)


@dataclasses.dataclass(frozen=True)
class RandomScale:
  """Resizes, keeping the ratio, to fit a randomly scaled (long, short) frame.

  Attributes:
    scale: (long, short) side of the frame.
    ratio: the frame is multiplied by a uniform draw from this range.
  """

  scale: tuple[int, int]
  ratio: tuple[float, float]

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Image bilinear, label nearest."""
    ratio = rng.uniform(*self.ratio)
    frame = int(self.scale[0] * ratio), int(self.scale[1] * ratio)
    size = keep_ratio_size(example["image"].shape[:2], frame)
    return resize_example(example, size)


@dataclasses.dataclass(frozen=True)
class ClassBalancedCrop:
  """A random crop in which no class takes more than a share, if ten draws find one.

  Attributes:
    size: rows and columns; images smaller than that stay as they are along that side.
    max_share: the largest class's share of the labelled pixels must be below it.
  """

  size: tuple[int, int]
  max_share: float

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Draws up to ten times while the crop is unbalanced; the eleventh draw is taken as it is."""
    window = self._draw(example, rng)
    if self.max_share < 1.0:
      for _ in range(10):
        if self._balanced(example["label"][window]):
          break
        window = self._draw(example, rng)
    image, label = example["image"][window], example["label"][window]
    return {**example, "image": image, "label": label, "valid_size": _size(label)}

  def _draw(self, example: Example, rng: Rng) -> tuple[slice, slice]:
    spans = []
    for length, size in zip(example["label"].shape, self.size, strict=True):
      begin = int(rng.integers(0, max(length - size, 0) + 1))
      spans.append(slice(begin, begin + size))
    return spans[0], spans[1]

  def _balanced(self, label: np.ndarray) -> bool:
    counts = count_values(label)[:IGNORE_LABEL]
    return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.max_share


@dataclasses.dataclass(frozen=True)
class PadTo:
  """Pads right and bottom; the label with 255, and the image with what `valid_size` makes 0.

  Attributes:
    size: rows and columns of the result.
  """

  size: tuple[int, int]

  def __call__(self, example: Example, rng: Rng) -> Example:
    """`valid_size` keeps the size before padding."""
    del rng
    rows, cols = example["label"].shape
    below, right = self.size[0] - rows, self.size[1] - cols
    if not (below or right):
      return example
    image = cv2.copyMakeBorder(example["image"], 0, below, 0, right, cv2.BORDER_CONSTANT)
    label = cv2.copyMakeBorder(
      example["label"], 0, below, 0, right, cv2.BORDER_CONSTANT, value=IGNORE_LABEL
    )
    return {**example, "image": image, "label": label}


def semantic_transforms(
  *,
  scale: tuple[int, int],
  ratio: tuple[float, float],
  crop: tuple[int, int],
  max_class_share: float,
  flip: float,
  photometric: bool,
  mix: str = "",
  mix_probability: float = 0.5,
) -> list[Transform]:
  """The training transforms of semantic segmentation in the recipe's order.

  Args:
    scale: (long, short) frame of `RandomScale`.
    ratio: its range.
    crop: rows and columns of the crop, and of the result.
    max_class_share: of `ClassBalancedCrop`; 1: any crop will do.
    flip: probability of `HorizontalFlip`.
    photometric: whether `PhotometricDistortion` is applied.
    mix: `classmix` or `cutmix` to paste parts of a second example, see `mixing.Mix`; empty: not.
    mix_probability: of that.
  """
  return [
    RandomScale(tuple(scale), tuple(ratio)),
    ClassBalancedCrop(tuple(crop), max_class_share),
    HorizontalFlip(flip),
    *([PhotometricDistortion()] if photometric else []),
    PadTo(tuple(crop)),
    *([Mix(mix, mix_probability)] if mix else []),
  ]


def resize_example(example: Example, size: tuple[int, int]) -> Example:
  """Resizes image (bilinear) and label (nearest) to (rows, cols)."""
  if tuple(example["label"].shape) == tuple(size):
    return example
  cols_rows = (size[1], size[0])
  image = cv2.resize(example["image"], cols_rows, interpolation=cv2.INTER_LINEAR)
  label = cv2.resize(example["label"], cols_rows, interpolation=cv2.INTER_NEAREST)
  return {**example, "image": image, "label": label, "valid_size": _size(label)}


def _size(label: np.ndarray) -> np.ndarray:
  return np.array(label.shape, np.int32)
