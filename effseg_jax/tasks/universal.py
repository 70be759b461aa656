"""Universal segmentation: a set of (class, mask) pairs, matched to the targets of an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.metrics.segmentation import ConfusionMatrix, confusion_counts
from effseg_jax.ops.mask_scores import semantic_scores
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from effseg_jax.ops.point_sample import NO_SEGMENT, sample_points, sample_segments
from effseg_jax.tasks.mask_losses import PointSource, UncertainPoints, class_losses, mask_losses
from effseg_jax.tasks.matching import assign, matching_costs

Batch = Mapping[str, jax.Array]
Outputs = Mapping[str, Any]

_IGNORE_LABEL = 255


@dataclasses.dataclass(frozen=True)
class UniversalTask:
  """Panoptic, instance or semantic segmentation by masked queries (Mask2Former, Cheng et al. 2022).

  The three differ in what the targets are (a segment each, things alone, or a class each) and in
  how the outputs are read (`tasks.mask_inference`), not here.

  Attributes:
    classes: name per class id.
    palette: (red, green, blue), 0 to 255, per class id.
    is_thing: per class id, whether its objects are separate segments.
    mean: of the normalisation, per RGB channel, in uint8 units.
    std: of the normalisation, per RGB channel, in uint8 units.
    class_weight: of the class loss and cost.
    mask_weight: of the masks' binary cross-entropy and cost.
    dice_weight: of the masks' Dice loss and cost.
    no_object_weight: of a query without a target in the class loss; one with a target weighs 1.
    num_points: at which masks are compared.
    oversample_ratio: candidates per point, among which uncertain points are chosen.
    importance_ratio: share of the points that are chosen so; the others are uniform.
    black_padding: whether padding is black picture, as EoMT is trained and evaluated, and not 0
      after the normalisation, the mean colour.
    mask_blocks: blocks of EoMT that see the queries, whose masks are annealed; 0: another model.
    annealing_steps: of the whole training, over which masks are annealed.
  """

  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  is_thing: tuple[bool, ...]
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  class_weight: float = 2.0
  mask_weight: float = 5.0
  dice_weight: float = 5.0
  no_object_weight: float = 0.1
  num_points: int = 12544
  oversample_ratio: float = 3.0
  importance_ratio: float = 0.75
  black_padding: bool = False
  mask_blocks: int = 0
  annealing_steps: int = 0

  @classmethod
  def for_dataset(cls, dataset: Any, **options: Any) -> UniversalTask:
    """The task whose classes, colours and things are those of a data set."""
    palette = tuple(tuple(int(value) for value in colour) for colour in dataset.palette)
    return cls(tuple(dataset.classes), palette, tuple(map(bool, dataset.thing_mask)), **options)

  @property
  def num_classes(self) -> int:
    """Number of classes; "no object" is none of them."""
    return len(self.classes)

  def augment(self, batch: Batch, rng: jax.Array) -> Batch:
    """Nothing: the recipe's augmentations are made on the host."""
    del rng
    return batch

  def model_inputs(self, batch: Batch) -> tuple[jax.Array]:
    """Normalises images and sets the padding to 0 afterwards, unless it is black.

    Args:
      batch: `image` uint8 (B, H, W, 3), `valid_size` int32 (B, 2). Or `image` (B, r, c, H, W, 3), a
        grid of windows that are picture all over.

    Returns:
      Images float32 (B, H, W, 3), or (B r c, H, W, 3) of the windows.
    """
    images, valid_size = batch["image"], batch["valid_size"]
    if self.black_padding or images.ndim > 4:
      images = images.reshape(-1, *images.shape[-3:])
      size = jnp.asarray(images.shape[1:3], jnp.int32)
      valid_size = jnp.broadcast_to(size, (images.shape[0], 2))
    return (normalize(images, valid_size, self.mean, self.std),)

  def model_options(self, step: jax.Array) -> dict[str, jax.Array]:
    """EoMT's probabilities of masks, `mask_probs` float32 (L2,); nothing for other models."""
    if not self.mask_blocks:
      return {}
    return {"mask_probs": mask_probabilities(step, self.mask_blocks, self.annealing_steps)}

  def loss(
    self, outputs: Outputs, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """The weighted sum of all losses over all predictions, each with a matching of its own.

    Args:
      outputs: `class_logits` (B, Q, K + 1), `mask_logits` (B, Q, H/4, W/4), and `aux`, a list of
        the same from earlier layers.
      batch: `segments` uint8 (B, S, H, W), `labels` int32 (B, N), negative for padding, and
        `dropped_segments` int32 (B,), the number of targets that exceed the capacity.
      rng: key of the points.

    Returns:
      The loss; `loss_class`, `loss_mask`, `loss_dice` of the final prediction, `targets` per image
      and `dropped_segments` of the batch; and confusion counts int32 (K, K) of its semantic
      reading, at the masks' resolution.
    """
    match_rng, point_rng = jax.random.split(rng)
    predictions = [outputs, *outputs["aux"]]
    shape = (len(predictions), batch["labels"].shape[0], self.num_points, 2)
    losses = self.set_losses(
      predictions,
      batch,
      match_points=jax.random.uniform(match_rng, shape),
      source=point_rng,
      points=UncertainPoints(self.num_points, self.oversample_ratio, self.importance_ratio),
    )
    scalars = {
      "loss_class": losses.class_loss[0],
      "loss_mask": losses.mask_loss[0],
      "loss_dice": losses.dice_loss[0],
      "targets": jnp.mean(jnp.sum(batch["labels"] >= 0, axis=1, dtype=jnp.float32)),
      "dropped_segments": jnp.sum(batch["dropped_segments"]).astype(jnp.float32),
    }
    return losses.total, scalars, self._coarse_counts(outputs, batch)

  def set_losses(
    self,
    predictions: Sequence[Outputs],
    batch: Batch,
    *,
    match_points: jax.Array,
    source: Any,
    points: PointSource,
  ) -> SetLosses:
    """The losses of L predictions at given points.

    Args:
      predictions: each with `class_logits` (B, Q, K + 1) and `mask_logits` (B, Q, h, w).
      batch: `segments` uint8 (B, S, H, W), `labels` int32 (B, N).
      match_points: float32 (L, B, P, 2), where masks are compared for the matching; an image's
        queries and targets share them.
      source: handed to `points`: a key or recorded points.
      points: where matched masks are compared.
    """
    class_logits, mask_logits = (
      jnp.stack([prediction[name].astype(jnp.float32) for prediction in predictions])
      for name in ("class_logits", "mask_logits")
    )
    labels, segments = batch["labels"], batch["segments"]
    valid = labels >= 0
    costs = self._costs(class_logits, mask_logits, labels, segments, match_points)
    queries, matched = assign(costs, jnp.broadcast_to(valid, (len(predictions), *valid.shape)))

    class_loss = class_losses(class_logits, labels, queries, matched, self.no_object_weight)
    weighted, mask_sum, dice_sum = mask_losses(
      mask_logits,
      segments,
      queries,
      matched,
      source,
      points=points,
      mask_weight=self.mask_weight,
      dice_weight=self.dice_weight,
    )
    # Over the global batch, and never by 0: a batch without targets still trains "no object".
    num_masks = jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)
    return SetLosses(
      total=jnp.sum(self.class_weight * class_loss + weighted / num_masks),
      class_loss=class_loss,
      mask_loss=mask_sum / num_masks,
      dice_loss=dice_sum / num_masks,
      queries=queries,
      matched=matched,
    )

  def summarise(self, counts: np.ndarray) -> dict[str, float]:
    """mIoU of the semantic reading over the classes seen so far."""
    matrix = ConfusionMatrix(self.num_classes)
    matrix.update(counts)
    return {"mIoU": matrix.miou()}

  def _costs(
    self,
    class_logits: jax.Array,
    mask_logits: jax.Array,
    labels: jax.Array,
    segments: jax.Array,
    points: jax.Array,
  ) -> jax.Array:
    """Matching costs (L, B, Q, N), one prediction after the other: samples of all are large."""
    ids = jnp.broadcast_to(jnp.arange(labels.shape[1]), labels.shape)

    def costs(prediction: tuple[jax.Array, ...]) -> jax.Array:
      class_logits, mask_logits, points = prediction
      return matching_costs(
        class_logits,
        sample_points(mask_logits, points),
        labels,
        sample_segments(segments, points, ids),
        class_weight=self.class_weight,
        mask_weight=self.mask_weight,
        dice_weight=self.dice_weight,
      )

    return jax.lax.map(costs, jax.lax.stop_gradient((class_logits, mask_logits, points)))

  def _coarse_counts(self, outputs: Outputs, batch: Batch) -> jax.Array:
    """Counts one label per mask logit, the one at its centre: enough for a progress line."""
    scores = semantic_scores(outputs["class_logits"], outputs["mask_logits"])
    rows, cols = (
      np.minimum((np.arange(n) * 2 + 1) * size // (2 * n), size - 1)
      for n, size in zip(scores.shape[2:], batch["segments"].shape[2:], strict=True)
    )
    segment = jnp.min(batch["segments"][:, :, rows[:, None], cols[None, :]], axis=1)
    labels = jax.vmap(lambda labels, s: jnp.take(labels, s, mode="clip"))(batch["labels"], segment)
    labels = jnp.where(segment == NO_SEGMENT, _IGNORE_LABEL, labels)
    return confusion_counts(jnp.argmax(scores, axis=1), labels, self.num_classes, _IGNORE_LABEL)


def mask_probabilities(step: jax.Array, blocks: int, num_steps: int) -> jax.Array:
  """With which probability EoMT's queries look inside their masks alone (mask annealing).

  In each of the last blocks it is 1 until its interval begins, a sixth of the training long, then
  `(1 - t)^0.9`, and 0 from its end on. The first block's interval is the second sixth, the last
  one's the fifth, and the others' lie evenly between them.

  Args:
    step: int32 (), optimizer steps before this one.
    blocks: L2, that see the queries.
    num_steps: of the whole training.

  Returns:
    float32 (L2,).
  """
  shares = [1 / 6 + j / (2 * max(blocks - 1, 1)) for j in range(blocks)]
  start, end = (
    np.round(num_steps * np.asarray([s + more for s in shares])) for more in (0.0, 1 / 6)
  )
  progress = (jnp.asarray(step, jnp.float32) - start) / np.maximum(end - start, 1)
  falling = (1.0 - jnp.clip(progress, 0.0, 1.0)) ** 0.9
  return jnp.where(step < start, 1.0, jnp.where(step >= end, 0.0, falling)).astype(jnp.float32)


class SetLosses(NamedTuple):
  """The losses of L predictions.

  Attributes:
    total: float32 (), to be minimised: the weighted sum. The other losses have no weight, and no
      gradient.
    class_loss: float32 (L,).
    mask_loss: float32 (L,), binary cross-entropy per target.
    dice_loss: float32 (L,), per target.
    queries: int32 (L, B, N), the query of each target.
    matched: bool (L, B, N), whether a target has one.
  """

  total: jax.Array
  class_loss: jax.Array
  mask_loss: jax.Array
  dice_loss: jax.Array
  queries: jax.Array
  matched: jax.Array
