"""mIoU and its relatives from one confusion matrix, exact and mergeable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops import backend

# Elements of one example's one-hot matrix that are made at a time.
_STRIP_CELLS = 2**20


def confusion_counts(
  prediction: jax.Array,
  label: jax.Array,
  num_classes: int,
  ignore_label: int = 255,
  weight: jax.Array | None = None,
) -> jax.Array:
  """Counts (label, prediction) pairs on the device, in memory for one matrix.

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
  prediction = prediction.astype(jnp.int32)
  if backend.platform() == "tpu":
    return _counts_by_products(prediction, jnp.where(counted, label, -1), num_classes)
  # One matrix for the whole batch: a sharded one gives a matrix per device, and they are summed.
  # Ignored pixels are mapped beyond the last cell and dropped.
  cells = jnp.where(counted, label * num_classes + prediction, num_classes**2)
  counts = jnp.zeros((num_classes**2,), jnp.int32).at[cells].add(1, mode="drop")
  return counts.reshape(num_classes, num_classes)


def _counts_by_products(prediction: jax.Array, label: jax.Array, num_classes: int) -> jax.Array:
  """Counts as products of one-hot matrices: TPUs add colliding indices one after the other.

  Args:
    prediction: int32 (B, ...).
    label: int32 (B, ...), negative where pixels are ignored.
    num_classes: K.

  Returns:
    int32 (K, K).
  """
  batch = label.shape[0]
  pixels = label.size // batch
  # One-hot rows exist for a strip of pixels at a time, a megabyte for each example.
  strips = max(-(-pixels * num_classes // _STRIP_CELLS), 1)
  length = -(-pixels // strips)

  def cut(x: jax.Array) -> jax.Array:
    padded = jnp.pad(
      x.reshape(batch, pixels), ((0, 0), (0, strips * length - pixels)), constant_values=-1
    )
    return padded.reshape(batch, strips, length).swapaxes(0, 1)

  def add_strip(counts: jax.Array, strip: tuple[jax.Array, jax.Array]):
    labels, predictions = (jax.nn.one_hot(x, num_classes, dtype=jnp.int8) for x in strip)
    # Integers to the end: sums of float32 are exact up to 2^24 only.
    products = jnp.einsum("bnk,bnl->kl", labels, predictions, preferred_element_type=jnp.int32)
    return counts + products, None

  counts = jnp.zeros((num_classes, num_classes), jnp.int32)
  return jax.lax.scan(add_strip, counts, (cut(label), cut(prediction)))[0]


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
