"""Semantic segmentation with SSA-Seg's classifier, which learns from a teacher that sees labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effseg_jax.models.ssa_seg import teach
from effseg_jax.ops.dice import upsampled_dice
from effseg_jax.tasks import ssa_losses
from effseg_jax.tasks.semantic import Batch, SemanticTask


@dataclasses.dataclass(frozen=True)
class SSASegTask(SemanticTask):
  """`L_c + L_g + L_rd + L_sd + L_pd`, all with the same weight (section 3.3 of the paper).

  `L_c` and `L_g` are cross-entropy and Dice loss of the classifier and of its teacher; the others
  are in `tasks/ssa_losses.py`. The coarse logits have no loss of their own. The paper gives neither
  form nor weight of the Dice loss: V-Net's, and 1.

  Attributes:
    distill: weight of the three losses that bring the classifier near its teacher.
    boundary_width: pixels of the band along the borders between classes.
    as_printed: see `ssa_losses.spatial_loss`.
  """

  distill: float = 1.0
  boundary_width: int = 4
  as_printed: bool = False

  def loss(
    self, outputs: Mapping[str, Any], batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """All losses.

    Args:
      outputs: of the model in training, see `models.ssa_seg.SSAClassifier`.
      batch: `label` (B, H, W).
      rng: unused.

    Returns:
      The loss; `accuracy` and each loss by itself; and the confusion counts int32 (K, K).
    """
    labels = batch["label"].astype(jnp.int32)
    small = _nearest(labels, outputs["logits"].shape[1:3])
    taught = teach(outputs["for_teacher"], small, outputs["for_teacher"]["features"].dtype)
    main, scalars, counts = self._segmentation_loss(outputs["logits"], batch, rng)
    teacher, _, _ = self._segmentation_loss(taught["teacher_logits"], batch, rng)
    boundary = ssa_losses.near_boundaries(small, self.num_classes, self.boundary_width)
    parts = {
      "loss_classifier": main,
      "loss_teacher": teacher,
      "loss_response": ssa_losses.response_loss(
        outputs["logits"], taught["teacher_logits"], small, boundary
      ),
      "loss_semantic": ssa_losses.semantic_loss(
        outputs["semantic_prototypes"], taught["batch_semantic_prototypes"]
      ),
      "loss_spatial": ssa_losses.spatial_loss(
        outputs["spatial_prototypes"], taught["teacher_spatial_prototypes"], self.as_printed
      ),
    }
    distilled = parts["loss_response"] + parts["loss_semantic"] + parts["loss_spatial"]
    return main + teacher + self.distill * distilled, {**scalars, **parts}, counts

  def _segmentation_loss(
    self, logits: jax.Array, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Cross-entropy and Dice loss of logits, upsampled to the labels."""
    cross_entropy, scalars, counts = super().loss(logits, batch, rng)
    return cross_entropy + jnp.mean(upsampled_dice(logits, batch["label"])), scalars, counts


def _nearest(labels: jax.Array, size: tuple[int, int]) -> jax.Array:
  """PyTorch's nearest resize: (B, H, W) -> (B, *size)."""
  rows, cols = (jnp.arange(n) * m // n for n, m in zip(size, labels.shape[1:], strict=True))
  return labels[:, rows[:, None], cols[None, :]]
