"""Cityscapes with instances: 19 classes, 8 of them things; 2048x1024, 2,975 / 500 images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import base, cityscapes, coco_panoptic, files, panoptic

TREE = """  leftImg8bit/{train,val}/<city>/<city>_*_leftImg8bit.png
  gtFine/{train,val}/<city>/<city>_*_gtFine_instanceIds.png
  or, as cityscapesscripts' createPanopticImgs.py leaves them:
  gtFine/cityscapes_panoptic_{train,val}.json    gtFine/cityscapes_panoptic_{train,val}/*.png
(leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, unpacked into one folder)"""

CLASSES, PALETTE = cityscapes.CLASSES, cityscapes.PALETTE
_NUM_IDS = 34
# Class of each label id, 255 where it is not evaluated.
_LABELS = cityscapes.ids_to_classes(np.arange(_NUM_IDS, dtype=np.uint8))
CLASS_TABLE = panoptic.ClassTable(
  CLASSES,
  np.isin(CLASSES, ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")),
  np.argsort(_LABELS, kind="stable")[: len(CLASSES)],
  PALETTE,
)
_SPLITS = {"train": ("train",), "val": ("val",), "trainval": ("train", "val")}
_IMAGE, _INSTANCES = "_leftImg8bit.png", "_gtFine_instanceIds.png"
# Ids from here on are 1000 times the class and a number; smaller ones are a class alone.
_FIRST_INSTANCE = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class CityscapesInstances(panoptic.UniversalDataset):
  """Photographs and the official *_instanceIds.png.

  Each id is a segment. A thing without a number is a group, and becomes a crowd.

  Attributes:
    split: of the data set.
    pairs: (image, instance ids) paths.
  """

  split: str
  pairs: tuple[tuple[Path, Path], ...]

  name = "cityscapes_panoptic"
  table = CLASS_TABLE

  def __len__(self) -> int:
    return len(self.pairs)

  def image(self, index: int) -> np.ndarray:
    """See `panoptic.UniversalDataset`."""
    return codecs.read_image(self.pairs[index][0])

  def image_size(self, index: int) -> tuple[int, int]:
    """From the image's header."""
    return codecs.image_size(self.pairs[index][0])

  def ground_truth(self, index: int) -> panoptic.GroundTruth:
    """See `panoptic.UniversalDataset`.

    Raises:
      UserError: for ids that are neither a class nor an instance, or no segment at all.
    """
    image, path = self.pairs[index]
    stored = codecs.read_label(path).astype(np.int64)
    areas = np.bincount(stored.ravel())
    ids = np.flatnonzero(areas)
    kinds = np.where(ids >= _FIRST_INSTANCE, ids // _FIRST_INSTANCE, ids)
    bad = ids[kinds >= _NUM_IDS]
    if len(bad):
      raise UserError(
        f"{path} holds the instance id {bad[0]}; expected a label id below {_NUM_IDS}, or"
        f" {_FIRST_INSTANCE} times one and a number."
      )
    labels = _LABELS[kinds]
    kept = labels != base.IGNORE_LABEL
    if not kept.any():
      raise UserError(f"{path} has no segments of the evaluated classes; expected one at least.")
    rows = np.full(len(areas), -1, np.int16)
    rows[ids[kept]] = np.arange(np.count_nonzero(kept))
    labels = labels[kept].astype(np.int32)
    return panoptic.GroundTruth(
      rows[stored][None],
      labels,
      CLASS_TABLE.things[labels] & (ids[kept] < _FIRST_INSTANCE),
      areas[ids[kept]],
      image.name.removesuffix(_IMAGE),
      image.stem,
    )


def open_split(root: str | Path | None, split: str) -> panoptic.UniversalDataset:
  """Opens `train`, `val` or `trainval`.

  The official instance ids are read where the first image has them; otherwise the panoptic PNGs,
  of one split at a time.
  """
  name = "cityscapes_panoptic"
  base.require_split(split, tuple(_SPLITS), name)
  images: list[Path] = []
  for part in _SPLITS[split]:
    folder = base.require_tree(root, name, f"leftImg8bit/{part}", TREE)
    images += files.list_images(folder / "leftImg8bit" / part, f"*/*{_IMAGE}")
  base.require_some(tuple(images), name, split, folder / "leftImg8bit")
  prepared = folder / "gtFine" / f"{name}_{split}.json"
  if prepared.is_file() and not _instances_of(images[0]).is_file():
    return coco_panoptic.open_json(
      name,
      split,
      prepared,
      image_folder=folder / "leftImg8bit" / split,
      png_folder=prepared.with_suffix(""),
      things_first=False,
      official=CLASS_TABLE,
      image_name=lambda image_id, _: f"{image_id.split('_')[0]}/{image_id}{_IMAGE}",
    )
  return CityscapesInstances(split, files.pair_up(images, _instances_of, name))


def _instances_of(image: Path) -> Path:
  """leftImg8bit/<part>/<city>/<name>_leftImg8bit.png -> gtFine/..._gtFine_instanceIds.png"""
  part, city = image.parts[-3:-1]
  name = image.name.removesuffix(_IMAGE) + _INSTANCES
  return image.parents[3] / "gtFine" / part / city / name
