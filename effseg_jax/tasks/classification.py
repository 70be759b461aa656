"""Image classification, for pretraining backbones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effseg_jax.metrics.segmentation import ConfusionMatrix, confusion_counts
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ClassificationTask:
  """One class per image, with label smoothing, mixup and CutMix.

  Attributes:
    classes: name per class id.
    mean: of the normalisation, per RGB channel, in uint8 units.
    std: of the normalisation, per RGB channel, in uint8 units.
    label_smoothing: share of the target spread evenly over all classes.
    mixup: alpha of mixup's Beta distribution (Zhang et al. 2018); 0 for none.
    cutmix: alpha of CutMix's Beta distribution (Yun et al. 2019); 0 for none. With both, each batch
      draws one of them.
  """

  classes: tuple[str, ...]
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  label_smoothing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0

  @classmethod
  def for_dataset(cls, dataset: Any, **options: Any) -> ClassificationTask:
    """The task whose classes are those of a data set."""
    return cls(tuple(dataset.classes), **options)

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.classes)

  def augment(self, batch: Batch, rng: jax.Array) -> Batch:
    """Normalises, then mixes each image with the adjacent one in the batch.

    Args:
      batch: `image` uint8 (B, H, W, 3), `valid_size`, `label` int32 (B,).
      rng: key.

    Returns:
      `image` float32 (B, H, W, 3) normalised and `target` float32 (B, num_classes).
    """
    images = normalize(batch["image"], batch["valid_size"], self.mean, self.std)
    target = optax.smooth_labels(
      jax.nn.one_hot(batch["label"], self.num_classes), self.label_smoothing
    )
    if not (self.mixup or self.cutmix):
      return {**batch, "image": images, "target": target}
    choice_rng, share_rng, box_rng = jax.random.split(rng, 3)
    p_cutmix = 0.5 if self.mixup and self.cutmix else float(self.cutmix > 0)
    cut = jax.random.bernoulli(choice_rng, p_cutmix)
    alpha = jnp.where(cut, self.cutmix or 1.0, self.mixup or 1.0)
    share = jax.random.beta(share_rng, alpha, alpha)
    box = _random_box(box_rng, images.shape[1:3], 1.0 - share)
    keep = jnp.where(cut, 1.0 - box, share)[None, :, :, None]
    share = jnp.where(cut, 1.0 - jnp.mean(box), share)
    return {
      **batch,
      "image": images * keep + _neighbours(images) * (1.0 - keep),
      "target": target * share + _neighbours(target) * (1.0 - share),
    }

  def model_inputs(self, batch: Batch) -> tuple[jax.Array]:
    """Images float32 (B, H, W, 3), normalised here unless `augment` already did."""
    if batch["image"].dtype == jnp.uint8:
      return (normalize(batch["image"], batch["valid_size"], self.mean, self.std),)
    return (batch["image"],)

  def loss(
    self, outputs: jax.Array, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], None]:
    """Softmax cross-entropy with the (mixed) targets.

    Args:
      outputs: logits (B, num_classes).
      batch: `target` (B, num_classes), `label` (B,).
      rng: unused.

    Returns:
      The loss; `accuracy` with respect to the unmixed label; no counts.
    """
    del rng
    loss = jnp.mean(optax.softmax_cross_entropy(outputs.astype(jnp.float32), batch["target"]))
    accuracy = jnp.mean(jnp.argmax(outputs, axis=-1) == batch["label"])
    return loss, {"accuracy": accuracy}, None

  def eval_counts(self, outputs: jax.Array, batch: Batch) -> jax.Array:
    """Confusion counts int32 (K, K) of the images whose weight is not 0."""
    return confusion_counts(
      jnp.argmax(outputs, axis=-1)[:, None],
      batch["label"][:, None],
      self.num_classes,
      ignore_label=-1,
      weight=batch["weight"],
    )

  def summarise(self, counts: np.ndarray) -> dict[str, float]:
    """Top-1 accuracy from confusion counts."""
    matrix = ConfusionMatrix(self.num_classes)
    matrix.update(counts)
    return {"top1": matrix.pixel_accuracy()}


def _neighbours(x: jax.Array) -> jax.Array:
  """Examples 1, 0, 3, 2, ... of (B, ...): adjacent ones, because they are on the same device.

  The last one of an odd batch is its own.
  """
  even = x.shape[0] // 2 * 2
  swapped = x[:even].reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(even, *x.shape[1:])
  return swapped if even == x.shape[0] else jnp.concatenate([swapped, x[even:]])


def _random_box(rng: jax.Array, size: tuple[int, int], area: jax.Array) -> jax.Array:
  """A float32 (H, W) mask: 1 inside a random box of this share of the image, cut at the border."""
  spans = []
  for key, length in zip(jax.random.split(rng), size, strict=True):
    centre = jax.random.uniform(key) * length
    half = jnp.sqrt(area) * length / 2
    index = jnp.arange(length) + 0.5
    spans.append((jnp.abs(index - centre) < half).astype(jnp.float32))
  return spans[0][:, None] * spans[1][None, :]
