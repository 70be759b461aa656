"""The losses that SSA-Seg adds (section 3.3 of arXiv 2405.06525): a teacher that sees the labels.

Nothing is learned from the teacher's side: its quantities are constants here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from effseg_jax.ops.conv import windows


def near_boundaries(labels: jax.Array, num_classes: int, width: int = 4) -> jax.Array:
  """Pixels of a band along the borders between classes.

  The paper takes Canny's edges of the label map with "edge size 4"; this is the band itself. A
  border between a class and pixels of none is no border.

  Args:
    labels: int (B, H, W), a class, or another number for no class.
    num_classes: K.
    width: of the band in pixels, half of them (rounded down) on each side.

  Returns:
    bool (B, H, W).
  """
  counted = (labels >= 0) & (labels < num_classes)
  size = 2 * (width // 2) + 1
  highest = jnp.where(counted, labels, -1)[..., None]
  lowest = jnp.where(counted, labels, num_classes)[..., None]
  highest = jnp.stack(windows(highest, size, fill=-1)).max(0)[..., 0]
  lowest = jnp.stack(windows(lowest, size, fill=num_classes)).min(0)[..., 0]
  return counted & (highest > lowest)


def response_loss(
  logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, boundary: jax.Array
) -> jax.Array:
  """Cross-entropy with the teacher's classes, weighted by its entropy (equations 7 to 9).

  The mean is over classes, and over pixels near a boundary and others, so that neither large
  classes nor the inside of regions outweigh the rest. As printed the cross-entropy has its sign
  twice, which would reward disagreement.

  Args:
    logits: O (B, H, W, K).
    teacher_logits: of the teacher.
    labels: int (B, H, W) at that resolution.
    boundary: bool (B, H, W), see `near_boundaries`.

  Returns:
    float32 (); sums are over the batch, and a class without pixels adds 0.
  """
  num_classes = logits.shape[-1]
  log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits))
  teacher = jnp.exp(log_teacher)
  entropy = -jnp.sum(teacher * log_teacher, axis=-1)
  cross = -jnp.sum(teacher * jax.nn.log_softmax(logits), axis=-1)
  members = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  total = 0.0
  for part in (boundary, ~boundary):
    weights = entropy * part
    above = jnp.einsum("bhw,bhwk->k", weights * cross, members)
    below = jnp.einsum("bhw,bhwk->k", weights, members)
    total += jnp.sum(jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), 0.0))
  return total / (2 * num_classes)


def semantic_loss(prototypes: jax.Array, batch_prototypes: jax.Array) -> jax.Array:
  """How much more alike classes are than for the teacher (equations 10 to 12).

  Args:
    prototypes: semantic ones (B, K, D).
    batch_prototypes: of the teacher, (K, D), from the whole batch's means.

  Returns:
    float32 (), the mean over the batch.
  """
  num_classes = prototypes.shape[-2]
  alike = jax.nn.softmax(jnp.einsum("bkd,bjd->bkj", prototypes, prototypes))
  teacher = jax.lax.stop_gradient(batch_prototypes)
  alike_teacher = jax.nn.softmax(teacher @ teacher.T)
  excess = jnp.maximum(alike - alike_teacher, 0.0) * (1.0 - jnp.eye(num_classes))
  return jnp.sum(excess) / (num_classes * len(prototypes))


def spatial_loss(
  prototypes: jax.Array, teacher_prototypes: jax.Array, as_printed: bool = False
) -> jax.Array:
  """Cross-entropy of the channels of spatial prototypes (equation 13).

  Args:
    prototypes: (B, K, D).
    teacher_prototypes: of the teacher, of the same shape.
    as_printed: in the paper's equation the teacher stands inside the logarithm, which equation 7
      has the other way round; the default follows the latter.

  Returns:
    float32 (), the mean over the batch.
  """
  teacher = jax.lax.stop_gradient(teacher_prototypes)
  target, log_of = (prototypes, teacher) if as_printed else (teacher, prototypes)
  cross = -jnp.sum(jax.nn.softmax(target) * jax.nn.log_softmax(log_of), axis=-1)
  return jnp.mean(cross)
