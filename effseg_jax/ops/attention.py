"""Scaled dot-product attention, in the formulation that suits the platform."""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp

from effseg_jax.ops import backend

# Inputs that cuDNN's fused kernel supports: half precision, and heads of up to 128 channels in
# eights.
_FUSED_DTYPES = (jnp.bfloat16, jnp.float16)
_FUSED_WIDTH, _FUSED_MULTIPLE = 128, 8


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  heads: int,
  *,
  blocked: jax.Array | None = None,
  dropout: tuple[float, jax.Array] | None = None,
) -> jax.Array:
  """`softmax(q k^T / sqrt(d)) v` for each head; the softmax is float32.

  Args:
    query: (B, Q, C); its heads are contiguous groups of d = C / heads channels.
    key: (B, S, C).
    value: (B, S, C).
    heads: their number.
    blocked: bool (B, Q, S), true where a query must not look; no row may be all true.
    dropout: rate at which weights are dropped, and the key of the draws.

  Returns:
    (B, Q, C), of the query's dtype.
  """
  if backend.platform() == "cpu" or dropout is not None:
    return attention_by_products(query, key, value, heads, blocked=blocked, dropout=dropout)
  query, key, value = (
    einops.rearrange(x, "b n (h d) -> b n h d", h=heads) for x in (query, key, value)
  )
  mask = None if blocked is None else ~blocked[:, None]
  mixed = jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation="cudnn" if _is_fused(query) else "xla"
  )
  return einops.rearrange(mixed, "b n h d -> b n (h d)")


def attention_by_products(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  heads: int,
  *,
  blocked: jax.Array | None = None,
  dropout: tuple[float, jax.Array] | None = None,
) -> jax.Array:
  """`attention` as it reads: the reference form, and the CPU's."""
  # Heads come before tokens: products of (B, N, heads, d) are seven times slower on the CPU.
  query, key, value = (
    einops.rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key, value)
  )
  query = query * query.shape[-1] ** -0.5
  logits = jnp.einsum("bhqd,bhsd->bhqs", query, key, preferred_element_type=jnp.float32)
  if blocked is not None:
    logits = jnp.where(blocked[:, None], -jnp.inf, logits)
  # Divided after the product with the values, which is smaller than the weights.
  weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if dropout is not None:
    kept = jax.random.bernoulli(dropout[1], 1.0 - dropout[0], weights.shape)
    weights = jnp.where(kept, weights / (1.0 - dropout[0]), 0.0)
  mixed = jnp.einsum(
    "bhqs,bhsd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  mixed = (mixed / total).astype(query.dtype)
  return einops.rearrange(mixed, "b h n d -> b n (h d)")


def _is_fused(query: jax.Array) -> bool:
  """Whether cuDNN's fused kernel is available and supports (B, Q, heads, d)."""
  width = query.shape[-1]
  return (
    jax.default_backend() == backend.platform() == "gpu"
    and query.dtype in _FUSED_DTYPES
    and width <= _FUSED_WIDTH
    and width % _FUSED_MULTIPLE == 0
  )
