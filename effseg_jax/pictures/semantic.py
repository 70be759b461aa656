"""Pictures of segmentations: colours, legends, and rows of image | prediction | ground truth."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from effseg_jax.pictures.text import readable

Palette = Sequence[Sequence[int]]

_BACKGROUND = (250, 250, 248)
_INK = (32, 32, 32)
_MARGIN = 8


def colorize(class_map: np.ndarray, palette: Palette) -> np.ndarray:
  """Class ids (H, W) -> uint8 RGB (H, W, 3); ids without a colour (void) are black."""
  table = np.zeros((256, 3), np.uint8)
  colours = np.asarray(palette, np.uint8)
  table[: len(colours)] = colours
  return table[np.asarray(class_map, np.uint8)]


def overlay(image: np.ndarray, class_map: np.ndarray, palette: Palette, opacity: float = 0.55):
  """Tints an image by class; both (H, W), the image uint8 RGB. Returns uint8 (H, W, 3)."""
  colours = colorize(class_map, palette).astype(np.float32)
  mixed = image.astype(np.float32) * (1 - opacity) + colours * opacity
  borders = class_borders(class_map)
  mixed[borders] = mixed[borders] * 0.35
  return np.round(mixed).astype(np.uint8)


def tint(image: np.ndarray, mask: np.ndarray, colours: np.ndarray, opacity: float = 0.5):
  """Tints the pixels of a mask and draws its outline; other pixels are unchanged.

  Args:
    image: uint8 (H, W, 3).
    mask: uint8 (H, W), 0 for nothing.
    colours: uint8 (n, 3), by value of the mask.
    opacity: of the colours.

  Returns:
    uint8 (H, W, 3).
  """
  tinted = image.copy()
  for index in np.unique(mask[mask > 0]):
    inside, colour = mask == index, colours[index].astype(np.float32)
    tinted[inside] = (image[inside] * (1 - opacity) + colour * opacity).astype(np.uint8)
    kind = cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    outlines, _ = cv2.findContours(inside.astype(np.uint8), *kind)
    thickness = max(1, min(mask.shape) // 200)
    cv2.drawContours(tinted, outlines, -1, tuple(map(int, colours[index])), thickness)
  return tinted


def class_borders(class_map: np.ndarray) -> np.ndarray:
  """bool (H, W): where the class differs from the pixel to the right or below."""
  borders = np.zeros(class_map.shape, bool)
  borders[:, :-1] |= class_map[:, :-1] != class_map[:, 1:]
  borders[:-1] |= class_map[:-1] != class_map[1:]
  return borders


def with_legend(
  picture: np.ndarray, class_map: np.ndarray, classes: Sequence[str], palette: Palette
) -> np.ndarray:
  """Writes the classes that occur, and their share of the pixels, to the right of a picture.

  Args:
    picture: uint8 (H, W, 3).
    class_map: ids (H, W).
    classes: name per id.
    palette: colour per id.

  Returns:
    uint8 (max(H, legend), W + legend, 3).
  """
  ids, counts = np.unique(class_map[class_map < len(classes)], return_counts=True)
  order = np.argsort(-counts)
  size = int(np.clip(picture.shape[0] / 28, 12, 22))
  font, classes = readable(classes, size)
  entries = [(ids[i], f"{classes[ids[i]]}  {100 * counts[i] / class_map.size:.1f}%") for i in order]
  line = round(size * 1.7)
  width = round(max((font.getlength(text) for _, text in entries), default=0) + 3.2 * size)
  height = max(picture.shape[0], line * len(entries) + 2 * _MARGIN)
  canvas = Image.new("RGB", (picture.shape[1] + width, height), _BACKGROUND)
  canvas.paste(Image.fromarray(picture), (0, 0))
  draw = ImageDraw.Draw(canvas)
  for row, (index, text) in enumerate(entries):
    x, y = picture.shape[1] + size, _MARGIN + row * line
    draw.rectangle((x, y + 2, x + size, y + 2 + size), fill=tuple(palette[index]), outline=_INK)
    draw.text((x + 1.6 * size, y + 1), text, fill=_INK, font=font)
  return np.asarray(canvas)


def side_by_side(
  samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], palette: Palette, height: int = 240
) -> np.ndarray:
  """One row per sample: image | prediction | ground truth.

  Args:
    samples: (image uint8 (h, w, 3), prediction (H, W), label (H, W)); each is scaled to `height`.
    palette: colour per class id; void is black.
    height: of a row in pixels.

  Returns:
    uint8 (rows, cols, 3).
  """
  rows = []
  for image, prediction, label in samples:
    width = round(height * label.shape[1] / label.shape[0])
    panels = [
      _scaled(image, (width, height), Image.Resampling.BILINEAR),
      _scaled(colorize(prediction, palette), (width, height), Image.Resampling.NEAREST),
      _scaled(colorize(label, palette), (width, height), Image.Resampling.NEAREST),
    ]
    rows.append(_beside(panels))
  return _with_titles(_stack(rows), ("image", "prediction", "ground truth"))


def confusion_picture(counts: np.ndarray, classes: Sequence[str]) -> np.ndarray:
  """The confusion matrix as shares of each label's pixels: rows are labels, columns predictions.

  Args:
    counts: int (K, K).
    classes: K names.

  Returns:
    uint8 (rows, cols, 3). Names up to 40 classes, percentages in the cells up to 25.
  """
  num_classes = len(classes)
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  cell = int(np.clip(900 / num_classes, 4, 48))
  named, numbered = num_classes <= 40, num_classes <= 25
  font, classes = readable(classes, int(np.clip(cell * 0.4, 9, 15)))
  left = round(max(font.getlength(name) for name in classes) + 16) if named else 12
  side = cell * num_classes
  canvas = Image.new("RGB", (left + side + 12, left + side + 12), _BACKGROUND)
  draw = ImageDraw.Draw(canvas)
  for row in range(num_classes):
    for col in range(num_classes):
      share = float(shares[row, col])
      tone = (1 - share**0.6) * np.array((238, 240, 244)) + share**0.6 * np.array((24, 62, 120))
      x, y = left + col * cell, left + row * cell
      draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=tuple(tone.astype(int)))
      if numbered and share >= 0.005:
        ink = (255, 255, 255) if share > 0.35 else _INK
        centre = (x + cell / 2 - 1, y + cell / 2 - 1)
        draw.text(centre, f"{100 * share:.0f}", fill=ink, font=font, anchor="mm")
  if named:
    for index, name in enumerate(classes):
      middle = left + index * cell + cell / 2
      draw.text((left - 8, middle), name, fill=_INK, font=font, anchor="rm")
      _vertical_text(canvas, name, (middle, left - 8), font)
  return np.asarray(canvas)


def _vertical_text(canvas: Image.Image, text: str, bottom: tuple[float, float], font) -> None:
  """Draws text upwards, ending at `bottom` = (x of its middle, y of its beginning)."""
  width, height = round(font.getlength(text)) + 2, font.size + 6
  label = Image.new("RGB", (width, height), _BACKGROUND)
  ImageDraw.Draw(label).text((0, height / 2), text, fill=_INK, font=font, anchor="lm")
  label = label.rotate(90, expand=True)
  canvas.paste(label, (round(bottom[0] - height / 2), round(bottom[1] - width)))


def _with_titles(picture: np.ndarray, titles: Sequence[str]) -> np.ndarray:
  """Writes a title above each of equally wide columns."""
  size = 15
  canvas = Image.new("RGB", (picture.shape[1], picture.shape[0] + 2 * size), _BACKGROUND)
  canvas.paste(Image.fromarray(picture), (0, 2 * size))
  draw, font = ImageDraw.Draw(canvas), _font(size)
  for index, title in enumerate(titles):
    x = picture.shape[1] * (2 * index + 1) / (2 * len(titles))
    draw.text((x, size), title, fill=_INK, font=font, anchor="mm")
  return np.asarray(canvas)


def _beside(panels: Sequence[np.ndarray]) -> np.ndarray:
  gap = np.full((panels[0].shape[0], _MARGIN, 3), _BACKGROUND, np.uint8)
  return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
  width = max(row.shape[1] for row in rows)
  parts = []
  for row in rows:
    padding = ((0, _MARGIN), (0, width - row.shape[1]), (0, 0))
    parts.append(np.pad(row, padding, constant_values=_BACKGROUND[0]))
  return np.concatenate(parts, axis=0)


def _scaled(picture: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
  return np.asarray(Image.fromarray(picture).resize(size, how))


def _font(size: int):
  return ImageFont.load_default(size)
