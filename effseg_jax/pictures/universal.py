"""Pictures of segments: a colour for each, names where they are, rows to compare."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from effseg_jax.pictures.semantic import class_borders
from effseg_jax.pictures.text import readable

_BACKGROUND = (250, 250, 248)
_INK = (32, 32, 32)
_GAP = 8

# Steps of the golden ratio's generalisation to three dimensions fill a cube evenly.
_STEP = np.array([0.8191725134, 0.6710436067, 0.5497004779])


def segment_colours(
  labels: Sequence[int],
  is_thing: Sequence[bool],
  palette: Sequence[Sequence[int]],
  numbers: Sequence[int] | None = None,
) -> np.ndarray:
  """A colour per segment: its class's, varied from thing to thing of one class.

  Args:
    labels: int (n,), classes.
    is_thing: per class.
    palette: RGB per class.
    numbers: of each segment within its class, from 0 on; default: in their order.

  Returns:
    uint8 (n, 3).
  """
  colours = np.zeros((len(labels), 3))
  seen: dict[int, int] = {}
  for row, label in enumerate(labels):
    number = seen.get(label, 0) if numbers is None else numbers[row]
    seen[label] = number + 1
    colours[row] = palette[label]
    if is_thing[label] and number:
      colours[row] += 140 * ((number * _STEP) % 1.0 - 0.5)
  return np.clip(np.round(colours), 0, 255).astype(np.uint8)


def paint_segments(
  image: np.ndarray, segment_map: np.ndarray, colours: np.ndarray, opacity: float = 0.6
) -> np.ndarray:
  """Tints an image by segment.

  Args:
    image: uint8 RGB, of any size; resized to the map's.
    segment_map: int (H, W), row in `colours`; negative or beyond: left as it is, darkened.
    colours: uint8 (n, 3).
    opacity: of the colours.

  Returns:
    uint8 (H, W, 3).
  """
  size = segment_map.shape[::-1]
  image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
  known = (segment_map >= 0) & (segment_map < len(colours))
  table = np.concatenate([colours, np.zeros((1, 3), np.uint8)]).astype(np.float32)
  mixed = image * (1 - opacity) + table[np.where(known, segment_map, len(colours))] * opacity
  mixed[class_borders(segment_map)] *= 0.35
  return np.round(mixed).astype(np.uint8)


def write_names(picture: np.ndarray, segment_map: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """Writes a name into each segment, where it is widest.

  Args:
    picture: uint8 (H, W, 3).
    segment_map: int (H, W), row in `names`.
    names: n texts.

  Returns:
    uint8 (H, W, 3).
  """
  canvas = Image.fromarray(picture)
  draw = ImageDraw.Draw(canvas)
  font, names = readable(names, int(np.clip(min(picture.shape[:2]) / 32, 10, 28)))
  for row, name in enumerate(names):
    mask = np.pad((segment_map == row).astype(np.uint8), 1)  # the picture's edge is an edge, too
    if not mask.any():
      continue
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    half = draw.textlength(name, font=font) / 2 + 2
    x = float(np.clip(x - 1, half, max(picture.shape[1] - half, half)))
    place = (x, float(y - 1))
    draw.text(place, name, (255, 255, 255), font, "mm", stroke_width=2, stroke_fill=_INK)
  return np.asarray(canvas)


def stack_masks(masks: np.ndarray) -> np.ndarray:
  """bool (n, H, W), the best first -> int16 (H, W), the first mask at each pixel, or -1."""
  if not len(masks):
    return np.full(masks.shape[1:], -1, np.int16)
  return np.where(masks.any(axis=0), masks.argmax(axis=0), -1).astype(np.int16)


def stack_rows(
  rows: Sequence[Sequence[np.ndarray]],
  titles: Sequence[str] = ("image", "prediction", "ground truth"),
  height: int = 300,
) -> np.ndarray:
  """Puts rows of panels below one another, a title above each column.

  Args:
    rows: of uint8 (h, w, 3) panels; each is scaled to `height`, a row's to the width of its last.
    titles: one per column.
    height: of a row in pixels.

  Returns:
    uint8 (rows, cols, 3).
  """
  widths = [round(height * row[-1].shape[1] / row[-1].shape[0]) for row in rows]
  head, columns = 30, len(titles)
  size = (columns * max(widths) + (columns - 1) * _GAP, head + len(rows) * (height + _GAP) - _GAP)
  canvas = Image.new("RGB", size, _BACKGROUND)
  draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
  for column, title in enumerate(titles):
    left = column * (max(widths) + _GAP)
    draw.text((left + max(widths) / 2, head / 2), title, _INK, font, "mm")
    for number, (row, width) in enumerate(zip(rows, widths, strict=True)):
      panel = Image.fromarray(row[column]).resize((width, height), Image.Resampling.BILINEAR)
      canvas.paste(panel, (left, head + number * (height + _GAP)))
  return np.asarray(canvas)
