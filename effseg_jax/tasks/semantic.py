"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError, require_one_of
from effseg_jax.metrics.segmentation import ConfusionMatrix, confusion_counts
from effseg_jax.ops.cross_entropy import upsampled_cross_entropy
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize

Batch = Mapping[str, jax.Array]

NORMALIZE_BY = ("all", "valid")


@dataclasses.dataclass(frozen=True)
class SemanticTask:
  """Pixel classification with one cross-entropy at label resolution.

  Attributes:
    classes: name per class id.
    palette: (red, green, blue), 0 to 255, per class id.
    ignore_label: label value that is neither trained on nor counted.
    mean: of the normalisation, per RGB channel, in uint8 units.
    std: of the normalisation, per RGB channel, in uint8 units.
    normalize_by: divisor of the summed loss: `"all"` pixels, ignored and padded ones
      included, as the official AFFormer training does, or `"valid"` pixels.
    class_weights: weight of each class's pixels in the loss; empty for 1 each.
    aux_weight: of each auxiliary head's loss, for models that have such heads.
    unused: classes that no label can have, because their value is not counted; never predicted.
  """

  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  ignore_label: int = 255
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  normalize_by: str = "all"
  class_weights: tuple[float, ...] = ()
  aux_weight: float = 0.4
  unused: tuple[int, ...] = ()

  # Several views of an image are averaged as probabilities.
  averages_scores = False

  def __post_init__(self) -> None:
    """Raises `UserError` for an unknown word, or weights of other classes."""
    require_one_of("task.normalize_by", self.normalize_by, NORMALIZE_BY)
    if self.class_weights and len(self.class_weights) != len(self.classes):
      raise UserError(
        f"task.class_weights has {len(self.class_weights)} numbers; expected {len(self.classes)},"
        " one for each class, or () for 1 each."
      )

  @classmethod
  def for_dataset(cls, dataset: Any, **options: Any) -> SemanticTask:
    """The task whose classes, colours and ignored label are those of a data set."""
    palette = tuple(tuple(int(value) for value in colour) for colour in dataset.palette)
    unused = tuple(getattr(dataset, "unused", ()))
    return cls(tuple(dataset.classes), palette, dataset.ignore_label, unused=unused, **options)

  @property
  def num_classes(self) -> int:
    """Number of classes; the ignored label is none of them."""
    return len(self.classes)

  def usable(self, logits: jax.Array) -> jax.Array:
    """Logits (..., K) with which no unused class is the most likely one."""
    if not self.unused:
      return logits
    # Not infinite: logits are interpolated afterwards.
    return logits.at[..., jnp.array(self.unused)].set(-1e9)

  def augment(self, batch: Batch, rng: jax.Array) -> Batch:
    """Nothing: the recipe's augmentations are made on the host."""
    del rng
    return batch

  def model_inputs(self, batch: Batch) -> tuple[jax.Array]:
    """Normalises images and sets the padding to 0 afterwards.

    Args:
      batch: `image` uint8 (B, H, W, 3), `valid_size` int32 (B, 2).

    Returns:
      Images float32 (B, H, W, 3).
    """
    return (normalize(batch["image"], batch["valid_size"], self.mean, self.std),)

  def pixel_scores(self, outputs: jax.Array, size: tuple[int, int]) -> jax.Array:
    """What is resized to the pixels of an image of `size`: the logits (B, h, w, num_classes)."""
    del size
    return outputs

  def loss(
    self, outputs: jax.Array | Mapping[str, Any], batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Cross-entropy of the logits, upsampled to the labels.

    Args:
      outputs: logits (B, h, w, num_classes), of any resolution; or `logits` and `aux`, a list of
        auxiliary ones, each at its own.
      batch: `label` (B, H, W).
      rng: unused.

    Returns:
      The loss; `accuracy`, the share of right pixels among the counted ones; and the confusion
      counts int32 (K, K) at logit resolution.
    """
    del rng
    labels = batch["label"].astype(jnp.int32)
    logits, auxiliary = outputs, []
    if isinstance(outputs, Mapping):
      logits, auxiliary = outputs["logits"], outputs["aux"]
    loss, accuracy = self._cross_entropy(logits, labels)
    for aux in auxiliary:
      loss += self.aux_weight * self._cross_entropy(aux, labels)[0]
    return loss, {"accuracy": accuracy}, self._coarse_counts(logits, labels)

  def loss_weight(self, batch: Batch) -> jax.Array:
    """What the loss of a batch is divided by: float32 ()."""
    label = batch["label"]
    if self.normalize_by == "valid":
      return jnp.sum(label != self.ignore_label, dtype=jnp.float32)
    return jnp.float32(label.size)

  def summarise(self, counts: np.ndarray) -> dict[str, float]:
    """mIoU over the classes seen so far (of the labels' samples at logit resolution)."""
    matrix = ConfusionMatrix(self.num_classes)
    matrix.update(counts)
    return {"mIoU": matrix.miou()}

  def _cross_entropy(self, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of one map of logits, and its share of right pixels."""
    weights = jnp.asarray(self.class_weights, jnp.float32) if self.class_weights else None
    nll, correct, valid = upsampled_cross_entropy(
      logits, labels, ignore_label=self.ignore_label, class_weights=weights
    )
    num_valid = jnp.maximum(jnp.sum(valid), 1)
    denominator = num_valid if self.normalize_by == "valid" else labels.size
    return jnp.sum(nll) / denominator, jnp.sum(correct) / num_valid

  def _coarse_counts(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Counts one label per logit, the one at its centre: enough for a progress line."""
    rows, cols = (
      np.minimum((np.arange(n) * 2 + 1) * size // (2 * n), size - 1)
      for n, size in zip(logits.shape[1:3], labels.shape[1:3], strict=True)
    )
    samples = labels[:, rows[:, None], cols[None, :]]
    return confusion_counts(
      jnp.argmax(logits, axis=-1), samples, self.num_classes, self.ignore_label
    )
