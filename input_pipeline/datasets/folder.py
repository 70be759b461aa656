"""Your own images: a folder of pictures, a folder of label pictures, and a list of classes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import base, class_list, files
from effseg_jax.input_pipeline.datasets.class_list import read_classes

__all__ = ["open_split", "read_classes"]

TREE = """  classes.txt             a class a line, "name" or "name red green blue"; first: value 0
  images/{train,val}/**   *.jpg|png|tif|...
  labels/{train,val}/**   *.png of the same name: the class of each pixel, 255 for no class"""

LABELS = ("index", "from_one", "binary", "colours")
_LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
_VOID_NAMES = ("void", "ignore", "unlabeled", "unlabelled")


def open_split(
  root: str | Path | None,
  split: str,
  *,
  ignore: int = base.IGNORE_LABEL,
  labels: str = "index",
  turn_labels: bool = False,
) -> base.SegmentationFiles:
  """Opens a split, which is any folder below `images`.

  Args:
    root: folder with `classes.txt`, `images` and `labels`.
    split: name of a folder below `images` and `labels`.
    ignore: stored label value of what has no class; 255 always has none.
    labels: what label pictures hold. `index`: the number of the class, from 0. `from_one`: from 1,
      and 0 where nothing is labelled. `binary`: 0 for the first class, 255 or 1 for the second.
      `colours`: those that `classes.txt` gives; a colour named void is not counted.
    turn_labels: whether labels were drawn on the pictures as they are stored, before their EXIF
      orientation turns them upright.

  Raises:
    UserError: for a missing folder or label, an empty split or a broken class list.
  """
  folder = base.require_tree(root, "folder", "classes.txt", TREE)
  base.require_tree(root, "folder", "images", TREE)
  if labels not in LABELS:
    raise UserError(
      f"data.options.labels is {labels!r}; expected one of {', '.join(LABELS)}."
      f"{suggestion(labels, LABELS)}"
    )
  images, label_folder = folder / "images" / split, folder / "labels" / split
  if not images.is_dir():
    known = sorted(
      path.name
      for path in (folder / "images").iterdir()
      if path.is_dir() and not codecs.is_hidden(path)
    )
    base.require_split(split, tuple(known) or ("train", "val"), f"folder {folder}")
    raise UserError(f"folder: {images} does not exist.")
  classes, palette, rule, read = _classes_and_rule(folder / "classes.txt", labels, ignore)
  pictures = codecs.list_pictures(images, recursive=True)
  base.require_some(tuple(pictures), "folder", split, images)
  pairs = files.pair_up(
    pictures,
    lambda image: (label_folder / image.relative_to(images)).with_suffix(".png"),
    "folder",
    suffixes=_LABEL_SUFFIXES,
  )
  unused = (ignore,) if labels == "index" and 0 <= ignore < len(classes) else ()
  return base.SegmentationFiles(
    "folder", split, classes, palette, pairs, rule, read, turn_labels=turn_labels, unused=unused
  )


def map_ignored(label: np.ndarray, ignore: int) -> np.ndarray:
  """The stored value `ignore` (or 255) is not counted."""
  return np.where(label == ignore, base.IGNORE_LABEL, label)


def from_one(label: np.ndarray, ignore: int) -> np.ndarray:
  """Classes are stored from 1 on; 0, `ignore` and 255 are not counted."""
  void = (label == 0) | (label == ignore) | (label == base.IGNORE_LABEL)
  return np.where(void, base.IGNORE_LABEL, label.astype(np.int32) - 1)


def from_two_values(label: np.ndarray) -> np.ndarray:
  """0 stays, 1 and 255 are the second class; other values stay, and are reported."""
  if label.dtype == np.uint8:
    table = np.arange(256, dtype=np.uint8)
    table[255] = 1
    table[2:255] = 254  # no class
    return files.by_table(label, table)
  return np.where((label == 255) | (label == 65535), 1, label)


@dataclasses.dataclass(frozen=True)
class ColourReader:
  """Reads labels that are painted in the colours of `classes.txt`.

  Attributes:
    colours: (red, green, blue) of each class or void.
    values: class id of each colour.
  """

  colours: tuple[tuple[int, ...], ...]
  values: tuple[int, ...]

  def __call__(self, path: Path) -> np.ndarray:
    """Class ids uint8 (H, W), 255 where the picture is transparent.

    Raises:
      UserError: for a colour that is not listed, with its first place.
    """
    rgb, clear = codecs.read_colours(path)
    stored = rgb.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    known = np.array(self.colours, np.int64) @ np.array([1, 256, 65536])
    order = np.argsort(known)
    place = order[np.minimum(np.searchsorted(known[order], stored), len(known) - 1)]
    label = np.array(self.values, np.uint8)[place]
    unknown = known[place] != stored
    if clear is not None:
      label[clear] = base.IGNORE_LABEL
      unknown &= ~clear
    if unknown.any():
      row, col = np.argwhere(unknown)[0]
      red, green, blue = rgb[row, col]
      raise UserError(
        f"{path} has the colour {red} {green} {blue} at row {row}, column {col} (and in"
        f" {np.count_nonzero(unknown):,} pixels there is a colour that is no class); expected those"
        " of classes.txt. Soft edges come from drawing with anti-aliasing; a line"
        ' "void RED GREEN BLUE" is a colour that is not counted.'
      )
    return label


Rule = Callable[[np.ndarray], np.ndarray]


def _classes_and_rule(
  path: Path, labels: str, ignore: int
) -> tuple[tuple[str, ...], np.ndarray, Rule, Callable[[Path], np.ndarray]]:
  """Names, palette, stored values -> class ids, and how a label is read."""
  rule: Rule = functools.partial(map_ignored, ignore=ignore)
  read: Callable[[Path], np.ndarray] = codecs.read_label
  classes, palette = class_list.read_classes(path)
  if labels == "binary":
    if len(classes) == 1:
      classes = ("background", *classes)
      palette = np.concatenate([np.zeros((1, 3), np.uint8), palette])
    if len(classes) != 2:
      raise UserError(
        f"{path} lists {len(classes)} classes; data.options.labels=binary has two, what is 0 and"
        " what is 255 or 1."
      )
    rule = from_two_values
  if labels == "from_one":
    rule = functools.partial(from_one, ignore=ignore)
  if labels == "colours":
    entries = class_list.read_entries(path)
    bare = [name for name, colour in entries if colour is None]
    if bare:
      raise UserError(
        f"{path} gives no colour to {bare[0]!r}; data.options.labels=colours needs lines such as"
        f' "{bare[0]} 255 0 0".'
      )
    kept = [row for row, (name, _) in enumerate(entries) if name.lower() not in _VOID_NAMES]
    colours = [colour for _, colour in entries if colour is not None]
    if len(set(colours)) < len(colours):
      raise UserError(f"{path} gives one colour to two classes; expected different ones.")
    numbers = {row: number for number, row in enumerate(kept)}
    values = [numbers.get(row, base.IGNORE_LABEL) for row in range(len(entries))]
    classes, palette = tuple(classes[row] for row in kept), palette[kept]
    rule, read = files.unchanged, ColourReader(tuple(colours), tuple(values))
  if len(classes) == 1:
    raise UserError(_one_class(path, classes[0], ignore))
  return classes, palette, rule, read


def _one_class(path: Path, name: str, ignore: int) -> str:
  begin = f"{path} lists one class, {name!r}, for the label value 0"
  if ignore == 0:
    return (
      f"{begin}; with ignore=0 that value is not counted, and the value 1 has no class. Put a first"
      " line before it, background: the value 1 is then the second class."
    )
  return (
    f"{begin}. A softmax needs two classes: put a first line before it, background, for the value"
    f" 0; {name} is then the value 1 (or, with --config.data.options.labels=binary, 255)."
  )
