"""Cityscapes, finely annotated: 19 classes, 2048x1024, 2,975 / 500 images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError, warn_once
from effseg_jax.input_pipeline.datasets import base, files

TREE = """  leftImg8bit/{train,val}/<city>/<city>_*_leftImg8bit.png
  gtFine/{train,val}/<city>/<city>_*_gtFine_labelIds.png    or _gtFine_labelTrainIds.png
(leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, unpacked into one folder)"""

# (name, id in *_labelIds.png, colour); the position is the train id.
_TABLE = (
  ("road", 7, (128, 64, 128)),
  ("sidewalk", 8, (244, 35, 232)),
  ("building", 11, (70, 70, 70)),
  ("wall", 12, (102, 102, 156)),
  ("fence", 13, (190, 153, 153)),
  ("pole", 17, (153, 153, 153)),
  ("traffic light", 19, (250, 170, 30)),
  ("traffic sign", 20, (220, 220, 0)),
  ("vegetation", 21, (107, 142, 35)),
  ("terrain", 22, (152, 251, 152)),
  ("sky", 23, (70, 130, 180)),
  ("person", 24, (220, 20, 60)),
  ("rider", 25, (255, 0, 0)),
  ("car", 26, (0, 0, 142)),
  ("truck", 27, (0, 0, 70)),
  ("bus", 28, (0, 60, 100)),
  ("train", 31, (0, 80, 100)),
  ("motorcycle", 32, (0, 0, 230)),
  ("bicycle", 33, (119, 11, 32)),
)
CLASSES = tuple(name for name, _, _ in _TABLE)
PALETTE = np.array([colour for _, _, colour in _TABLE], np.uint8)
_ID_TABLE = files.label_table({stored: index for index, (_, stored, _) in enumerate(_TABLE)}, 34)
_SPLITS = {"train": ("train",), "val": ("val",), "trainval": ("train", "val")}
_SUFFIX = {"ids": "_gtFine_labelIds.png", "train_ids": "_gtFine_labelTrainIds.png"}


def ids_to_classes(label: np.ndarray) -> np.ndarray:
  """The 34 official ids: 19 are classes, the rest is not evaluated."""
  return files.by_table(label, _ID_TABLE)


def open_split(
  root: str | Path | None, split: str, *, labels: str = "auto"
) -> base.SegmentationFiles:
  """Opens `train`, `val` or `trainval`.

  Args:
    root: folder with `leftImg8bit` and `gtFine`.
    split: of the data set.
    labels: `ids` for *_labelIds.png, `train_ids` for *_labelTrainIds.png, `auto` for the first of
      them that the first image has.
  """
  base.require_split(split, tuple(_SPLITS), "cityscapes")
  if labels not in (*_SUFFIX, "auto"):
    raise UserError(f"data.options.labels is {labels!r}; expected auto, {', '.join(_SUFFIX)}.")
  images: list[Path] = []
  for part in _SPLITS[split]:
    folder = base.require_tree(root, "cityscapes", f"leftImg8bit/{part}", TREE)
    images += files.list_images(folder / "leftImg8bit" / part, "*/*_leftImg8bit.png")
  base.require_some(tuple(images), "cityscapes", split, folder / "leftImg8bit")
  if labels == "auto":
    present = [kind for kind in _SUFFIX if _label_path(images[0], kind).is_file()]
    labels = present[0] if present else "ids"
    if len(present) > 1:
      warn_once(
        f"cityscapes {root}",
        f"cityscapes: {root} holds *{_SUFFIX['ids']} and *{_SUFFIX['train_ids']}; the first are"
        " read (the 19 official classes). --config.data.options.labels=train_ids reads the others;"
        " with classes of your own, use the data set folder, whose classes.txt names them.",
      )
  kind = labels
  pairs = files.pair_up(images, lambda image: _label_path(image, kind), "cityscapes")
  rule = ids_to_classes if labels == "ids" else files.unchanged
  return base.SegmentationFiles("cityscapes", split, CLASSES, PALETTE, pairs, rule)


def _label_path(image: Path, kind: str) -> Path:
  """leftImg8bit/<part>/<city>/<name>_leftImg8bit.png -> gtFine/<part>/<city>/<name>_gtFine_*.png"""
  part, city = image.parts[-3:-1]
  name = image.name.removesuffix("_leftImg8bit.png") + _SUFFIX[kind]
  return image.parents[3] / "gtFine" / part / city / name
