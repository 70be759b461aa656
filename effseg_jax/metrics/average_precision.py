"""Average precision of instance masks, by COCO's own code (pycocotools)."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline.datasets import coco_json
from effseg_jax.metrics.coco_results import ImageId, detections, encode_mask

# Names of the first six numbers that COCO's evaluation gives; -1 there means: no such object.
MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


class AveragePrecision:
  """Collects detections, and compares them with the truth at the end.

  AP is the mean over IoU thresholds 0.50, 0.55, ..., 0.95 and over the classes that occur, with at
  most 100 detections an image.

  Attributes:
    entries: the detections so far, in COCO's results format.
  """

  def __init__(
    self, class_ids: Sequence[int], things: Sequence[bool], truth: str | Path | None = None
  ):
    """Starts empty.

    Args:
      class_ids: int (K,), the data set's category id of each class.
      things: bool (K,); detections of the other classes are not counted.
      truth: the official instances json, which is read by the rules of training (see
        `coco_json.AnnotationRules`); None: the truth comes with `add_truth`.
    """
    self._ids = [int(value) for value in class_ids]
    self._things = np.asarray(things, bool)
    self._truth_path = None if truth is None else Path(truth)
    self._truth: list[dict[str, Any]] = []
    self._images: list[ImageId] = []
    self._sizes: dict[ImageId, tuple[int, int] | None] = {}
    self.entries: list[dict[str, Any]] = []

  def update(
    self, image_id: ImageId, masks: np.ndarray, labels: Sequence[int], scores: Sequence[float]
  ) -> None:
    """Adds the detections of an image; every image must come, also those without any.

    Args:
      image_id: as in the data set.
      masks: bool (n, H, W), at the image's own size.
      labels: int (n,), classes.
      scores: float (n,).
    """
    self._images.append(image_id)
    shape = np.shape(masks)  # without a detection it may not tell the image's size
    self._sizes[image_id] = (int(shape[1]), int(shape[2])) if len(shape) == 3 else None
    chosen = np.flatnonzero(self._things[np.asarray(labels, np.int64)])
    categories = [self._ids[labels[row]] for row in chosen]
    self.entries += detections(
      image_id, (masks[row] for row in chosen), categories, [scores[row] for row in chosen]
    )

  def add_truth(
    self,
    image_id: ImageId,
    masks: Iterable[np.ndarray],
    labels: Sequence[int],
    crowd: Sequence[bool],
  ) -> None:
    """Adds the truth of an image, where there is no official json.

    Args:
      image_id: as in the data set.
      masks: n of bool (H, W).
      labels: int (n,), classes; stuff is passed over.
      crowd: bool (n,); detections inside a crowd are no mistakes.
    """
    for mask, label, is_crowd in zip(masks, labels, crowd, strict=True):
      if self._things[label]:
        self._truth.append(
          {
            "image_id": image_id,
            "category_id": self._ids[label],
            "segmentation": encode_mask(mask),
            "area": int(np.count_nonzero(mask)),
            "iscrowd": int(is_crowd),
          }
        )

  def to_bytes(self) -> bytes:
    """The collected entries, to be sent to another process; see `merge_bytes`."""
    sizes = [self._sizes[image_id] for image_id in self._images]
    return json.dumps([self._images, sizes, self._truth, self.entries]).encode()

  def merge_bytes(self, collected: bytes) -> None:
    """Adds the entries of another process."""
    images, sizes, truth, entries = json.loads(collected)
    self._images += images
    for image_id, size in zip(images, sizes, strict=True):
      self._sizes[image_id] = None if size is None else tuple(size)
    self._truth += truth
    self.entries += entries

  def result(self) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates everything.

    Returns:
      `AP`, `AP50`, `AP75` and those of small, medium and large objects, 0 to 1, without those that
      no object counts for; and AP per class, float64 (K,), NaN for classes without an object.

    Raises:
      UserError: if the official json cannot be read, or lacks an image.
    """
    per_class = np.full(len(self._ids), np.nan)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
      evaluation = self._evaluate()
    if evaluation is None:
      return {}, per_class
    # (threshold, recall, class, area range, number of detections)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    rows = [self._ids.index(category) for category in evaluation.params.catIds]
    for row, values in zip(rows, np.moveaxis(precision, 2, 0), strict=True):
      if (values > -1).any():
        per_class[row] = values[values > -1].mean()
    stats = zip(MEASURES, evaluation.stats, strict=False)
    return {name: float(value) for name, value in stats if value >= 0}, per_class

  def _evaluate(self) -> Any:
    with extra("coco"):
      from pycocotools.coco import COCO
      from pycocotools.cocoeval import COCOeval

    truth = self._read_truth(COCO)
    if not truth.anns:
      return None
    # Copies, because the evaluation writes into them.
    found = [dict(entry) for entry in self.entries]
    detected = truth.loadRes(found) if found else _of_nothing(COCO, truth)
    evaluation = COCOeval(truth, detected, "segm")
    evaluation.params.imgIds = sorted(set(self._images))
    evaluation.params.catIds = sorted(np.array(self._ids)[self._things].tolist())
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation

  def _read_truth(self, coco: Any) -> Any:
    annotations: list[dict[str, Any]]
    if self._truth_path is not None:
      annotations, listed = coco_json.read_truth(self._truth_path, self._sizes)
      missing = [image for image in self._images if image not in listed]
      if missing:
        raise UserError(
          f"{self._truth_path} lacks {len(missing)} of {len(self._images)} evaluated images; the"
          f" first has the id {missing[0]}."
        )
    else:
      # Ids begin at 1: the evaluation uses 0 for "no match".
      annotations = [{**entry, "id": number} for number, entry in enumerate(self._truth, 1)]
    truth = coco()
    truth.dataset = {
      "info": {},
      # Sizes are required but not used: run lengths have their own.
      "images": [{"id": image, "height": 0, "width": 0} for image in sorted(set(self._images))],
      "categories": [{"id": self._ids[row]} for row in np.flatnonzero(self._things)],
      "annotations": annotations,
    }
    truth.createIndex()
    return truth


def _of_nothing(coco: Any, truth: Any) -> Any:
  empty = coco()
  empty.dataset = {**truth.dataset, "annotations": []}
  empty.createIndex()
  return empty
