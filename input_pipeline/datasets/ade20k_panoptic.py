"""ADE20K with instances: the 150 classes, 100 of them things; 20,210 / 2,000 images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effseg_jax.input_pipeline.datasets import ade20k, base, coco_panoptic, panoptic

TREE = """  images/{training,validation}/*.jpg
  ade20k_panoptic_train.json    ade20k_panoptic_train/*.png
  ade20k_panoptic_val.json      ade20k_panoptic_val/*.png
(ADEChallengeData2016, after Mask2Former's prepare_ade20k_pan_seg.py has run on it)"""

_STUFF = (
  *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60),
  *(61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131),
  *(140, 141, 145),
)
CLASSES, PALETTE = ade20k.CLASSES, ade20k.PALETTE
CLASS_TABLE = panoptic.ClassTable(
  CLASSES, ~np.isin(np.arange(150), _STUFF), np.arange(150, dtype=np.int64), PALETTE
)
_SPLITS = {"training": "train", "validation": "val"}


def open_split(root: str | Path | None, split: str) -> panoptic.PanopticFiles:
  """Opens `training` or `validation`; the classes keep the order of the semantic benchmark."""
  name = "ade20k_panoptic"
  base.require_split(split, tuple(_SPLITS), name)
  stem = f"ade20k_panoptic_{_SPLITS[split]}"
  for probe in (f"{stem}.json", stem, f"images/{split}"):
    folder = base.require_tree(root, name, probe, TREE)
  return coco_panoptic.open_json(
    name,
    split,
    folder / f"{stem}.json",
    image_folder=folder / "images" / split,
    png_folder=folder / stem,
    things_first=False,
    official=CLASS_TABLE,
    # The preparation draws stuff first and lists its area before things are drawn over it.
    stuff_may_be_covered=True,
  )
