"""COCO instances: 80 classes of things that may overlap, 118,287 / 5,000 images; or yours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from effseg_jax.errors import extra, warn_once
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import base, coco_json, files, panoptic
from effseg_jax.input_pipeline.datasets.coco_panoptic import CLASS_TABLE as PANOPTIC_TABLE
from effseg_jax.input_pipeline.datasets.coco_panoptic import known_splits
from effseg_jax.input_pipeline.datasets.mask_runs import MaskRuns

TREE = """  annotations/instances_{train2017,val2017}.json
  {train2017,val2017}/*.jpg
(train2017.zip, val2017.zip and annotations_trainval2017.zip, unpacked into one folder), or
  {train,valid}/_annotations.coco.json    beside the pictures, as Roboflow exports it"""

_THINGS = np.flatnonzero(PANOPTIC_TABLE.things)
CLASS_TABLE = panoptic.ClassTable(
  tuple(PANOPTIC_TABLE.names[row] for row in _THINGS),
  np.ones(len(_THINGS), bool),
  PANOPTIC_TABLE.ids[_THINGS],
  PANOPTIC_TABLE.palette[_THINGS],
)
CLASSES, PALETTE = CLASS_TABLE.names, CLASS_TABLE.palette
_SPLITS = ("train2017", "val2017")
_BESIDE = "_annotations.coco.json"
# Masks of an image stay run lengths where they would take more than this, one byte a pixel.
_MOST_PIXELS = 1 << 26


@dataclasses.dataclass(frozen=True, eq=False)
class InstanceFiles(panoptic.UniversalDataset):
  """Photographs, and polygons that stay in their json until they are needed.

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
    """From the json, else from the file's header."""
    rows, cols = (int(side) for side in self.records.sizes[self.images[index]])
    if not rows:
      return codecs.image_size(self.image_folder / self._file_name(index))
    return rows, cols

  def ground_truth(self, index: int) -> panoptic.GroundTruth:
    """See `panoptic.UniversalDataset`; the largest segments lie in the first layer.

    Raises:
      UserError: for run lengths of another size than the image.
    """
    with extra("coco"):
      from pycocotools import mask as coco_mask

    row = self.images[index]
    window = slice(*self.records.offsets[row : row + 2])
    annotations = coco_json.read_annotations(
      self.json_path, self.records.begins[window], self.records.lengths[window]
    )
    size = self.image_size(index)
    rules = coco_json.AnnotationRules(self.json_path)
    drawn = [rules.draw(annotation, size) for annotation in annotations]
    kept = np.array([place for place, found in enumerate(drawn) if found is not None], np.int64)
    found = [drawn[place] for place in kept]
    areas = np.array(coco_mask.area(found) if found else [], np.int64)
    order = np.argsort(-areas, kind="stable")
    masks = MaskRuns.of([_bytes(found[place]["counts"]) for place in order], size)
    kept = kept[order]
    few = len(found) * size[0] * size[1] <= _MOST_PIXELS
    return panoptic.GroundTruth(
      panoptic.stack_layers(masks.masks(), size) if few else masks,
      self.annotation_labels[window][kept],
      self.records.crowd[window][kept],
      areas[order],
      coco_json.text(self.records.image_ids[row]),
      Path(self._file_name(index)).stem,
    )

  def _file_name(self, index: int) -> str:
    return self.records.image_names[self.images[index]].decode()


def open_split(root: str | Path | None, split: str, *, negatives: bool = False) -> InstanceFiles:
  """Opens `train2017`, `val2017`, or any other split in one of two layouts.

  `annotations/instances_<split>.json` with the pictures in `<split>`, or Roboflow's
  `<split>/_annotations.coco.json` beside the pictures. The classes are those of the json, sorted
  by id.

  Args:
    root: of the data set.
    split: of it.
    negatives: whether pictures without an object are trained on. The recipe leaves them out of
      splits whose name begins with `train`; they are always evaluated.
  """
  name = "coco_instances"
  base.require_split(split, known_splits(root, "instances", _SPLITS), name)
  path = Path(root or "") / split / _BESIDE
  if root is None or not path.is_file():
    folder = base.require_tree(root, name, f"annotations/instances_{split}.json", TREE)
    base.require_tree(root, name, split, TREE)
    path = folder / "annotations" / f"instances_{split}.json"
  pictures = Path(root) / split
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
  if split.startswith("train") and not negatives:
    counted = np.concatenate([[0], np.cumsum(~records.crowd)])
    images = images[np.diff(counted[records.offsets]) > 0]
    if len(images) < len(records.image_ids):
      warn_once(
        f"negatives {path}",
        f"{path}: {len(records.image_ids) - len(images):,} of {len(records.image_ids):,} images"
        " have no object and are not trained on; --config.data.options.negatives=True keeps them.",
      )
  base.require_some(tuple(images[:1]), name, split, path)
  names = coco_json.find_files(pictures, records.image_names[images], path)
  all_names = records.image_names.astype(object)
  all_names[images] = names
  records = records._replace(image_names=np.array(all_names.tolist()))
  return InstanceFiles(split, table, path, pictures, images, records, labels)


def _bytes(counts: str | bytes) -> bytes:
  return counts.encode("ascii") if isinstance(counts, str) else counts
