"""Procedural scenes: a data set that needs no download, each example a function of its number.

Balls, rings, boxes, banners and stars lie on a meadow or on paving under a sky. Shape and texture
distinguish the classes: a ring is a ball with a hole, a banner is a box with stripes. Colour is a
hint that a model finds first, and that misleads: six objects in ten have the hue of their kind,
the others any, and meadow and paving share many. Objects hide each other, throw shadows, and have
a thin border of void; light falls off over the picture.

Measured on `val` at 128x128: sky, the most frequent class, has 32 % of the labelled pixels, so
guessing it everywhere gives 4.0 % mIoU; the best guess from a pixel's colour alone (a histogram of
4,096 colours over 500 training scenes) gives 35 %. A scene takes 2 ms on one CPU core.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets import base

CLASSES = ("sky", "meadow", "paving", "ball", "ring", "box", "banner", "star")
PALETTE = np.array(
  [
    (142, 202, 230),
    (138, 177, 125),
    (173, 165, 158),
    (230, 57, 70),
    (255, 183, 3),
    (69, 123, 157),
    (181, 101, 167),
    (22, 150, 130),
  ],
  np.uint8,
)
_SKY, _MEADOW, _PAVING = 0, 1, 2
# Usual hue of each kind of object, in turns of the colour circle.
_HUES = {"ball": 0.0, "ring": 0.13, "box": 0.58, "banner": 0.83, "star": 0.45}
_OBJECTS = tuple(_HUES)
# Share of the objects with the hue of their kind; the rest have any.
_USUAL = 0.6
_LENGTHS = {"train": 2048, "val": 96}
_SPLITS = tuple(_LENGTHS)
_MIN_SIDE = 32
# OpenCV takes polygons in fixed point; four bits of fraction draw smooth outlines.
_SHIFT = 4


@dataclasses.dataclass(frozen=True)
class SyntheticScenes:
  """A split of the procedural scenes.

  Attributes:
    split: `train` or `val`; no scene is in both.
    size: rows and columns of every example.
    seed: another seed, other scenes.
    num_train: scenes in `train`; more of them begin with the same ones.
  """

  split: str
  size: tuple[int, int] = (128, 128)
  seed: int = 0
  num_train: int = _LENGTHS["train"]

  name = "synthetic"
  classes = CLASSES
  palette = PALETTE
  ignore_label = base.IGNORE_LABEL
  num_classes = len(CLASSES)

  def __len__(self) -> int:
    return self.num_train if self.split == "train" else _LENGTHS[self.split]

  def __getitem__(self, index: int) -> base.Example:
    """Draws one example: `image`, `label`, `valid_size` and `name`."""
    image, label, _ = self.scene(index)
    return {
      "image": image,
      "label": label,
      "valid_size": np.array(self.size, np.int32),
      "name": f"{self.split}_{index:04d}",
    }

  def scene(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws an example's image, label and object numbers; see `draw_scene`."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    entropy = (self.seed, _SPLITS.index(self.split), int(index))
    return draw_scene(np.random.Generator(np.random.PCG64(entropy)), self.size)

  def image_size(self, index: int) -> tuple[int, int]:
    """Rows and columns, the same for all."""
    del index
    return self.size


def open_split(
  root: str | Path | None,
  split: str,
  *,
  size: Sequence[int] = (128, 128),
  seed: int = 0,
  num_train: int = _LENGTHS["train"],
) -> SyntheticScenes:
  """Opens `train` or `val` (96 scenes).

  Args:
    root: not used.
    split: of the data set.
    size: rows and columns, 32 at least.
    seed: of all scenes.
    num_train: scenes in `train`.
  """
  del root
  base.require_split(split, _SPLITS, "synthetic")
  if len(size) != 2 or min(size) < _MIN_SIDE:
    raise UserError(
      f"data.options.size is {tuple(size)}; expected (rows, columns), each {_MIN_SIDE} at least."
    )
  if num_train < 1:
    raise UserError(f"data.options.num_train is {num_train}; expected 1 or more.")
  return SyntheticScenes(split, (int(size[0]), int(size[1])), seed, int(num_train))


def draw_scene(
  rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws a scene; everything random comes from `rng`.

  Returns:
    image uint8 (rows, cols, 3), label uint8 (rows, cols), 255 along the objects' borders, and the
    number of the object at each pixel, uint8 (rows, cols), 0 for the background.
  """
  rows, cols = size
  canvas, label, horizon = _draw_background(rng, size)
  owner = np.zeros(size, np.uint8)
  unit = min(rows, cols)
  things = []
  for _ in range(rng.integers(3, 8)):
    depth = rng.random()  # 0: at the horizon, 1: in front
    flying = rng.random() < 0.2
    row = rng.uniform(0.05, 0.6) * rows if flying else horizon + depth * (0.95 * rows - horizon)
    radius = unit * (0.1 + 0.12 * depth) * rng.uniform(0.85, 1.2)
    things.append((depth, row, rng.uniform(0, cols), radius, flying))
  # From back to front.
  for number, (_, row, col, radius, flying) in enumerate(sorted(things), 1):
    if not flying:
      _draw_shadow(canvas, (col, row + 0.8 * radius), radius)
    _draw_object(rng, canvas, label, owner, number=number, centre=(col, row), radius=radius)
  y, x = _grid(size)
  angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.5)
  light = 1.0 + fall * ((x / cols - 0.5) * math.cos(angle) + (y / rows - 0.5) * math.sin(angle))
  grain = rng.standard_normal(size, dtype=np.float32) * np.float32(rng.uniform(2, 7))
  canvas *= light.astype(np.float32)
  canvas += grain
  image = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
  return cv2.merge(list(image)), label, owner


def _draw_background(
  rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, float]:
  """Sky, meadow and paving: canvas float32 (3, rows, cols), label, and the horizon's row."""
  rows, cols = size
  y, x = _grid(size)
  horizon = rng.uniform(0.2, 0.5) * rows
  below = y - (horizon + rng.uniform(-0.15, 0.15) * (x - cols / 2))
  # The border of meadow and paving is a straight line; in some scenes there is one ground alone.
  split = x - cols * rng.uniform(-0.3, 1.3) - rng.uniform(-1, 1) * below
  if rng.random() < 0.5:
    split = -split
  label = np.where(split > 0, _MEADOW, _PAVING).astype(np.uint8)
  label[below < 0] = _SKY

  # Every surface is a colour times a map or plus a map; planes come first, which numpy adds fast.
  clouds = cv2.resize(
    rng.standard_normal((6, 4), np.float32), (cols, rows), interpolation=cv2.INTER_CUBIC
  )
  down = y / rows
  zenith = _colour(rng, 0.57, 1 / 6, (0.05, 0.6), (0.55, 1.0))
  skyline = _colour(rng, 0.57, 1 / 6, (0.0, 0.5), (0.6, 1.0))
  canvas = zenith + (skyline - zenith) * down + 14 * clouds

  blades = rng.standard_normal((max(rows // 5, 2), cols), np.float32)
  blades = cv2.resize(blades, (cols, rows), interpolation=cv2.INTER_LINEAR)
  turf = _colour(rng, 0.24, 0.14, (0.1, 0.6), (0.4, 0.8))
  np.copyto(canvas, turf + 24 * blades, where=label == _MEADOW)

  # Square tiles in perspective: the distance grows as 1 / (rows below the horizon).
  distance = 1.0 / (np.maximum(below, 0) / rows + 0.12)
  across = (x - cols / 2) / cols * distance * rng.uniform(2.5, 4) + rng.random()
  along = distance * rng.uniform(1.2, 2) + rng.random()
  joint = (_fraction(across) < 0.14) | (_fraction(along) < 0.14)
  shade = np.where(joint, np.float32(0.6), np.float32(1))
  stone = _colour(rng, 0.1, 0.14, (0.05, 0.5), (0.4, 0.8))
  np.copyto(canvas, stone * shade, where=label == _PAVING)
  return canvas, label, horizon


def _draw_object(
  rng: np.random.Generator,
  canvas: np.ndarray,
  label: np.ndarray,
  owner: np.ndarray,
  *,
  number: int,
  centre: tuple[float, float],
  radius: float,
) -> None:
  """Draws an object of a random class at (x, y) into canvas, label and owner."""
  kind = _OBJECTS[rng.integers(len(_OBJECTS))]
  outlines = _outlines(rng, kind)
  left, top = np.floor(np.array(centre) - 1.7 * radius).astype(int)
  side = int(3.4 * radius) + 2
  columns = slice(max(left, 0), min(left + side, label.shape[1]))
  rows = slice(max(top, 0), min(top + side, label.shape[0]))
  if columns.start >= columns.stop or rows.start >= rows.stop:
    return
  window = canvas[:, rows, columns]
  origin = np.array(centre) - (columns.start, rows.start)
  points = [
    np.round((outline * radius + origin) * (1 << _SHIFT)).astype(np.int32) for outline in outlines
  ]
  cover = np.zeros(window.shape[1:], np.uint8)
  cv2.fillPoly(cover, points, 255, cv2.LINE_AA, _SHIFT)
  inside = label[rows, columns].copy()
  inside[cover > 127] = CLASSES.index(kind)
  owner[rows, columns][cover > 127] = number
  border = 1 if min(label.shape) < 192 else 3
  cv2.polylines(inside, points, True, base.IGNORE_LABEL, border, cv2.LINE_8, _SHIFT)
  label[rows, columns] = inside

  y, x = _grid(window.shape[1:])
  x, y = (x - float(origin[0])) / radius, (y - float(origin[1])) / radius
  surface = _surface(rng, kind, x, y)
  window += (surface - window) * (cover / np.float32(255))


def _outlines(rng: np.random.Generator, kind: str) -> list[np.ndarray]:
  """Polygons of a shape around (0, 0) with a radius of about 1; a second one is a hole."""
  turn = rng.uniform(0, 2 * np.pi)
  if kind in ("ball", "ring"):
    angles = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    circle = _turn(circle * (1.0, rng.uniform(0.75, 1.0)), turn)
    return [circle, circle * rng.uniform(0.45, 0.6)] if kind == "ring" else [circle]
  if kind == "star":
    points = int(rng.integers(4, 7))
    angles = turn + np.arange(2 * points) * np.pi / points
    radii = np.tile([1.25, rng.uniform(0.45, 0.6)], points)
    return [np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)]
  half = 0.95, 0.95 * rng.uniform(0.55, 1.0)
  corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half
  return [_turn(corners, turn)]


def _surface(rng: np.random.Generator, kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Colours float32 (3, h, w) of an object at coordinates relative to its radius."""
  hue = _HUES[kind] if rng.random() < _USUAL else rng.random()
  colour = _colour(rng, hue, 1 / 12, (0.1, 0.9), (0.35, 0.95))
  angle = rng.uniform(0, 2 * np.pi)
  slope = x * math.cos(angle) + y * math.sin(angle)
  if kind == "banner":
    other = _colour(rng, rng.random(), 0.0, (0.1, 0.9), (0.35, 0.95))
    if np.abs(other - colour).sum() < 150:  # stripes must be seen
      other = 255 - colour if np.abs(255 - 2 * colour).sum() > 150 else colour * 0.3
    stripes = _fraction(slope * rng.uniform(1.4, 2.4) + rng.random()) < 0.5
    colour = np.where(stripes, colour, other)
  if kind == "ball":
    shade = 1.25 - 0.4 * ((x + 0.35) ** 2 + (y + 0.4) ** 2)
  else:
    shade = 1.0 + rng.uniform(0.05, 0.25) * slope
  return colour * shade


def _draw_shadow(canvas: np.ndarray, centre: tuple[float, float], radius: float) -> None:
  """Darkens a flat ellipse below an object."""
  cover = np.zeros(canvas.shape[1:], np.uint8)
  scale = 1 << _SHIFT
  middle = round(centre[0] * scale), round(centre[1] * scale)
  axes = round(1.1 * radius * scale), round(0.3 * radius * scale)
  cv2.ellipse(cover, middle, axes, 0, 0, 360, 255, -1, cv2.LINE_AA, _SHIFT)
  top, bottom = (int(np.clip(centre[1] + d * radius, 0, len(cover))) for d in (-0.5, 0.5))
  canvas[:, top:bottom] *= 1 - cover[top:bottom] * np.float32(0.45 / 255)


def _colour(
  rng: np.random.Generator,
  hue: float,
  spread: float,
  saturation: tuple[float, float],
  value: tuple[float, float],
) -> np.ndarray:
  """A random RGB colour float32 (3, 1, 1) in 0..255, of a hue plus or minus `spread`."""
  h = (hue + rng.uniform(-spread, spread)) % 1
  s, v = rng.uniform(*saturation), rng.uniform(*value)
  hsv = np.array([[[360 * h, s, v]]], np.float32)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(3, 1, 1) * 255


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
  cos, sin = np.cos(angle), np.sin(angle)
  return points @ np.array([[cos, sin], [-sin, cos]])


def _fraction(values: np.ndarray) -> np.ndarray:
  return values - np.floor(values)


def _grid(size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Rows (rows, 1) and columns (1, cols), float32."""
  y = np.arange(size[0], dtype=np.float32)[:, None]
  return y, np.arange(size[1], dtype=np.float32)[None]
