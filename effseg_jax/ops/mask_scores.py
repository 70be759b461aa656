"""Class scores at pixels from (class, mask) pairs (Mask2Former, semantic inference)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def semantic_scores(class_logits: jax.Array, mask_logits: jax.Array) -> jax.Array:
  """Scores of the classes where the masks are: class times mask probability, summed over queries.

  Args:
    class_logits: (B, Q, K + 1), the last class being "no object".
    mask_logits: (B, Q, h, w).

  Returns:
    float32 (B, K, h, w).
  """
  classes = jax.nn.softmax(class_logits.astype(jnp.float32))[..., :-1]
  masks = jax.nn.sigmoid(mask_logits.astype(jnp.float32))
  return jax.vmap(class_scores)(classes, masks)


def class_scores(classes: jax.Array, masks: jax.Array) -> jax.Array:
  """Probabilities (Q, K) and (Q, h, w) -> scores (K, h, w)."""
  return jnp.einsum("qk,qhw->khw", classes, masks, precision="highest")
