"""Which query is trained on which target: bipartite matching on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from optax.assignment import hungarian_algorithm

from effseg_jax.ops import backend

# The cost of a target without a query: more than any query's, small enough for float32.
_UNMATCHED = 1e4


def matching_costs(
  class_logits: jax.Array,
  mask_logits: jax.Array,
  labels: jax.Array,
  targets: jax.Array,
  *,
  class_weight: float,
  mask_weight: float,
  dice_weight: float,
) -> jax.Array:
  """The cost of assigning a target to a query (Cheng et al. 2022, Mask2Former, section 3.3).

  `-class_weight softmax(class)[label] + mask_weight BCE + dice_weight Dice`, the last two over the
  points at which predictions and targets were sampled.

  Args:
    class_logits: float32 (B, Q, K + 1); the last class is "no object".
    mask_logits: float32 (B, Q, P), samples at points.
    labels: int32 (B, N), the targets' classes; a negative one is padding, whose costs mean nothing.
    targets: float32 (B, N, P), samples of the targets' masks at the same points.
    class_weight: of the class term.
    mask_weight: of the mean binary cross-entropy.
    dice_weight: of the Dice loss.

  Returns:
    float32 (B, Q, N).
  """
  probabilities = jax.nn.softmax(class_logits)
  chosen = jnp.take_along_axis(probabilities, jnp.maximum(labels, 0)[:, None, :], axis=2)
  masks = jax.nn.sigmoid(mask_logits)
  product = lambda a: jnp.einsum("bqp,bnp->bqn", a, targets, precision="highest")  # noqa: E731
  # BCE(x, t) = softplus(x) - x t: one product instead of two.
  cross_entropy = jnp.mean(jax.nn.softplus(mask_logits), axis=-1)[:, :, None]
  cross_entropy = cross_entropy - product(mask_logits) / mask_logits.shape[-1]
  total = jnp.sum(masks, -1)[:, :, None] + jnp.sum(targets, -1)[:, None, :]
  dice = 1.0 - (2.0 * product(masks) + 1.0) / (total + 1.0)
  return mask_weight * cross_entropy - class_weight * chosen + dice_weight * dice


def assign(costs: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The assignment of targets to different queries whose total cost is least.

  Args:
    costs: float32 (L, B, Q, N), of L predictions.
    valid: bool (L, B, N), false for padding.

  Returns:
    The query of each target, int32 (L, B, N), and whether it has one, bool (L, B, N): not padding,
    and not one too many where there are more targets than queries. Without a query it is 0.
  """
  return backend.on_each_device(jax.vmap(jax.vmap(_assign_one)), axis=1)(costs, valid)


def _assign_one(costs: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Hungarian algorithm over targets as rows.

  Each target has a column of its own besides the queries. Padding takes it at once: rows of equal
  costs would each be searched through all earlier ones, and matching 15 targets among 100 took 30
  times as long. A real target ends there only where all queries are taken.
  """
  num_queries, num_targets = costs.shape
  # With a cost that is not finite the algorithm would search for ever.
  bound = _UNMATCHED / 2
  costs = jnp.clip(jnp.nan_to_num(costs, nan=bound), -bound, bound)
  own = jnp.where(jnp.eye(num_targets, dtype=bool), -1.0, 0.0)
  padding = jnp.concatenate([jnp.zeros((num_targets, num_queries)), own], axis=1)
  real = jnp.pad(costs.T, ((0, 0), (0, num_targets)), constant_values=_UNMATCHED)
  rows, columns = hungarian_algorithm(jnp.where(valid[:, None], real, padding))
  queries = jnp.zeros((num_targets,), jnp.int32).at[rows].set(columns.astype(jnp.int32))
  matched = valid & (queries < num_queries)
  return jnp.where(matched, queries, 0), matched
