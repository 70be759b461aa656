"""Panoptic quality (Kirillov et al., CVPR 2019), with the rules of COCO's panopticapi."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# IoUs are summed in units of 2^-40: sums of integers do not depend on their order, so that any
# number of processes finds the same quality. Eight million matches fit.
_IOU_UNIT = float(2**40)

# Panoptic, segmentation and recognition quality: of all classes, of things and of stuff.
MEASURES = tuple(name + group for group in ("", "_th", "_st") for name in ("PQ", "SQ", "RQ"))


class PanopticQuality:
  """Counts matched, missed and invented segments, in int64 on the host.

  A predicted and a true segment of one class match where their IoU is above one half; void pixels
  of the truth are left out of the union. A prediction without a match is no mistake if more than
  half of it lies on void pixels or on the crowd of its class.

  Attributes:
    counts: int64 (K, 4); per class the sum of IoUs over matches in units of 2^-40, then matches
      (TP), predictions without a match (FP) and true segments without one (FN).
    things: bool (K,).
  """

  def __init__(self, things: Sequence[bool]):
    """Starts with zero counts.

    Args:
      things: bool (K,), which classes are things.
    """
    self.things = np.asarray(things, bool)
    self.counts = np.zeros((len(self.things), 4), np.int64)

  def update(
    self,
    prediction: np.ndarray,
    labels: np.ndarray,
    truth: np.ndarray,
    truth_labels: np.ndarray,
    *,
    crowd: np.ndarray | None = None,
    areas: np.ndarray | None = None,
  ) -> None:
    """Counts an image.

    Args:
      prediction: int (H, W), the row in `labels` at each pixel; negative for none.
      labels: int (m,), class of each predicted segment.
      truth: int (H, W), the row in `truth_labels` at each pixel; negative for void.
      truth_labels: int (n,).
      crowd: bool (n,); true segments that can neither match nor be missed.
      areas: int (n,), pixels of the true segments as annotated; by default as they are in `truth`.
    """
    self.counts += image_counts(
      prediction, labels, truth, truth_labels, len(self.things), crowd=crowd, areas=areas
    )

  def quality(self) -> np.ndarray:
    """PQ, SQ and RQ per class, float64 (K, 3), 0 to 1; NaN for classes that never occur."""
    iou = self.counts[:, 0] / _IOU_UNIT
    matched, invented, missed = self.counts[:, 1:].T.astype(np.float64)
    with np.errstate(invalid="ignore"):
      recognition = matched / (matched + (invented + missed) / 2)
    segmentation = iou / np.maximum(matched, 1)
    segmentation[np.isnan(recognition)] = np.nan
    return np.stack([segmentation * recognition, segmentation, recognition], axis=1)

  def summary(self) -> dict[str, float]:
    """Means over all classes that occur, over things and over stuff: `PQ`, `PQ_th`, `PQ_st`, ..."""
    quality = self.quality()
    groups = (np.ones_like(self.things), self.things, ~self.things)
    values = (_mean(column) for chosen in groups for column in quality[chosen].T)
    return dict(zip(MEASURES, values, strict=True))

  def table(self, classes: Sequence[str]) -> str:
    """A text table in percent: a line per class, then the means."""
    width = max(len(name) for name in (*classes, "things"))
    lines = [f"{'class':<{width}}     PQ     SQ     RQ     TP     FP     FN"]
    for name, quality, counts in zip(classes, self.quality(), self.counts, strict=True):
      numbers = " ".join(f"{count:6d}" for count in counts[1:])
      lines.append(f"{name:<{width}} {_percent(quality)} {numbers}")
    means = self.summary()
    for name, suffix in (("things", "_th"), ("stuff", "_st"), ("all", "")):
      quality = [means[measure + suffix] for measure in ("PQ", "SQ", "RQ")]
      total = self._group(suffix).sum(axis=0)
      numbers = " ".join(f"{count:6d}" for count in total[1:])
      lines.append(f"{name:<{width}} {_percent(quality)} {numbers}")
    return "\n".join(lines)

  def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
    """The means, and the measures and counts per class name, for `metrics.json`."""
    per_class = {}
    for name, quality, counts in zip(classes, self.quality(), self.counts, strict=True):
      measures = {key: _or_none(q) for key, q in zip(("PQ", "SQ", "RQ"), quality, strict=True)}
      tallies = {key: int(n) for key, n in zip(("TP", "FP", "FN"), counts[1:], strict=True)}
      per_class[name] = {**measures, **tallies}
    return {**self.summary(), "classes": per_class}

  def _group(self, suffix: str) -> np.ndarray:
    chosen = {"_th": self.things, "_st": ~self.things, "": slice(None)}[suffix]
    return self.counts[chosen]


def image_counts(
  prediction: np.ndarray,
  labels: np.ndarray,
  truth: np.ndarray,
  truth_labels: np.ndarray,
  num_classes: int,
  *,
  crowd: np.ndarray | None = None,
  areas: np.ndarray | None = None,
) -> np.ndarray:
  """The counts of one image, int64 (num_classes, 4); see `PanopticQuality` and its `update`."""
  labels, truth_labels = np.asarray(labels, np.int64), np.asarray(truth_labels, np.int64)
  num_predicted, num_true = len(labels), len(truth_labels)
  crowd = np.zeros(num_true, bool) if crowd is None else np.asarray(crowd, bool)

  # Pixels of each pair of a true and a predicted segment; void and none come first.
  cells = (np.maximum(truth, -1).astype(np.int64) + 1) * (num_predicted + 1)
  cells += np.maximum(prediction, -1).astype(np.int64) + 1
  pairs = np.bincount(cells.ravel(), minlength=(num_true + 1) * (num_predicted + 1))
  pairs = pairs.reshape(num_true + 1, num_predicted + 1)
  common, on_void = pairs[1:, 1:], pairs[0, 1:]
  predicted_areas = pairs[:, 1:].sum(axis=0)
  areas = pairs[1:].sum(axis=1) if areas is None else np.asarray(areas, np.int64)

  union = predicted_areas[None] + areas[:, None] - common - on_void[None]
  possible = (truth_labels[:, None] == labels[None]) & ~crowd[:, None] & (common > 0)
  iou = np.where(possible, common / np.maximum(union, 1), 0.0)
  row, column = np.nonzero(iou > 0.5)

  missed = ~crowd
  missed[row] = False
  excused = on_void.copy()
  # As in panopticapi, one crowd counts per class: the last.
  last_crowd = np.full(num_classes, -1)
  last_crowd[truth_labels[crowd]] = np.flatnonzero(crowd)
  own_crowd = last_crowd[labels]
  hidden = np.flatnonzero(own_crowd >= 0)
  excused[hidden] += common[own_crowd[hidden], hidden]
  # A predicted segment without a pixel does not exist.
  invented = (predicted_areas > 0) & (2 * excused <= predicted_areas)
  invented[column] = False

  counts = np.zeros((num_classes, 4), np.int64)
  matches = np.rint(iou[row, column] * _IOU_UNIT).astype(np.int64)
  np.add.at(counts[:, 0], truth_labels[row], matches)
  counts[:, 1] = np.bincount(truth_labels[row], minlength=num_classes)
  counts[:, 2] = np.bincount(labels[invented], minlength=num_classes)
  counts[:, 3] = np.bincount(truth_labels[missed], minlength=num_classes)
  return counts


def _mean(values: np.ndarray) -> float:
  present = values[~np.isnan(values)]
  return float(present.mean()) if present.size else 0.0


def _percent(values: Sequence[float]) -> str:
  return " ".join("     -" if np.isnan(value) else f"{100 * value:6.2f}" for value in values)


def _or_none(value: float) -> float | None:
  return None if np.isnan(value) else float(value)
