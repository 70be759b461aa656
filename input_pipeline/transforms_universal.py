"""The augmentations of Mask2Former's and EoMT's recipes, each with its own rng.

A segment map holds the number of the segment at each pixel, so an example of 100 targets costs a
byte a pixel where binary masks cost a hundred: at 1024x1024 and one layer, 3 MiB of image, 1 MiB
of segments and 4 bytes a label. Pillow resizes, as in the recipe: unlike OpenCV's, its bilinear
filter averages when it shrinks. The padding of 128 is part of the picture (it is normalised, and
points are sampled there), so `valid_size` is the whole array unless `PadTo` sets it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.datasets.mask_runs import MaskRuns
from effseg_jax.input_pipeline.datasets.panoptic import NO_SEGMENT, stack_layers
from effseg_jax.input_pipeline.transforms import (
  HorizontalFlip,
  PhotometricDistortion,
  Rng,
  Transform,
)

_PAD_VALUE = 128


MIRRORED = (("image", 1), ("segments", 2))


@dataclasses.dataclass(frozen=True)
class LargeScaleJitter:
  """Resizes to fit a randomly scaled frame, keeping the ratio.

  Attributes:
    frame: rows and columns at scale 1.
    scale: range of the uniform scale.
    round_down: whether sides are rounded down, as in EoMT's recipe, or to the nearest pixel.
  """

  frame: tuple[int, int]
  scale: tuple[float, float]
  round_down: bool = False

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Image bilinear, segments nearest."""
    scale = rng.uniform(*self.scale)
    size = example["image"].shape[:2]
    factor = min(scale * side / length for side, length in zip(self.frame, size, strict=True))
    to_pixels = int if self.round_down else round
    rows, cols = (max(to_pixels(length * factor), 1) for length in size)
    return resize(example, (rows, cols))


@dataclasses.dataclass(frozen=True)
class ColourJitter:
  """Random brightness, contrast, saturation and hue as torchvision has them, each by a coin.

  Brightness and contrast are factors about black and about the mean grey value, saturation about
  each pixel's own. Contrast comes before or after the other two, by a coin.

  Attributes:
    brightness: factors lie within 1 plus or minus this.
    contrast: range of factors.
    saturation: range of factors.
    hue: in degrees, plus or minus.
  """

  brightness: float = 32 / 255
  contrast: tuple[float, float] = (0.5, 1.5)
  saturation: tuple[float, float] = (0.5, 1.5)
  hue: float = 18.0

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Changes the image alone."""
    image = Image.fromarray(example["image"])
    enhance = lambda image, kind, span: (  # noqa: E731
      kind(image).enhance(rng.uniform(*span)) if rng.random() < 0.5 else image
    )
    image = enhance(image, ImageEnhance.Brightness, (1 - self.brightness, 1 + self.brightness))
    contrast_first = rng.random() < 0.5
    if contrast_first:
      image = enhance(image, ImageEnhance.Contrast, self.contrast)
    image = enhance(image, ImageEnhance.Color, self.saturation)
    if rng.random() < 0.5:
      hsv = np.array(image.convert("HSV"))
      hsv[..., 0] += np.uint8(round(rng.uniform(-self.hue, self.hue) / 360 * 256) % 256)
      image = Image.fromarray(hsv, "HSV").convert("RGB")
    if not contrast_first:
      image = enhance(image, ImageEnhance.Contrast, self.contrast)
    return {**example, "image": np.asarray(image)}


@dataclasses.dataclass(frozen=True)
class UntilNotEmpty:
  """Steps that are tried again, from the start, while they leave no segment in the picture.

  Attributes:
    steps: that are tried.
    tries: after so many, an empty example is taken as it is.
  """

  steps: tuple[Transform, ...]
  tries: int = 20

  def __call__(self, example: Example, rng: Rng) -> Example:
    """The first result with a segment."""
    for _ in range(self.tries):
      found = example
      for step in self.steps:
        found = step(found, rng)
      if (found["segments"] != NO_SEGMENT).any():
        break
    return found


@dataclasses.dataclass(frozen=True)
class ResizeShortestEdge:
  """Resizes the short side to one of several lengths, keeping the ratio.

  Attributes:
    lengths: to choose from.
    max_size: of the long side.
  """

  lengths: tuple[int, ...]
  max_size: int

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Image bilinear, segments nearest."""
    length = self.lengths[rng.integers(len(self.lengths))]
    return resize(example, shortest_edge_size(example["image"].shape[:2], length, self.max_size))


@dataclasses.dataclass(frozen=True)
class Crop:
  """Crops a random window; a side that is shorter than the window is unchanged.

  Attributes:
    size: rows and columns of the window.
    one_draw: whether one random number places the window along both sides, as in the recipe of
      large-scale jitter: it then moves on the diagonal.
  """

  size: tuple[int, int]
  one_draw: bool = False

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Crops image and segments."""
    room = [
      max(length - side, 0)
      for length, side in zip(example["image"].shape[:2], self.size, strict=True)
    ]
    if self.one_draw:
      draw = rng.random()
      top, left = (round(length * draw) for length in room)
    else:
      top, left = (int(rng.integers(length + 1)) for length in room)
    window = np.s_[top : top + self.size[0], left : left + self.size[1]]
    image, segments = example["image"][window], example["segments"][:, *window]
    return {**example, "image": image, "segments": segments}


@dataclasses.dataclass(frozen=True)
class PadTo:
  """Pads right and bottom, the image with 128 and the segments with none.

  Attributes:
    size: rows and columns of the result; what is larger stays so.
    as_picture: whether the padding is part of the picture, as in the recipes. If not, it is what
      the padding of an evaluation is: no picture, and 0 after the normalisation.
    value: of the image's padding.
  """

  size: tuple[int, int]
  as_picture: bool = True
  value: int = _PAD_VALUE

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Pads smaller examples."""
    del rng
    rows, cols = example["image"].shape[:2]
    if not self.as_picture:
      example = {**example, "picture_size": (rows, cols)}
    below, right = max(self.size[0] - rows, 0), max(self.size[1] - cols, 0)
    if not (below or right):
      return example
    image = cv2.copyMakeBorder(
      example["image"], 0, below, 0, right, cv2.BORDER_CONSTANT, value=(self.value,) * 3
    )
    segments = example["segments"]
    if isinstance(segments, MaskRuns):
      return {**example, "image": image, "segments": segments.padded(self.size)}
    padding = ((0, 0), (0, below), (0, right))
    segments = np.pad(segments, padding, constant_values=NO_SEGMENT)
    return {**example, "image": image, "segments": segments}


@dataclasses.dataclass(frozen=True)
class PackSegments:
  """Gives segments and labels the fixed shapes of a batch.

  Where there are more segments than room, the largest are kept. None at all is fine: the example
  then teaches that there is nothing.

  Attributes:
    max_segments: N, length of the labels.
    layers: L, of the segment map.
    keep_empty: whether a segment without a pixel, after a crop, is still a target. So it is in
      Mask2Former's panoptic recipes; in those for instances and for classes it is not.
  """

  max_segments: int
  layers: int
  keep_empty: bool

  def __call__(self, example: Example, rng: Rng) -> Example:
    """The batch's arrays for one example.

    Returns:
      `image` uint8 (H, W, 3); `valid_size` int32 (2,); `segments` uint8 (L, H, W), 255 for none;
      `labels` int32 (N,), -1 for padding; `dropped_segments` int32 (), the number of omitted
      segments.
    """
    del rng
    labels, segments = example["labels"], example["segments"]
    dropped = example.get("dropped_segments", 0)
    if isinstance(segments, MaskRuns):
      segments, labels, unseen = self._draw(segments, labels)
      dropped += unseen
    areas = _histogram(segments)[: len(labels)]
    by_area = np.argsort(-areas, kind="stable")
    wanted = by_area if self.keep_empty else by_area[areas[by_area] > 0]
    kept = wanted[: self.max_segments]
    segments, kept = self._fit_layers(segments, areas, kept)
    kept = np.sort(kept)
    places = np.full(NO_SEGMENT + 1, NO_SEGMENT, np.uint8)
    places[kept] = np.arange(len(kept))
    packed = np.full(self.max_segments, -1, np.int32)
    packed[: len(kept)] = labels[kept]
    return {
      "image": example["image"],
      "valid_size": np.array(example.get("picture_size", example["image"].shape[:2]), np.int32),
      "segments": cv2.LUT(np.ascontiguousarray(segments), places),
      "labels": packed,
      "dropped_segments": np.int32(dropped + len(wanted) - len(kept)),
    }

  def _draw(self, runs: MaskRuns, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Draws masks that are run lengths at the size that they have become, as L layers.

    Returns:
      uint8 (L, H, W), the labels of the masks in it, and the number of omitted segments.
    """
    packed = [np.packbits(mask) for mask in runs.masks()]
    count = runs.extent[0] * runs.extent[1]
    areas = np.array([int(np.unpackbits(bits, count=count).sum()) for bits in packed], np.int64)
    order = np.argsort(-areas, kind="stable")
    masks = (np.unpackbits(packed[row], count=count).reshape(runs.extent) > 0 for row in order)
    layers = stack_layers(masks, runs.extent, self.layers)
    placed = np.zeros(len(order) + 1, bool)
    placed[layers] = True
    keep = placed[:-1] | ((areas[order] == 0) & self.keep_empty)
    unseen = int(((areas[order] > 0) & ~keep).sum())
    kept = np.flatnonzero(keep)[:NO_SEGMENT]
    places = np.full(len(order) + 1, NO_SEGMENT, np.uint8)
    places[kept] = np.arange(len(kept))
    return places[layers], labels[order[kept]], unseen

  def _fit_layers(
    self, segments: np.ndarray, areas: np.ndarray, kept: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Fits a segment map into L layers; returns it, and which segments were kept.

    Args:
      segments: uint8 (any, H, W).
      areas: of all segments.
      kept: segments, the largest first.
    """
    if len(segments) <= self.layers:
      return self._add_layers(segments), kept
    visible = kept[areas[kept] > 0]
    masks = ((segments == row).any(axis=0) for row in visible)
    rows = stack_layers(masks, segments.shape[1:], self.layers)
    found = np.zeros(len(visible) + 1, bool)
    found[rows] = True  # the last place takes the -1 of pixels without a segment
    stacked = np.append(visible, NO_SEGMENT).astype(np.uint8)[rows]
    fitted = np.concatenate([visible[found[:-1]], kept[areas[kept] == 0]])
    return self._add_layers(stacked), fitted

  def _add_layers(self, segments: np.ndarray) -> np.ndarray:
    missing = self.layers - len(segments)
    return np.pad(segments, ((0, missing), (0, 0), (0, 0)), constant_values=NO_SEGMENT)


def universal_transforms(
  *,
  kind: str,
  crop: Sequence[int],
  max_segments: int,
  layers: int = 1,
  keep_empty: bool = False,
  flip: float = 0.5,
  scale: Sequence[float] = (0.1, 2.0),
  short_side: int = 0,
  photometric: bool = True,
  pad_as_picture: bool = True,
) -> list[Transform]:
  """The training transforms of universal segmentation in the recipes' order.

  Args:
    kind: `lsj`, Mask2Former's recipe for COCO: flip, large-scale jitter, crop, pad. Or
      `shortest_edge`, that for ADE20K and Cityscapes: resize, crop, colours, flip, pad. Or `eomt`:
      colours, flip, scale jitter, pad with black, crop, and again if no segment is left.
    crop: rows and columns of the crop, and of the result.
    max_segments: N, length of the labels, 255 at most.
    layers: L, of the segment map; more than 1 where segments overlap.
    keep_empty: see `PackSegments`.
    flip: probability of mirroring.
    scale: range of the jitter; for `lsj` and `eomt`.
    short_side: the short side is 0.5, 0.6, ... or 2.0 times this long, and the long side 4 times
      at most; for `shortest_edge`.
    photometric: whether colours are distorted; for `shortest_edge` and `eomt`.
    pad_as_picture: see `PadTo.as_picture`.

  Raises:
    UserError: for an unknown kind, or sizes that make no sense.
  """
  kinds = ("lsj", "shortest_edge", "eomt")
  if kind not in kinds:
    raise UserError(
      f"data.augment.kind is {kind!r}; expected one of {', '.join(kinds)}.{suggestion(kind, kinds)}"
    )
  if not 1 <= max_segments <= NO_SEGMENT:
    raise UserError(f"data.augment.max_segments is {max_segments}; expected 1 to {NO_SEGMENT}.")
  if layers < 1:
    raise UserError(f"data.augment.layers is {layers}; expected 1 at least.")
  size = (int(crop[0]), int(crop[1]))
  mirror = HorizontalFlip(flip, MIRRORED)
  pack = PackSegments(max_segments, layers, keep_empty)
  if kind == "eomt":
    steps = (
      *([ColourJitter()] if photometric else []),
      mirror,
      LargeScaleJitter(size, tuple(scale), round_down=True),
      PadTo(size, pad_as_picture, value=0),
      Crop(size),
    )
    return [UntilNotEmpty(steps), pack]
  if kind == "lsj":
    steps = [mirror, LargeScaleJitter(size, tuple(scale)), Crop(size, one_draw=True)]
  else:
    if short_side < 2:
      raise UserError(f"data.augment.short_side is {short_side}; expected a length in pixels.")
    lengths = tuple(int(tenths * 0.1 * short_side) for tenths in range(5, 21))
    steps = [
      ResizeShortestEdge(lengths, 4 * short_side),
      Crop(size),
      *([PhotometricDistortion()] if photometric else []),
      mirror,
    ]
  return [*steps, PadTo(size, pad_as_picture), pack]


def shortest_edge_size(size: Sequence[int], short_side: int, max_size: int) -> tuple[int, int]:
  """The size at which the short side has a length, unless the long one would be too long.

  Args:
    size: rows and columns.
    short_side: length of the short side.
    max_size: limit of the long side.

  Returns:
    rows and columns, rounded half up.
  """
  short, long = min(size), max(size)
  short_length, long_length = float(short_side), long * (short_side / short)
  if long_length > max_size:
    shrink = max_size / long_length
    short_length, long_length = short_length * shrink, long_length * shrink
  resized = {short: max(int(short_length + 0.5), 1), long: max(int(long_length + 0.5), 1)}
  return resized[size[0]], resized[size[1]]


def resize(example: Example, size: tuple[int, int]) -> Example:
  """Resizes image (bilinear, averaging when it shrinks) and segments (nearest) to (rows, cols)."""
  if example["image"].shape[:2] == size:
    return example
  if isinstance(example["segments"], MaskRuns):
    image = resize_image(example["image"], size)
    return {**example, "image": image, "segments": example["segments"].resized(size)}
  segments = [
    np.asarray(Image.fromarray(layer).resize(size[::-1], Image.Resampling.NEAREST))
    for layer in example["segments"]
  ]
  image = resize_image(example["image"], size)
  return {**example, "image": image, "segments": np.stack(segments)}


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes uint8 (H, W, 3) to (rows, cols) with Pillow's bilinear filter."""
  if image.shape[:2] == size:
    return image
  return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def _histogram(segments: np.ndarray) -> np.ndarray:
  """Pixels of each value of uint8 (L, H, W): int64 (256,), ten times faster than by bincount."""
  rows = np.ascontiguousarray(segments).reshape(-1, segments.shape[-1])
  return cv2.calcHist([rows], [0], None, [256], [0, 256]).ravel().astype(np.int64)
