"""The convolution of an enlarged map equals enlarging and convolving, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops.upsampled_conv import upsampled_conv, upsampled_conv_reference


@pytest.mark.parametrize(
  ("grid", "size", "taps"),
  [((3, 5), (12, 20), 3), ((4, 3), (7, 11), 3), ((2, 1), (8, 4), 5), ((6, 4), (3, 4), 3)],
)
def test_equals_the_reference(grid, size, taps):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, *grid, 4)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((taps, taps, 4, 3)), jnp.float32)
  cotangent = jnp.asarray(rng.standard_normal((2, *size, 3)), jnp.float32)

  @jax.jit
  def both(x, kernel):
    results = []
    for function in (upsampled_conv, upsampled_conv_reference):
      value, pull = jax.vjp(lambda x, k, f=function: f(x, k, size), x, kernel)
      results.append((value, pull(cotangent)))
    return results

  found, expected = both(x, kernel)
  assert found[0].shape == (2, *size, 3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, expected)


def test_the_enlarged_input_is_never_made():
  x, kernel = jnp.zeros((1, 8, 8, 64)), jnp.zeros((3, 3, 64, 2))
  jaxpr = jax.make_jaxpr(lambda x, k: upsampled_conv(x, k, (32, 32)))(x, kernel)
  largest = max(out.aval.size for eqn in jaxpr.eqns for out in eqn.outvars)
  assert largest < 32 * 32 * 64 / 4


def test_narrow_types_stay_narrow():
  x, kernel = jnp.zeros((1, 2, 2, 4), jnp.bfloat16), jnp.zeros((3, 3, 4, 2), jnp.bfloat16)
  assert upsampled_conv(x, kernel, (4, 4)).dtype == jnp.bfloat16
