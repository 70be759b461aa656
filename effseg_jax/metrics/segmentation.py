"""mIoU and its relatives from one confusion matrix, exact and mergeable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def confusion_counts(
  prediction: jax.Array,
  label: jax.Array,
  num_classes: int,
  ignore_label: int = 255,
  weight: jax.Array | None = None,
) -> jax.Array:
  """Counts (label, prediction) pairs on the device.

  Args:
    prediction: int (B, ...), 0 to num_classes - 1.
    label: int (B, ...), a class or `ignore_label`.
    num_classes: K.
    ignore_label: pixels of this label are not counted.
    weight: (B,); examples of weight 0 are not counted.

  Returns:
    int32 (K, K); rows are labels, columns predictions.
  """
  label = label.astype(jnp.int32)
  counted = label != ignore_label
  if weight is not None:
    counted &= (weight > 0).reshape((-1,) + (1,) * (label.ndim - 1))
  pairs = jnp.where(counted, label * num_classes + prediction.astype(jnp.int32), num_classes**2)

  # Counted per example and then summed, so that a sharded batch is reduced and never gathered.
  count = lambda x: jnp.bincount(x.ravel(), length=num_classes**2 + 1)  # noqa: E731
  counts = jnp.sum(jax.vmap(count)(pairs), axis=0, dtype=jnp.int32)
  return counts[:-1].reshape(num_classes, num_classes)


class ConfusionMatrix:
  """Accumulates counts in int64 on the host.

  IoU of a class is intersection over union, summed over the whole data set; a class that occurs
  neither in labels nor in predictions is left out of the mean (MMSegmentation's rule).

  Attributes:
    counts: int64 (K, K); rows are labels, columns predictions.
  """

  def __init__(self, num_classes: int):
    self.counts = np.zeros((num_classes, num_classes), np.int64)

  def update(self, counts: Any) -> None:
    """Adds counts of any integer type, (K, K)."""
    self.counts += np.asarray(counts).astype(np.int64)

  def merge(self, other: ConfusionMatrix) -> None:
    """Adds another accumulator's counts."""
    self.counts += other.counts

  def iou(self) -> np.ndarray:
    """Intersection over union, float64 (K,); NaN for absent classes."""
    return self._ratio(self._labels() + self._predictions() - np.diag(self.counts))

  def accuracy(self) -> np.ndarray:
    """Share of each class's pixels that are right, float64 (K,); NaN where there are none."""
    return self._ratio(self._labels())

  def miou(self) -> float:
    """Mean IoU, 0 to 1."""
    return _mean(self.iou())

  def mean_accuracy(self) -> float:
    """Mean of the classes' accuracies, 0 to 1."""
    return _mean(self.accuracy())

  def pixel_accuracy(self) -> float:
    """Share of all counted pixels that are right, 0 to 1."""
    return float(np.trace(self.counts) / max(self.counts.sum(), 1))

  def summary(self) -> dict[str, float]:
    """The three means."""
    return {
      "mIoU": self.miou(),
      "mean_accuracy": self.mean_accuracy(),
      "pixel_accuracy": self.pixel_accuracy(),
    }

  def table(self, classes: Sequence[str]) -> str:
    """A text table in percent: a line per class, then the means."""
    width = max(len(name) for name in (*classes, "mean"))
    share = self._labels() / max(self.counts.sum(), 1)
    lines = [f"{'class':<{width}}    IoU    acc  share"]
    for name, iou, accuracy, part in zip(classes, self.iou(), self.accuracy(), share, strict=True):
      lines.append(f"{name:<{width}} {_percent(iou)} {_percent(accuracy)} {_percent(part)}")
    means = f"{_percent(self.miou())} {_percent(self.mean_accuracy())}"
    lines.append(f"{'mean':<{width}} {means}        pixel acc {100 * self.pixel_accuracy():.2f}")
    return "\n".join(lines)

  def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
    """The means, and IoU and accuracy per class name (None where absent), for `metrics.json`."""
    per_class = {
      name: {"iou": _or_none(iou), "accuracy": _or_none(accuracy)}
      for name, iou, accuracy in zip(classes, self.iou(), self.accuracy(), strict=True)
    }
    return {**self.summary(), "classes": per_class}

  def _labels(self) -> np.ndarray:
    return self.counts.sum(axis=1)

  def _predictions(self) -> np.ndarray:
    return self.counts.sum(axis=0)

  def _ratio(self, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
      return np.where(denominator > 0, np.diag(self.counts) / denominator, np.nan)


def _mean(values: np.ndarray) -> float:
  present = values[~np.isnan(values)]
  return float(present.mean()) if present.size else 0.0


def _percent(value: float) -> str:
  return "     -" if np.isnan(value) else f"{100 * value:6.2f}"


def _or_none(value: float) -> float | None:
  return None if np.isnan(value) else float(value)
