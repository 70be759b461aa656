"""What the data sets of files share: listing, pairing, label tables and palettes."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def split_names(text: str) -> tuple[str, ...]:
  """Class names from text with commas between them."""
  return tuple(" ".join(name.split()) for name in text.split(","))


def list_images(folder: Path, pattern: str = "*") -> list[Path]:
  """The pictures below a folder that a glob pattern finds, sorted by path."""
  return sorted(path for path in folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES)


def pair_up(
  images: Iterable[Path], label_of: Callable[[Path], Path], name: str
) -> tuple[tuple[Path, Path], ...]:
  """Pairs each image with its label.

  Each folder of labels is listed once: asking for 100,000 files one by one takes minutes on a
  network drive.

  Args:
    images: paths.
    label_of: image path -> path of its label.
    name: of the data set.

  Raises:
    UserError: naming the first image without a label, and how many there are.
  """
  listings: dict[Path, set[str]] = {}
  pairs, missing = [], []
  for image in images:
    label = label_of(image)
    if label.parent not in listings:
      listings[label.parent] = set(os.listdir(label.parent)) if label.parent.is_dir() else set()
    found = label.name in listings[label.parent]
    (pairs if found else missing).append((image, label))
  if missing:
    image, label = missing[0]
    raise UserError(
      f"{name}: {len(missing)} of {len(missing) + len(pairs)} images have no label; the first is"
      f" {image}, for which {label} is missing."
    )
  return tuple(pairs)


def label_table(classes: Mapping[int, int], num_stored: int) -> np.ndarray:
  """A table from stored label values to class ids, for `by_table`.

  Args:
    classes: stored value -> class id; other values below `num_stored` become ignored.
    num_stored: number of values that the data set defines. Values from here on stay as they are,
      so that the check of the labels reports them; 255 is ignored.

  Returns:
    uint8 (256,).
  """
  table = np.arange(256, dtype=np.uint8)
  table[:num_stored] = IGNORE_LABEL
  for stored, index in classes.items():
    table[stored] = index
  return table


def by_table(label: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Maps label values with a table of 256; larger values (of 16-bit files) stay as they are."""
  if label.dtype == np.uint8:
    return cv2.LUT(label, table)
  return np.where(label < len(table), table[label & 255], label)


def distinct_palette(num_classes: int) -> np.ndarray:
  """Colours that neighbours in the list do not share: uint8 (num_classes, 3), always the same."""
  colours = []
  for index in range(num_classes):
    hue = (index * 0.618034) % 1  # the golden ratio spreads any number of hues
    saturation, value = (0.65, 0.9, 0.4)[index % 3], (0.9, 0.65, 0.8, 0.5)[index % 4]
    colours.append(colorsys.hsv_to_rgb(hue, saturation, value))
  return np.round(np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)
