"""Audio-visual segmentation: which pixels of a frame make the sound that is heard with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effseg_jax.errors import require_one_of
from effseg_jax.metrics.segmentation import ConfusionMatrix, confusion_counts
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from effseg_jax.ops.resize import resize_bilinear

Batch = Mapping[str, jax.Array]

# Every how many rows and columns a pixel of semantic labels is counted for the progress line.
_COUNT_STRIDE = 4


@dataclasses.dataclass(frozen=True)
class AudioVisualTask:
  """Masks of sounding objects: one logit per pixel (S4, MS3), or one per class (AVSS).

  Attributes:
    classes: name per class id, the background first; a single name means binary masks.
    palette: (red, green, blue), 0 to 255, per class id.
    mask_loss: of binary masks: `"dice"` (AVSegFormer), `"bce"` (AVSBench) or `"bce_dice"`, their
      sum (LightAVSeg). Semantic labels have the cross-entropy.
    mix_weight: of the second loss, which trains the mean channel of the model's mask feature to
      predict the mask (AVSegFormer's mixing loss).
    mean: of the normalisation, per RGB channel, in uint8 units.
    std: of the normalisation, per RGB channel, in uint8 units.
  """

  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  mask_loss: str = "dice"
  mix_weight: float = 0.1
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD

  def __post_init__(self) -> None:
    require_one_of("task.mask_loss", self.mask_loss, MASK_LOSSES)

  @classmethod
  def for_dataset(cls, dataset: Any, **options: Any) -> AudioVisualTask:
    """The task whose classes and colours are those of a data set."""
    palette = tuple(tuple(int(value) for value in colour) for colour in dataset.palette)
    return cls(tuple(dataset.classes), palette, **options)

  @property
  def num_classes(self) -> int:
    """Number of logits a pixel."""
    return len(self.classes)

  @property
  def semantic(self) -> bool:
    """Whether masks distinguish classes."""
    return len(self.classes) > 1

  def augment(self, batch: Batch, rng: jax.Array) -> Batch:
    """Nothing: augmentations are made on the host, the same for all frames of a clip."""
    del rng
    return batch

  def model_inputs(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Normalises frames; those that pad a clip are 0 afterwards, as in the reference.

    Args:
      batch: `frames` uint8 (B, T, H, W, 3), `valid_frames` float32 (B, T), `log_mel` float32
        (B, T, 96, 64).

    Returns:
      Frames float32 (B, T, H, W, 3) and log-mel patches float32 (B, T, 96, 64).
    """
    frames = batch["frames"]
    size = jnp.asarray(frames.shape[2:4], jnp.int32)
    valid_size = jnp.where(batch["valid_frames"][..., None] > 0, size, 0).reshape(-1, 2)
    flat = normalize(frames.reshape(-1, *frames.shape[2:]), valid_size, self.mean, self.std)
    return flat.reshape(frames.shape), batch["log_mel"].astype(jnp.float32)

  def loss(
    self, outputs: Any, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """The mean over the supervised frames (AVSegFormer's losses).

    Args:
      outputs: `logits` (B, T, H, W, K) and `mask_feature` (B, T, h, w, C); or logits alone, for
        which there is no mixing loss.
      batch: `masks` uint8 (B, T, H, W), `frame_weight` and `valid_frames` float32 (B, T), and
        `weight` float32 (B,).
      rng: unused.

    Returns:
      The loss; its parts `mask_loss` and, where there is one, `mix_loss` (not yet weighted); and
      counts for `summarise`.
    """
    del rng
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    logits = self.valid_logits(logits, batch)
    masks = batch["masks"].astype(jnp.int32)
    weight = batch["frame_weight"] * batch["weight"][:, None]
    sounding = (masks > 0).astype(jnp.float32)
    if self.semantic:
      entropy = optax.softmax_cross_entropy_with_integer_labels(logits, masks)
      each = jnp.mean(entropy, axis=(-2, -1))
      mix_loss = dice_loss
    else:
      mix_loss = MASK_LOSSES[self.mask_loss]
      each = mix_loss(logits[..., 0], sounding)
    loss = _weighted_mean(each, weight)
    scalars = {"mask_loss": loss}
    if isinstance(outputs, Mapping) and self.mix_weight:
      mix_logits = _mean_channel(outputs["mask_feature"], masks.shape[2:])
      mix = _weighted_mean(mix_loss(mix_logits, sounding), weight)
      loss, scalars["mix_loss"] = loss + self.mix_weight * mix, mix
    return loss, scalars, self._counts(logits, masks, weight)

  def loss_weight(self, batch: Batch) -> jax.Array:
    """What the loss of a batch is divided by: the supervised frames, float32 ()."""
    return jnp.sum(batch["frame_weight"] * batch["weight"][:, None])

  def valid_logits(self, logits: jax.Array, batch: Batch) -> jax.Array:
    """Logits float32, 0 in the frames that pad a clip: there class 0 is predicted."""
    return logits.astype(jnp.float32) * batch["valid_frames"][:, :, None, None, None]

  def summarise(self, counts: np.ndarray) -> dict[str, float]:
    """Intersection over union of the sounding objects, or mIoU of the classes, over all pixels."""
    matrix = ConfusionMatrix(max(self.num_classes, 2))
    matrix.update(counts)
    if self.semantic:
      return {"mIoU": matrix.miou()}
    return {"IoU": float(np.nan_to_num(matrix.iou()[1]))}

  def _counts(self, logits: jax.Array, masks: jax.Array, weight: jax.Array) -> jax.Array:
    """Confusion counts int32 of supervised frames, of a regular sample of the pixels."""
    sample = np.s_[:, :, ::_COUNT_STRIDE, ::_COUNT_STRIDE]
    logits, masks = logits[sample], masks[sample]
    prediction = jnp.argmax(logits, axis=-1) if self.semantic else logits[..., 0] > 0
    labels = jnp.where(weight[:, :, None, None] > 0, masks, -1)
    return confusion_counts(prediction, labels, max(self.num_classes, 2), ignore_label=-1)


def dice_loss(logits: jax.Array, masks: jax.Array) -> jax.Array:
  """Dice loss with squares in the denominator.

  `1 - 2 sum(p g) / (sum(p^2) + sum(g^2) + 0.002)`. For an empty mask it is 1 whatever p is, and has
  no gradient: silence is not learnt from it.

  Args:
    logits: float32 (..., H, W).
    masks: float32 (..., H, W).

  Returns:
    float32 (...).
  """
  p = jax.nn.sigmoid(logits)
  overlap = jnp.sum(p * masks, axis=(-2, -1))
  size = jnp.sum(p * p, axis=(-2, -1)) + jnp.sum(masks * masks, axis=(-2, -1))
  return 1.0 - 2.0 * overlap / (size + 0.002)


def bce_loss(logits: jax.Array, masks: jax.Array) -> jax.Array:
  """Binary cross-entropy, the mean over the pixels: (..., H, W) each -> (...)."""
  return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, masks), axis=(-2, -1))


def bce_dice_loss(logits: jax.Array, masks: jax.Array) -> jax.Array:
  """The sum of both."""
  return bce_loss(logits, masks) + dice_loss(logits, masks)


MASK_LOSSES = {"dice": dice_loss, "bce": bce_loss, "bce_dice": bce_dice_loss}


def _mean_channel(feature: jax.Array, size: tuple[int, int]) -> jax.Array:
  """The mean over the channels of (B, T, h, w, C), resized: float32 (B, T, *size)."""
  mean = jnp.mean(feature.astype(jnp.float32), axis=-1)
  flat = mean.reshape(-1, *mean.shape[2:], 1)
  return resize_bilinear(flat, size).reshape(*mean.shape[:2], *size)


def _weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
  return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1e-6)
