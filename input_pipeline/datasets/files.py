"""Common parts of data sets of files: listing, pairing, label tables and palettes."""

from __future__ import annotations

import colorsys
import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL


def split_names(text: str) -> tuple[str, ...]:
  """Class names from text with commas between them."""
  return tuple(" ".join(name.split()) for name in text.split(","))


def list_images(folder: Path, pattern: str = "*") -> list[Path]:
  """The pictures below a folder that a glob pattern finds, sorted by path; none that is hidden."""
  return sorted(
    path
    for path in folder.glob(pattern)
    if codecs.is_picture(path)
    and not any(codecs.is_hidden(Path(part)) for part in path.relative_to(folder).parts)
  )


def unchanged(label: np.ndarray) -> np.ndarray:
  """The stored values are class ids already."""
  return label


def pair_up(
  images: Iterable[Path],
  label_of: Callable[[Path], Path],
  name: str,
  suffixes: Sequence[str] = (),
) -> tuple[tuple[Path, Path], ...]:
  """Pairs each image with its label.

  Each folder of labels is listed once: asking for 100,000 files one by one takes minutes on a
  network drive.

  Args:
    images: paths.
    label_of: image path -> path of its label.
    name: of the data set.
    suffixes: that a label may have besides, the first one found is taken.

  Raises:
    UserError: naming the first image without a label, how many there are and what lies there
      instead; or two images that have one label.
  """
  listings: dict[Path, set[str]] = {}
  pairs, missing = [], []
  owners: dict[Path, Path] = {}
  for image in images:
    label = label_of(image)
    if label.parent not in listings:
      listings[label.parent] = set(os.listdir(label.parent)) if label.parent.is_dir() else set()
    options = [label.name, *(label.with_suffix(suffix).name for suffix in suffixes)]
    found = next((option for option in options if option in listings[label.parent]), None)
    if found is None:
      missing.append((image, label))
      continue
    label = label.with_name(found)
    if owners.setdefault(label, image) != image:
      raise UserError(
        f"{name}: the pictures {owners[label]} and {image} have the same label, {label}; expected a"
        " label for each. Rename or remove one of them."
      )
    pairs.append((image, label))
  if missing:
    image, label = missing[0]
    raise UserError(
      f"{name}: {len(missing)} of {len(missing) + len(pairs)} images have no label; the first is"
      f" {image}, for which {label} is missing.{_instead(label, listings[label.parent])}"
    )
  return tuple(pairs)


def _instead(label: Path, listing: set[str]) -> str:
  """What lies where a label should be, for a message."""
  if not listing:
    return f" {label.parent} {'is empty' if label.parent.is_dir() else 'does not exist'}."
  visible = sorted(other for other in listing if not other.startswith("."))
  alike = [other for other in visible if other.lower().startswith(label.stem.lower())]
  alike = alike or difflib.get_close_matches(label.name, visible, n=1, cutoff=0.6)
  if not alike:
    return ""
  return (
    f" There is {', '.join(alike[:3])}; expected the name of the picture with the ending"
    f" {label.suffix}."
  )


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
  """Colours that differ between adjacent list entries: uint8 (num_classes, 3), always the same."""
  colours = []
  for index in range(num_classes):
    hue = (index * 0.618034) % 1  # the golden ratio spreads any number of hues
    saturation, value = (0.65, 0.9, 0.4)[index % 3], (0.9, 0.65, 0.8, 0.5)[index % 4]
    colours.append(colorsys.hsv_to_rgb(hue, saturation, value))
  return np.round(np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)
