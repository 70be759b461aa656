"""One mask for each class: query c finds class c where it is, and says whether it is there.

The loss of SegViT (Zhang et al. 2022, section 3.3): a classification and a mask loss without
matching. Class maps are read as in MaskFormer: class times mask probability, summed over queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.metrics.segmentation import ConfusionMatrix, confusion_counts
from effseg_jax.ops.mask_scores import semantic_scores
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from effseg_jax.ops.resize import bilinear_matrix, resize_bilinear

Batch = Mapping[str, jax.Array]
Outputs = Mapping[str, Any]

_ALPHA, _GAMMA = 0.25, 2  # of the focal loss
_NO_OBJECT_WEIGHT = 0.1
_WEIGHTS = {"loss_ce": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}


@dataclasses.dataclass(frozen=True)
class ClassMasksTask:
  """Semantic segmentation by a query for each class.

  Attributes:
    classes: name per class id.
    palette: (red, green, blue), 0 to 255, per class id.
    ignore_label: label value that belongs to no class; its pixels are background of every mask.
    mean: of the normalisation, per RGB channel, in uint8 units.
    std: of the normalisation, per RGB channel, in uint8 units.
  """

  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  ignore_label: int = 255
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD

  # What the network says of a pixel is no logit: views and windows are averaged as they are.
  averages_scores = True

  @classmethod
  def for_dataset(cls, dataset: Any, **options: Any) -> ClassMasksTask:
    """The task whose classes, colours and ignored label are those of a data set."""
    palette = tuple(tuple(int(value) for value in colour) for colour in dataset.palette)
    return cls(tuple(dataset.classes), palette, dataset.ignore_label, **options)

  @property
  def num_classes(self) -> int:
    """Number of classes; neither the ignored label nor "no object" is one of them."""
    return len(self.classes)

  def augment(self, batch: Batch, rng: jax.Array) -> Batch:
    """Nothing: the recipe's augmentations are made on the host."""
    del rng
    return batch

  def model_inputs(self, batch: Batch) -> tuple[jax.Array]:
    """Normalises images and sets the padding to 0 afterwards; see `SemanticTask.model_inputs`."""
    return (normalize(batch["image"], batch["valid_size"], self.mean, self.std),)

  def pixel_scores(self, outputs: Outputs, size: tuple[int, int]) -> jax.Array:
    """The classes' scores for an image of `size`, float32 (B, rows, cols, K).

    Mask logits are resized before they become probabilities, as in the official evaluation.
    """
    masks = resize_bilinear(jnp.moveaxis(outputs["mask_logits"], 1, -1), size)
    scores = semantic_scores(outputs["class_logits"], jnp.moveaxis(masks, -1, 1))
    return jnp.moveaxis(scores, 1, -1)

  def loss(
    self, outputs: Outputs, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """The sum of all terms over all predictions.

    Args:
      outputs: `class_logits` (B, K, K + 1), `mask_logits` (B, K, h, w), and `aux`, a list of the
        same from earlier layers.
      batch: `label` (B, H, W).
      rng: unused.

    Returns:
      The loss; `loss_ce`, `loss_mask` and `loss_dice` of the final prediction; and confusion counts
      int32 (K, K) of the class map, at the masks' resolution.
    """
    del rng
    labels = batch["label"].astype(jnp.int32)
    terms = losses(outputs, labels, self.ignore_label)
    scalars = {name: terms[name] for name in _WEIGHTS}
    return sum(terms.values()), scalars, self._coarse_counts(outputs, labels)

  def summarise(self, counts: np.ndarray) -> dict[str, float]:
    """mIoU over the classes seen so far (of the labels' samples at the masks' resolution)."""
    matrix = ConfusionMatrix(self.num_classes)
    matrix.update(counts)
    return {"mIoU": matrix.miou()}

  def _coarse_counts(self, outputs: Outputs, labels: jax.Array) -> jax.Array:
    """Counts one label per mask logit, the one at its centre: enough for a progress line."""
    scores = semantic_scores(outputs["class_logits"], outputs["mask_logits"])
    rows, cols = (
      np.minimum((np.arange(n) * 2 + 1) * size // (2 * n), size - 1)
      for n, size in zip(scores.shape[2:], labels.shape[1:], strict=True)
    )
    samples = labels[:, rows[:, None], cols[None, :]]
    prediction = jnp.argmax(scores, axis=1)
    return confusion_counts(prediction, samples, self.num_classes, self.ignore_label)


def losses(outputs: Outputs, labels: jax.Array, ignore_label: int = 255) -> dict[str, jax.Array]:
  """The weighted loss terms of all predictions; their sum is the loss.

  Query c is responsible for class c. For each prediction: cross-entropy over K + 1 of every query,
  whose target is its class if that is in the image, and otherwise "no object", at a weight of 0.1;
  and for the classes that are in an image a focal loss, the mean over all pixels, and a Dice loss.
  The latter two are divided by the number of (image, class) pairs of the global batch.

  Args:
    outputs: `class_logits` (B, K, K + 1), `mask_logits` (B, K, h, w), and `aux`, earlier
      predictions of the same form.
    labels: int (B, H, W), a class or `ignore_label`.
    ignore_label: belongs to no class.

  Returns:
    float32 () by name: `loss_ce`, `loss_mask` and `loss_dice` of the final prediction, and with
    `_0`, `_1`, ... those of the earlier ones.
  """
  num_classes = outputs["class_logits"].shape[1]
  ids = jnp.arange(num_classes)
  labels = jnp.where(labels == ignore_label, num_classes, labels)
  present = jax.vmap(lambda one: jnp.zeros(num_classes + 1, bool).at[one.ravel()].set(True))(labels)
  present = present[:, :num_classes]
  pairs = jnp.maximum(jnp.sum(present), 1).astype(jnp.float32)
  targets = jnp.where(present, ids, num_classes)
  found = {}
  predictions = [("", outputs), *((f"_{i}", aux) for i, aux in enumerate(outputs["aux"]))]
  for suffix, prediction in predictions:
    focal, dice = _mask_losses(prediction["mask_logits"], labels, present)
    terms = {
      "loss_ce": _class_loss(prediction["class_logits"], targets),
      "loss_mask": focal / pairs,
      "loss_dice": dice / pairs,
    }
    found |= {f"{name}{suffix}": _WEIGHTS[name] * value for name, value in terms.items()}
  return found


def _class_loss(class_logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Weighted mean cross-entropy of (B, K, K + 1) for targets (B, K)."""
  log_likelihood = jax.nn.log_softmax(class_logits.astype(jnp.float32))
  nll = -jnp.take_along_axis(log_likelihood, targets[..., None], axis=-1)[..., 0]
  weights = jnp.where(targets == class_logits.shape[-1] - 1, _NO_OBJECT_WEIGHT, 1.0)
  return jnp.sum(weights * nll) / jnp.sum(weights)


def _mask_losses(
  mask_logits: jax.Array, labels: jax.Array, present: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Focal and Dice losses, summed over the classes that are in each image.

  One class after the other, for all images: at the labels' size, maps of all classes would be the
  largest arrays of a training step. What a class's map takes is computed again in the backward
  pass.

  Args:
    mask_logits: (B, K, h, w).
    labels: int32 (B, H, W).
    present: bool (B, K).
  """
  up_rows, up_cols = (
    jnp.asarray(bilinear_matrix(size, n), jnp.float32)
    for size, n in zip(labels.shape[1:], mask_logits.shape[2:], strict=True)
  )

  @jax.checkpoint
  def one(maps: jax.Array, class_id: jax.Array) -> tuple[jax.Array, jax.Array]:
    precision = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("yh,bhw->byw", up_rows, maps, precision=precision)
    logits = jnp.einsum("byw,xw->byx", logits, up_cols, precision=precision)
    truth = (labels == class_id).astype(jnp.float32)
    masks = jax.nn.sigmoid(logits)
    cross_entropy = jax.nn.softplus(logits) - logits * truth
    missed = truth * (1.0 - masks) + (1.0 - truth) * masks
    balance = _ALPHA * truth + (1.0 - _ALPHA) * (1.0 - truth)
    focal = jnp.mean(balance * missed**_GAMMA * cross_entropy, axis=(1, 2))
    overlap = 2.0 * jnp.sum(masks * truth, axis=(1, 2)) + 1.0
    dice = 1.0 - overlap / (jnp.sum(masks, axis=(1, 2)) + jnp.sum(truth, axis=(1, 2)) + 1.0)
    return focal, dice

  def body(sums: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]):
    maps, class_id, exists, anywhere = inputs
    # Most classes are in no image of a batch.
    nothing = lambda maps, _: (jnp.zeros(len(maps)),) * 2  # noqa: E731
    terms = jax.lax.cond(anywhere, one, nothing, maps, class_id)
    return tuple(s + jnp.where(exists, t, 0.0) for s, t in zip(sums, terms, strict=True)), None

  # Devices that share a batch agree once on which classes occur, and add up once.
  inputs = (
    jnp.moveaxis(mask_logits.astype(jnp.float32), 1, 0),
    jnp.arange(mask_logits.shape[1]),
    present.T,
    jnp.any(present, axis=0),
  )
  zeros = jnp.zeros((mask_logits.shape[0],), jnp.float32)
  (focal, dice), _ = jax.lax.scan(body, (zeros, zeros), inputs)
  return jnp.sum(focal), jnp.sum(dice)
