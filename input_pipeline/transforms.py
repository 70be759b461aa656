"""The augmentations of the segmentation recipes, each a small function object with its own rng.

All take and return an example (see docs/architecture.md) and leave the one they were given alone.
The rules are those of MMSegmentation 0.21, which the official AFFormer recipe uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL, Example

_IDENTITY = np.arange(256, dtype=np.uint8)

Rng = np.random.Generator
Transform = Callable[[Example, Rng], Example]


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
class HorizontalFlip:
  """Mirrors the image and its label.

  Attributes:
    probability: of mirroring.
  """

  probability: float = 0.5

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Mirrors both or neither."""
    if rng.random() >= self.probability:
      return example
    # Twenty times faster than the copy that a view of negative strides would need later.
    return {**example, **{key: cv2.flip(example[key], 1) for key in ("image", "label")}}


@dataclasses.dataclass(frozen=True)
class PhotometricDistortion:
  """Random brightness, contrast, saturation and hue, each with probability one half.

  Contrast comes before or after saturation and hue, by a coin. Every operation clips and rounds
  down to uint8, so that the result is that of the recipe.

  Attributes:
    brightness: added, uniform in plus or minus this.
    contrast: factor's range.
    saturation: factor's range, on S of HSV.
    hue: added to H of HSV in OpenCV's half degrees, an integer in [-hue, hue).
  """

  brightness: float = 32.0
  contrast: tuple[float, float] = (0.5, 1.5)
  saturation: tuple[float, float] = (0.5, 1.5)
  hue: int = 18

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Changes the image alone."""
    before, after = _IDENTITY, _IDENTITY
    if rng.random() < 0.5:
      before = linear_table(1.0, rng.uniform(-self.brightness, self.brightness))
    contrast_first = rng.random() < 0.5
    if contrast_first:
      before = _then(before, self._contrast(rng))
    saturate = rng.uniform(*self.saturation) if rng.random() < 0.5 else None
    shift = int(rng.integers(-self.hue, self.hue)) if rng.random() < 0.5 else None
    if not contrast_first:
      after = self._contrast(rng)
    image = example["image"]
    if saturate is None and shift is None:  # tables that follow one another are one table
      return {**example, "image": _look_up(image, _then(before, after))}
    image = _change_hsv(_look_up(image, before), saturate, shift)
    return {**example, "image": _look_up(image, after)}

  def _contrast(self, rng: Rng) -> np.ndarray:
    return linear_table(rng.uniform(*self.contrast), 0.0) if rng.random() < 0.5 else _IDENTITY


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
  from effseg_jax.input_pipeline.mixing import Mix  # which is made of these transforms

  return [
    RandomScale(tuple(scale), tuple(ratio)),
    ClassBalancedCrop(tuple(crop), max_class_share),
    HorizontalFlip(flip),
    *([PhotometricDistortion()] if photometric else []),
    PadTo(tuple(crop)),
    *([Mix(mix, mix_probability)] if mix else []),
  ]


def keep_ratio_size(size: Sequence[int], frame: Sequence[int]) -> tuple[int, int]:
  """The largest size of the same ratio inside a (long, short) frame, rounded half up.

  Args:
    size: rows and columns.
    frame: (long, short) side.

  Returns:
    rows and columns.
  """
  factor = min(max(frame) / max(size), min(frame) / min(size))
  return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def resize_example(example: Example, size: tuple[int, int]) -> Example:
  """Resizes image (bilinear) and label (nearest) to (rows, cols)."""
  if tuple(example["label"].shape) == tuple(size):
    return example
  cols_rows = (size[1], size[0])
  image = cv2.resize(example["image"], cols_rows, interpolation=cv2.INTER_LINEAR)
  label = cv2.resize(example["label"], cols_rows, interpolation=cv2.INTER_NEAREST)
  return {**example, "image": image, "label": label, "valid_size": _size(label)}


def linear_uint8(image: np.ndarray, factor: float, offset: float) -> np.ndarray:
  """`clip(image * factor + offset, 0, 255)`, rounded down, by a table of the 256 values."""
  return cv2.LUT(image, linear_table(factor, offset))


def linear_table(factor: float, offset: float) -> np.ndarray:
  """What `linear_uint8` makes of each value: uint8 (256,)."""
  values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
  return np.clip(values, 0, 255).astype(np.uint8)


def count_values(label: np.ndarray) -> np.ndarray:
  """How often each value is in a uint8 array (H, W): float32 (256,), exact below 2^24 pixels."""
  return cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()


def _then(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """One table for two that are applied one after the other."""
  return first if second is _IDENTITY else second[first]


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
  return image if table is _IDENTITY else cv2.LUT(image, table)


def _change_hsv(image: np.ndarray, saturate: float | None, shift: int | None) -> np.ndarray:
  """Multiplies S and shifts H; each goes through uint8 RGB once, as the recipe's steps do."""
  if saturate is not None:
    image = _change_channel(image, 1, linear_table(saturate, 0.0))
  if shift is not None:
    image = _change_channel(image, 0, ((np.arange(256) + shift) % 180).astype(np.uint8))
  return image


def _change_channel(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
  """Applies a table to one channel of the HSV form of an RGB image."""
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  values = cv2.LUT(cv2.extractChannel(hsv, channel), table)
  return cv2.cvtColor(cv2.insertChannel(values, hsv, channel), cv2.COLOR_HSV2RGB)


def _size(label: np.ndarray) -> np.ndarray:
  return np.array(label.shape, np.int32)
