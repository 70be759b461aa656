"""COCO instances: 80 classes of things that may overlap, 118,287 / 5,000 images; or yours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import base, coco_json, files, panoptic
from effseg_jax.input_pipeline.datasets.coco_panoptic import CLASS_TABLE as PANOPTIC_TABLE
from effseg_jax.input_pipeline.datasets.coco_panoptic import known_splits

TREE = """  annotations/instances_{train2017,val2017}.json
  {train2017,val2017}/*.jpg
(train2017.zip, val2017.zip and annotations_trainval2017.zip, unpacked into one folder)"""

_THINGS = np.flatnonzero(PANOPTIC_TABLE.things)
CLASS_TABLE = panoptic.ClassTable(
  tuple(PANOPTIC_TABLE.names[row] for row in _THINGS),
  np.ones(len(_THINGS), bool),
  PANOPTIC_TABLE.ids[_THINGS],
  PANOPTIC_TABLE.palette[_THINGS],
)
CLASSES, PALETTE = CLASS_TABLE.names, CLASS_TABLE.palette
_SPLITS = ("train2017", "val2017")


@dataclasses.dataclass(frozen=True, eq=False)
class InstanceFiles(panoptic.UniversalDataset):
  """Photographs, and polygons that stay in their json until they are asked for.

  Attributes:
    split: of the data set.
    table: its classes.
    json_path: of the annotations.
    image_folder: of the photographs.
    images: int64 (N,), the examples among the records' images.
    records: where the annotations are.
    annotation_labels: int32 (M,), class ids.
  """

  split: str
  table: panoptic.ClassTable
  json_path: Path
  image_folder: Path
  images: np.ndarray
  records: coco_json.InstanceRecords
  annotation_labels: np.ndarray

  name = "coco_instances"

  @property
  def instances_json(self) -> Path:
    """The annotations are the official ones."""
    return self.json_path

  def __len__(self) -> int:
    return len(self.images)

  def image(self, index: int) -> np.ndarray:
    """See `panoptic.UniversalDataset`."""
    return codecs.read_image(self.image_folder / self._file_name(index))

  def image_size(self, index: int) -> tuple[int, int]:
    """As the json tells it."""
    rows, cols = self.records.sizes[self.images[index]]
    return int(rows), int(cols)

  def ground_truth(self, index: int) -> panoptic.GroundTruth:
    """See `panoptic.UniversalDataset`; the largest segments lie in the first layer.

    Raises:
      UserError: for a segmentation that is neither polygons nor run lengths.
    """
    row = self.images[index]
    window = slice(*self.records.offsets[row : row + 2])
    annotations = coco_json.read_annotations(
      self.json_path, self.records.begins[window], self.records.lengths[window]
    )
    size = self.image_size(index)
    masks = np.zeros((len(annotations), *size), bool)
    for mask, annotation in zip(masks, annotations, strict=True):
      mask[:] = self._draw(annotation, size)
    areas = masks.sum(axis=(1, 2))
    order = np.argsort(-areas, kind="stable")
    return panoptic.GroundTruth(
      panoptic.stack_layers(masks[order], size),
      self.annotation_labels[window][order],
      self.records.crowd[window][order],
      areas[order],
      coco_json.text(self.records.image_ids[row]),
      Path(self._file_name(index)).stem,
    )

  def _draw(self, annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    with extra("coco"):
      from pycocotools import mask as coco_mask

    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):  # polygons of fewer than three points enclose nothing
      segmentation = [points for points in segmentation if len(points) >= 6]
      if not segmentation:
        return np.zeros(size, bool)
    try:
      runs = segmentation
      if isinstance(segmentation, list):
        runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
      elif isinstance(segmentation["counts"], list):
        runs = coco_mask.frPyObjects(segmentation, *size)
      mask = coco_mask.decode(runs)
    except Exception as error:  # a C extension raises whatever it meets
      raise self._unreadable(annotation, f"({error})") from None
    if mask.shape != size:
      raise self._unreadable(annotation, f"of the size {mask.shape[0]}x{mask.shape[1]}")
    return mask.astype(bool)

  def _unreadable(self, annotation: dict[str, Any], what: str) -> UserError:
    return UserError(
      f"{self.json_path}: annotation {annotation.get('id')} of image"
      f" {annotation.get('image_id')} has a segmentation {what} that cannot be read; expected"
      " polygons or run lengths of the image's size."
    )

  def _file_name(self, index: int) -> str:
    return self.records.image_names[self.images[index]].decode()


def open_split(root: str | Path | None, split: str) -> InstanceFiles:
  """Opens `train2017`, `val2017`, or any `annotations/instances_<split>.json` with its folder.

  As the recipe does it, images without an instance are no training examples: a split whose name
  begins with `train` leaves them out. The classes are those of the json, sorted by id.
  """
  name = "coco_instances"
  base.require_split(split, known_splits(root, "instances", _SPLITS), name)
  folder = base.require_tree(root, name, f"annotations/instances_{split}.json", TREE)
  base.require_tree(root, name, split, TREE)
  path = folder / "annotations" / f"instances_{split}.json"
  records = coco_json.read_instances(path)
  table = panoptic.category_table(
    records.categories, files.distinct_palette(len(records.categories)), things_first=False
  )
  if np.array_equal(table.ids, CLASS_TABLE.ids):
    table = CLASS_TABLE
  labels = coco_json.class_ids(
    records.category_ids, table.ids, path, records.offsets, records.image_ids
  )
  images = np.arange(len(records.image_ids))
  if split.startswith("train"):
    counted = np.concatenate([[0], np.cumsum(~records.crowd)])
    images = images[np.diff(counted[records.offsets]) > 0]
  base.require_some(tuple(images[:1]), name, split, path)
  coco_json.require_files(folder / split, records.image_names[images], path)
  return InstanceFiles(split, table, path, folder / split, images, records, labels)
