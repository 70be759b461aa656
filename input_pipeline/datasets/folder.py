"""Your own images: a folder of pictures, a folder of index PNGs, and a list of classes."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets import base, files

TREE = """  classes.txt             a class a line, "name" or "name red green blue"; first: value 0
  images/{train,val}/**   *.jpg|png
  labels/{train,val}/**   *.png of the same name: the class of each pixel, 255 for no class"""

_MAX_CLASSES = 255


def map_ignored(label: np.ndarray, ignore: int) -> np.ndarray:
  """The stored value `ignore` (or 255) is not counted; a 1-bit picture has the classes 0 and 1."""
  label = label.astype(np.uint8) if label.dtype == bool else label
  return np.where(label == ignore, base.IGNORE_LABEL, label)


def open_split(
  root: str | Path | None, split: str, *, ignore: int = base.IGNORE_LABEL
) -> base.SegmentationFiles:
  """Opens a split, which is any folder below `images`.

  Args:
    root: folder with `classes.txt`, `images` and `labels`.
    split: name of a folder below `images` and `labels`.
    ignore: stored label value of what has no class; 255 always has none.

  Raises:
    UserError: for a missing folder or label, an empty split or a broken class list.
  """
  folder = base.require_tree(root, "folder", "classes.txt", TREE)
  base.require_tree(root, "folder", "images", TREE)
  images, labels = folder / "images" / split, folder / "labels" / split
  if not images.is_dir():
    known = sorted(path.name for path in (folder / "images").iterdir() if path.is_dir())
    base.require_split(split, tuple(known) or ("train", "val"), f"folder {folder}")
    raise UserError(f"folder: {images} does not exist.")
  classes, palette = read_classes(folder / "classes.txt")
  pairs = files.pair_up(
    files.list_images(images, "**/*"),
    lambda image: (labels / image.relative_to(images)).with_suffix(".png"),
    "folder",
  )
  base.require_some(pairs, "folder", split, images)
  rule = functools.partial(map_ignored, ignore=ignore)
  return base.SegmentationFiles("folder", split, classes, palette, pairs, rule)


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
  """Reads a class list.

  Args:
    path: text with a class a line, "name" or "name red green blue"; names may have spaces.

  Returns:
    Names, and their palette uint8 (K, 3).

  Raises:
    UserError: for an empty list, a name given twice, a colour beyond 255 or too many classes.
  """
  names: list[str] = []
  colours: dict[int, list[int]] = {}
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    words = line.split()
    if not words:
      continue
    if len(words) > 3 and all(word.isdecimal() for word in words[-3:]):
      colour = [int(word) for word in words[-3:]]
      if max(colour) > 255:
        raise UserError(f"{path}, line {number}: the colour {colour} goes beyond 255.")
      colours[len(names)] = colour
      words = words[:-3]
    name = " ".join(words)
    if name in names:
      raise UserError(f"{path}, line {number}: the class {name!r} is listed twice.")
    names.append(name)
  if not names:
    raise UserError(f"{path} lists no class; expected one name a line.")
  if len(names) > _MAX_CLASSES:
    raise UserError(f"{path} lists {len(names)} classes; 8-bit labels have room for 255.")
  palette = files.distinct_palette(len(names))
  for index, colour in colours.items():
    palette[index] = colour
  return tuple(names), palette
