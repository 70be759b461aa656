"""Losses of predicted classes and masks that were matched to targets (Mask2Former, section 3.3).

L predictions, of the decoder's layers, are supervised at once: arrays begin with the axes (L, B).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from effseg_jax.ops.point_sample import sample_points, sample_segments, splat_points
from effseg_jax.ops.select import smallest


class PointSource(Protocol):
  """Chooses the points at which a matched mask is supervised; hashable, like `UncertainPoints`."""

  def __call__(self, source: Any, target: jax.Array, maps: jax.Array) -> jax.Array:
    """Points float32 (L, B, P, 2) for the maps (L, B, h, w) matched to target number `target`.

    `source` is what the caller of `mask_losses` passed as such: a key, or recorded points.
    """


@dataclasses.dataclass(frozen=True)
class UncertainPoints:
  """Random points, most of them where the prediction is least certain (PointRend, section 3.2).

  Attributes:
    num_points: P.
    oversample_ratio: candidates per point.
    importance_ratio: share of the points chosen among the candidates; the others are uniform.
  """

  num_points: int
  oversample_ratio: float
  importance_ratio: float

  def __call__(self, rng: jax.Array, target: jax.Array, maps: jax.Array) -> jax.Array:
    """Draws for one target with a key of its own."""
    candidate_rng, uniform_rng = jax.random.split(jax.random.fold_in(rng, target))
    num_candidates = int(self.num_points * self.oversample_ratio)
    num_uniform = self.num_points - int(self.num_points * self.importance_ratio)
    candidates = jax.random.uniform(candidate_rng, (*maps.shape[:2], num_candidates, 2))
    uniform = jax.random.uniform(uniform_rng, (*maps.shape[:2], num_uniform, 2))
    return uncertain_points(maps, candidates, uniform, self.num_points)


def uncertain_points(
  maps: jax.Array, candidates: jax.Array, uniform: jax.Array, num_points: int
) -> jax.Array:
  """The candidates at which a mask's logit is nearest to 0, followed by the uniform points.

  Args:
    maps: mask logits float32 (..., h, w).
    candidates: float32 (..., C, 2).
    uniform: float32 (..., U, 2), U at most `num_points`.
    num_points: P.

  Returns:
    float32 (..., P, 2).
  """
  logits = sample_points(maps[..., None, :, :], candidates)[..., 0, :]
  chosen = smallest(jnp.abs(logits), num_points - uniform.shape[-2])
  return jnp.concatenate([jnp.take_along_axis(candidates, chosen[..., None], -2), uniform], -2)


def class_losses(
  class_logits: jax.Array,
  labels: jax.Array,
  queries: jax.Array,
  matched: jax.Array,
  no_object_weight: float,
) -> jax.Array:
  """Cross-entropy of all queries, those without a target being "no object".

  Args:
    class_logits: float32 (L, B, Q, K + 1).
    labels: int32 (B, N).
    queries: int32 (L, B, N), of each target.
    matched: bool (L, B, N), whether the target has one.
    no_object_weight: weight of queries without a target; the others have weight 1.

  Returns:
    float32 (L,), weighted means over the batch.
  """
  num_queries, no_object = class_logits.shape[-2], class_logits.shape[-1] - 1

  def classes(labels: jax.Array, queries: jax.Array, matched: jax.Array) -> jax.Array:
    target = jnp.full((num_queries,), no_object, jnp.int32)
    return target.at[jnp.where(matched, queries, num_queries)].set(labels, mode="drop")

  target = jax.vmap(jax.vmap(classes), (None, 0, 0))(labels, queries, matched)
  log_probabilities = jax.nn.log_softmax(class_logits.astype(jnp.float32))
  nll = -jnp.take_along_axis(log_probabilities, target[..., None], -1)[..., 0]
  weight = jnp.where(target == no_object, no_object_weight, 1.0)
  return jnp.sum(weight * nll, (1, 2)) / jnp.sum(weight, (1, 2))


def mask_losses(
  mask_logits: jax.Array,
  segments: jax.Array,
  queries: jax.Array,
  matched: jax.Array,
  source: Any,
  *,
  points: PointSource,
  mask_weight: float,
  dice_weight: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Binary cross-entropy and Dice loss of the matched masks, at points.

  Loops over the targets and stops after the last one that any image has: the cost depends on the
  number of targets, not on the capacity. Value and gradient are computed
  together, because the loss is a sum over targets; no sample outlives its target.

  Args:
    mask_logits: float32 (L, B, Q, h, w).
    segments: uint8 (B, S, H, W), see `ops.point_sample.sample_segments`.
    queries: int32 (L, B, N), of each target.
    matched: bool (L, B, N), whether the target has one.
    source: handed to `points`: a key or recorded points.
    points: where masks are supervised.
    mask_weight: of the mean binary cross-entropy of a mask.
    dice_weight: of its Dice loss.

  Returns:
    Sums over all matched pairs, float32 (L,) each: the weighted sum, which alone is differentiable
    (with respect to `mask_logits`), the binary cross-entropies and the Dice losses.
  """
  settings = _Settings(points, mask_weight, dice_weight)
  return _mask_losses(mask_logits, (segments, queries, matched, source), settings)


class _Settings(NamedTuple):
  points: PointSource
  mask_weight: float
  dice_weight: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mask_losses(mask_logits: jax.Array, targets: Any, settings: _Settings):
  return _over_targets(mask_logits, targets, settings, with_gradient=False)[0]


def _forward(mask_logits, targets, settings):
  return _over_targets(mask_logits, targets, settings, with_gradient=True)


def _backward(settings, gradient, cotangents):
  del settings
  return gradient * cotangents[0][:, None, None, None, None], None


_mask_losses.defvjp(_forward, _backward)


def _over_targets(
  mask_logits: jax.Array, targets: Any, settings: _Settings, *, with_gradient: bool
):
  """The three sums, and the gradient of the first or None."""
  segments, queries, matched, source = targets

  def body(target: jax.Array, carry: Any):
    sums, gradient = carry
    query, exists = (
      jax.lax.dynamic_index_in_dim(x, target, 2, keepdims=False) for x in (queries, matched)
    )
    maps = jax.vmap(jax.vmap(lambda m, q: m[q]))(mask_logits, query)
    where = settings.points(source, target, maps)
    truth = _target_samples(segments, where, target)

    def pairs(logits: jax.Array):
      cross_entropy, dice = (
        jnp.sum(jnp.where(exists, loss, 0.0), axis=1) for loss in _pair_losses(logits, truth)
      )
      total = settings.mask_weight * cross_entropy + settings.dice_weight * dice
      return jnp.sum(total), jnp.stack([total, cross_entropy, dice])

    logits = sample_points(maps[:, :, None], where)[:, :, 0]
    slope, terms = jax.grad(pairs, has_aux=True)(logits)
    if with_gradient:
      update = splat_points(slope[:, :, None], where, maps.shape[-2:])[:, :, 0]
      gradient = jax.vmap(jax.vmap(lambda g, q, u: g.at[q].add(u)))(gradient, query, update)
    return sums + terms, gradient

  count = jnp.max(jnp.where(matched, jnp.arange(1, matched.shape[-1] + 1), 0))
  sums = jnp.zeros((3, mask_logits.shape[0]), jnp.float32)
  gradient = jnp.zeros_like(mask_logits) if with_gradient else None
  sums, gradient = jax.lax.fori_loop(0, count, body, (sums, gradient))
  return tuple(sums), gradient


def _target_samples(segments: jax.Array, points: jax.Array, target: jax.Array) -> jax.Array:
  """Samples mask number `target` of each image at (L, B, P, 2) points: float32 (L, B, P)."""
  layers, batch, num_points = points.shape[:3]
  together = points.swapaxes(0, 1).reshape(batch, layers * num_points, 2)
  ids = jnp.broadcast_to(target, (batch, 1))
  samples = sample_segments(segments, together, ids)
  return samples.reshape(batch, layers, num_points).swapaxes(0, 1)


def _pair_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean binary cross-entropy and Dice loss over the last axis."""
  cross_entropy = jnp.mean(jax.nn.softplus(logits) - logits * targets, axis=-1)
  masks = jax.nn.sigmoid(logits)
  overlap = 2.0 * jnp.sum(masks * targets, -1) + 1.0
  return cross_entropy, 1.0 - overlap / (jnp.sum(masks, -1) + jnp.sum(targets, -1) + 1.0)
