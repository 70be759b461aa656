"""Attention: its formulations are one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops import backend
from effseg_jax.ops.attention import attention, attention_by_products


def arrays(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def plain(query, key, value, heads, blocked=None):
  """As the definition reads, head by head."""
  outputs = []
  for q, k, v in zip(*(jnp.split(x, heads, -1) for x in (query, key, value)), strict=True):
    logits = q @ jnp.swapaxes(k, 1, 2) / np.sqrt(q.shape[-1])
    logits = logits if blocked is None else jnp.where(blocked, -np.inf, logits)
    outputs.append(jax.nn.softmax(logits, axis=-1) @ v)
  return jnp.concatenate(outputs, axis=-1)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_platform_computes_the_same_value_and_gradient(platform, masked):
  operands = arrays((2, 7, 24), (2, 11, 24), (2, 11, 24))
  blocked = None
  if masked:
    blocked = jnp.asarray(np.random.default_rng(1).random((2, 7, 11)) < 0.6)
    blocked = blocked.at[:, :, 0].set(False)

  def run(*operands):
    with backend.target_platform(platform):
      return attention(*operands, 3, blocked=blocked)

  expected, pull = jax.vjp(lambda *x: plain(*x, 3, blocked), *operands)
  found, own_pull = jax.vjp(run, *operands)
  np.testing.assert_allclose(found, expected, atol=2e-6)
  (cotangent,) = arrays(expected.shape)
  for ours, theirs in zip(own_pull(cotangent), pull(cotangent), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_large_logits_do_not_overflow_and_halves_keep_their_type():
  query, key, value = (50 * x for x in arrays((1, 3, 8), (1, 5, 8), (1, 5, 8)))
  found = attention_by_products(query, key, value, 1)
  assert np.isfinite(found).all()
  np.testing.assert_allclose(found, plain(query, key, value, 1), rtol=1e-4)
  half = attention(*(x.astype(jnp.bfloat16) for x in (query, key, value)), 2)
  assert half.dtype == jnp.bfloat16


def test_dropped_weights_are_replaced_by_larger_ones_on_average():
  query, key = arrays((1, 4, 8), (1, 64, 8))
  value = jnp.ones((1, 64, 8))
  keys = jax.random.split(jax.random.key(0), 64)
  drop = jax.vmap(lambda k: attention(query, key, value, 2, dropout=(0.25, k)))
  found = drop(keys)
  assert float(jnp.std(found)) > 0.01
  np.testing.assert_allclose(jnp.mean(found), 1.0, atol=0.02)
