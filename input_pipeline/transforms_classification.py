"""Augmentations of image classification, after DeiT's recipe (Touvron et al., 2021).

Each is a small function object that takes an example and a generator, and leaves the example it was
given alone. Images stay uint8: what the recipe does after normalisation (random erasing) is done
here with the mean and standard deviation of ImageNet in uint8 units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from effseg_jax import imagenet
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.transforms import HorizontalFlip, Rng, Transform

_MAX_MAGNITUDE = 10.0


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """A random part of the image, stretched to a square (Szegedy et al., 2015).

  Attributes:
    size: side of the result.
    area: range of the part's share of the image's area.
    ratio: range of its width / height, drawn uniformly in the logarithm.
  """

  size: int
  area: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Bicubic with antialiasing, as Pillow resizes."""
    box = self._box(example["image"].shape[:2], rng)
    picture = Image.fromarray(example["image"])
    picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
    return _with_image(example, np.asarray(picture))

  def _box(self, size: Sequence[int], rng: Rng) -> tuple[int, int, int, int]:
    """(left, top, right, bottom); after ten draws that do not fit, the largest allowed centre."""
    rows, cols = size
    low, high = (math.log(ratio) for ratio in self.ratio)
    for _ in range(10):
      area = rows * cols * rng.uniform(*self.area)
      ratio = math.exp(rng.uniform(low, high))
      width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
      if 0 < width <= cols and 0 < height <= rows:
        top = int(rng.integers(0, rows - height + 1))
        left = int(rng.integers(0, cols - width + 1))
        return left, top, left + width, top + height
    width = min(cols, max(1, round(rows * self.ratio[1])))
    height = min(rows, max(1, round(cols / self.ratio[0])))
    left, top = (cols - width) // 2, (rows - height) // 2
    return left, top, left + width, top + height


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """A few random operations, all of about one strength (Cubuk et al., 2019).

  Each operation is drawn from `OPERATIONS` with replacement and applied with probability one half;
  its magnitude is normal around `magnitude`. This is the variant that DeiT uses (m9-mstd0.5), in
  which a larger magnitude always changes the image more.

  Attributes:
    num_ops: operations drawn for an image.
    magnitude: 0 to 10.
    deviation: standard deviation of the magnitude.
    probability: of applying a drawn operation.
  """

  num_ops: int = 2
  magnitude: float = 9.0
  deviation: float = 0.5
  probability: float = 0.5

  def __post_init__(self) -> None:
    if not 0 <= self.magnitude <= _MAX_MAGNITUDE:
      raise UserError(f"RandAugment's magnitude is {self.magnitude:g}; expected 0 to 10.")

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Changes the image alone."""
    picture = Image.fromarray(np.ascontiguousarray(example["image"]))
    operations = tuple(OPERATIONS.values())
    for index in rng.integers(len(operations), size=self.num_ops):
      apply = rng.random() < self.probability
      magnitude = np.clip(rng.normal(self.magnitude, self.deviation), 0, _MAX_MAGNITUDE)
      sign = 1.0 if rng.random() < 0.5 else -1.0
      if apply:
        picture = operations[index](picture, float(magnitude / _MAX_MAGNITUDE), sign)
    return {**example, "image": np.asarray(picture)}


@dataclasses.dataclass(frozen=True)
class RandomErasing:
  """Replaces a random rectangle by noise (Zhong et al., 2017).

  Attributes:
    probability: of erasing.
    area: range of the rectangle's share of the image.
    ratio: range of its height / width, drawn uniformly in the logarithm.
  """

  probability: float = 0.25
  area: tuple[float, float] = (0.02, 1 / 3)
  ratio: tuple[float, float] = (0.3, 1 / 0.3)

  def __call__(self, example: Example, rng: Rng) -> Example:
    """The noise has the mean and the standard deviation of ImageNet's pixels."""
    if rng.random() >= self.probability:
      return example
    rows, cols = example["image"].shape[:2]
    low, high = (math.log(ratio) for ratio in self.ratio)
    for _ in range(10):
      area = rows * cols * rng.uniform(*self.area)
      ratio = math.exp(rng.uniform(low, high))
      height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
      if 0 < height < rows and 0 < width < cols:
        top = int(rng.integers(0, rows - height + 1))
        left = int(rng.integers(0, cols - width + 1))
        noise = rng.standard_normal((height, width, 3), np.float32) * imagenet.STD + imagenet.MEAN
        image = example["image"].copy()
        image[top : top + height, left : left + width] = np.clip(noise, 0, 255)
        return {**example, "image": image}
    return example


def classification_transforms(
  *,
  size: int,
  area: tuple[float, float] = (0.08, 1.0),
  flip: float = 0.5,
  randaugment: tuple[int, float] = (0, 0.0),
  erasing: float = 0.0,
) -> list[Transform]:
  """The training transforms of classification in the recipe's order.

  Args:
    size: side of the result.
    area: of `RandomResizedCrop`.
    flip: probability of `HorizontalFlip`.
    randaugment: (number of operations, magnitude) of `RandAugment`; 0 operations: none.
    erasing: probability of `RandomErasing`; 0: none.
  """
  num_ops, magnitude = randaugment
  return [
    RandomResizedCrop(size, tuple(area)),
    HorizontalFlip(flip, (("image", 1),)),
    *([RandAugment(int(num_ops), magnitude)] if num_ops else []),
    *([RandomErasing(erasing)] if erasing else []),
  ]


def resize_and_crop(image: np.ndarray, resize: int, crop: int) -> np.ndarray:
  """Resizes the short side and crops the centre: the usual view for evaluation.

  Args:
    image: uint8 (H, W, 3).
    resize: length of the short side, bicubic with antialiasing.
    crop: side of the square.

  Returns:
    uint8 (crop, crop, 3).
  """
  rows, cols = image.shape[:2]
  short = min(rows, cols)
  rows, cols = rows * resize // short, cols * resize // short
  picture = Image.fromarray(image).resize((cols, rows), Image.Resampling.BICUBIC)
  top, left = round((rows - crop) / 2), round((cols - crop) / 2)
  return np.asarray(picture)[top : top + crop, left : left + crop]


# The operations of RandAugment: (picture, strength 0 to 1, sign -1 or 1) -> picture.
Operation = Callable[[Image.Image, float, float], Image.Image]


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
  def operation(picture: Image.Image, strength: float, sign: float) -> Image.Image:
    return kind(picture).enhance(1.0 + 0.9 * strength * sign)

  return operation


def _by_table(values: np.ndarray) -> list[int]:
  """Pillow's table for three channels."""
  return [int(value) for value in np.clip(values, 0, 255)] * 3


def _posterize(picture: Image.Image, strength: float, sign: float) -> Image.Image:
  del sign
  return ImageOps.posterize(picture, max(4 - int(4 * strength), 1))


def _solarize(picture: Image.Image, strength: float, sign: float) -> Image.Image:
  del sign
  return ImageOps.solarize(picture, 256 - int(256 * strength))


def _solarize_add(picture: Image.Image, strength: float, sign: float) -> Image.Image:
  del sign
  values = np.arange(256)
  return picture.point(_by_table(np.where(values < 128, values + int(110 * strength), values)))


def _affine(matrix: Sequence[Sequence[float]], picture: Image.Image) -> Image.Image:
  """Maps pixels by x' = m00 x + m01 y + m02 around the centre; new pixels are grey."""
  matrix = np.array(matrix, np.float64)
  centre = np.array([(picture.width - 1) / 2, (picture.height - 1) / 2])
  matrix[:, 2] += centre - matrix[:, :2] @ centre
  moved = cv2.warpAffine(
    np.asarray(picture),
    matrix,
    picture.size,
    flags=cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=imagenet.FILL,
  )
  return Image.fromarray(moved)


def _rotate(picture: Image.Image, strength: float, sign: float) -> Image.Image:
  angle = math.radians(30 * strength * sign)
  cos, sin = math.cos(angle), math.sin(angle)
  return _affine([(cos, -sin, 0), (sin, cos, 0)], picture)


def _shear_x(picture: Image.Image, strength: float, sign: float) -> Image.Image:
  return _affine([(1, 0.3 * strength * sign, 0), (0, 1, 0)], picture)


def _shear_y(picture: Image.Image, strength: float, sign: float) -> Image.Image:
  return _affine([(1, 0, 0), (0.3 * strength * sign, 1, 0)], picture)


def _translate_x(picture: Image.Image, strength: float, sign: float) -> Image.Image:
  return _affine([(1, 0, 0.45 * strength * sign * picture.width), (0, 1, 0)], picture)


def _translate_y(picture: Image.Image, strength: float, sign: float) -> Image.Image:
  return _affine([(1, 0, 0), (0, 1, 0.45 * strength * sign * picture.height)], picture)


OPERATIONS: Mapping[str, Operation] = {
  "auto_contrast": lambda picture, strength, sign: ImageOps.autocontrast(picture),
  "equalize": lambda picture, strength, sign: ImageOps.equalize(picture),
  "invert": lambda picture, strength, sign: ImageOps.invert(picture),
  "rotate": _rotate,
  "posterize": _posterize,
  "solarize": _solarize,
  "solarize_add": _solarize_add,
  "saturation": _enhance(ImageEnhance.Color),
  "contrast": _enhance(ImageEnhance.Contrast),
  "brightness": _enhance(ImageEnhance.Brightness),
  "sharpness": _enhance(ImageEnhance.Sharpness),
  "shear_x": _shear_x,
  "shear_y": _shear_y,
  "translate_x": _translate_x,
  "translate_y": _translate_y,
}


def _with_image(example: Example, image: np.ndarray) -> Example:
  return {**example, "image": image, "valid_size": np.array(image.shape[:2], np.int32)}
