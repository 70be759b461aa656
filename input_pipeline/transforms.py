"""Training transforms that several tasks share.

A transform takes an example (see docs/architecture.md) and a random generator, and returns a new
example. The colour rules are those of MMSegmentation 0.21, which the official AFFormer recipe uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from effseg_jax.input_pipeline.datasets.base import Example

_IDENTITY = np.arange(256, dtype=np.uint8)

Rng = np.random.Generator
Transform = Callable[[Example, Rng], Example]


@dataclasses.dataclass(frozen=True)
class HorizontalFlip:
  """Mirrors arrays of an example left to right, all of them or none.

  Attributes:
    probability: of mirroring.
    axes: name of each array that is mirrored, and its axis of columns.
  """

  probability: float = 0.5
  axes: tuple[tuple[str, int], ...] = (("image", 1), ("label", 1))

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Draws one number."""
    if rng.random() >= self.probability:
      return example
    return {**example, **{key: _mirrored(example[key], axis) for key, axis in self.axes}}


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


def keep_ratio_size(size: Sequence[int], frame: Sequence[int]) -> tuple[int, int]:
  """The largest size of the same ratio inside a (long, short) frame, rounded half up, 1 at least.

  Args:
    size: rows and columns.
    frame: (long, short) side.

  Returns:
    rows and columns.
  """
  factor = min(max(frame) / max(size), min(frame) / min(size))
  return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def linear_table(factor: float, offset: float) -> np.ndarray:
  """`clip(value * factor + offset, 0, 255)`, rounded down, of each value: uint8 (256,)."""
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


def _mirrored(array: Any, axis: int) -> Any:
  if axis == 1:  # twenty times faster than the copy that a view of negative strides needs later
    return cv2.flip(array, 1)
  return array[(slice(None),) * axis + (slice(None, None, -1),)]
