"""Shared layers against their formulas: values, gradients, statistics, dtypes."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.models.layers import (
  BatchNorm,
  Conv,
  ConvNorm,
  DepthwiseConv,
  DropPath,
  GroupNorm,
  conv_init,
  depthwise_init,
)
from effseg_jax.ops.backend import target_platform
from effseg_jax.training import sharding


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lax_conv(x, kernel, stride, groups=1):
  """Padded by `k // 2` on both sides."""
  padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def assert_same_gradients(module, params, reference, x):
  """Value and gradients of a module equal those of a function (params, x)."""

  @jax.jit
  def both(params, x):
    found, pull = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
    expected, pull_reference = jax.vjp(reference, params, x)
    cotangent = jax.random.normal(jax.random.key(0), expected.shape)
    return (found, pull(cotangent)), (expected, pull_reference(cotangent))

  found, expected = both(params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize(("size", "stride", "bias"), [(1, 1, True), (1, 2, False), (3, 2, True)])
def test_conv(size, stride, bias):
  module, x = Conv(4, size, stride, use_bias=bias), normal(0, 2, 7, 5, 3)
  params = {"kernel": normal(1, size, size, 3, 4)} | ({"bias": normal(2, 4)} if bias else {})
  assert jax.tree.map(jnp.shape, dict(module.init(jax.random.key(0), x)["params"])) == jax.tree.map(
    np.shape, params
  )
  assert_same_gradients(
    module, params, lambda p, x: lax_conv(x, p["kernel"], stride) + p.get("bias", 0.0), x
  )


@pytest.mark.parametrize(("formulation", "stride"), [("auto", 1), ("spatial", 2), ("fft", 1)])
def test_depthwise_conv(formulation, stride):
  module = DepthwiseConv(3, stride, use_bias=True, formulation=formulation)
  params = {"kernel": normal(1, 3, 3, 1, 3), "bias": normal(2, 3)}
  assert_same_gradients(
    module,
    params,
    lambda p, x: lax_conv(x, p["kernel"], stride, groups=3) + p["bias"],
    normal(0, 2, 7, 3, 3),
  )


def test_circular_borders_wrap():
  module, params = DepthwiseConv(3, formulation="circular"), {"kernel": normal(1, 3, 3, 1, 3)}
  apply = jax.jit(lambda x: module.apply({"params": params}, x))
  x = normal(0, 1, 7, 5, 3)
  np.testing.assert_allclose(
    apply(np.roll(x, (2, 3), (1, 2))), np.roll(apply(x), (2, 3), (1, 2)), atol=1e-5
  )
  inside = lax_conv(x, params["kernel"], 1, groups=3)[:, 1:-1, 1:-1]
  np.testing.assert_allclose(apply(x)[:, 1:-1, 1:-1], inside, atol=1e-5)


@pytest.mark.parametrize(
  "module",
  [
    Conv(4, 3, use_bias=True, dtype=jnp.bfloat16),
    Conv(4, dtype=jnp.bfloat16),
    DepthwiseConv(3, use_bias=True, dtype=jnp.bfloat16),
    DepthwiseConv(3, formulation="fft", dtype=jnp.bfloat16),
    DepthwiseConv(3, formulation="circular", dtype=jnp.bfloat16),
  ],
)
def test_parameters_are_float32_and_the_computation_is_not(module):
  variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 5, 7, 4)))
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  for given in ("float32", "bfloat16"):
    x = jax.ShapeDtypeStruct((1, 5, 7, 4), given)
    assert jax.eval_shape(module.apply, variables, x).dtype == jnp.bfloat16


def test_initialisers_have_the_official_variance():
  key = jax.random.key(0)
  dense = conv_init(key, (3, 3, 40, 80), jnp.float32)
  assert np.var(dense) == pytest.approx(2 / (9 * 80), rel=0.05)
  depthwise = depthwise_init(key, (5, 5, 1, 800))
  assert np.var(depthwise) == pytest.approx(2 / 25, rel=0.05)


# Batch normalisation.

STATISTICS = {"mean": normal(3, 3), "var": np.abs(normal(4, 3)) + 0.5}
AFFINE = {"scale": normal(5, 3), "bias": normal(6, 3)}


def train_norm(x, **fields):
  """(params, x) -> outputs and the new running statistics."""
  variables = {"params": AFFINE, "batch_stats": STATISTICS}
  run = lambda x: BatchNorm(**fields).apply(  # noqa: E731
    variables, x, train=True, mutable="batch_stats"
  )
  outputs, updates = jax.jit(run)(x)
  return outputs, updates["batch_stats"]


def batch_norm(x, epsilon=1e-5):
  """As the paper has it, float64."""
  x = x.astype(np.float64)
  axes = tuple(range(x.ndim - 1))
  mean, var = x.mean(axes), x.var(axes)
  return (x - mean) / np.sqrt(var + epsilon) * AFFINE["scale"] + AFFINE["bias"]


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (6, 3), (2, 1, 1, 3)])
def test_running_variance_is_unbiased_and_the_normalising_one_is_not(shape):
  x = 3 * normal(0, *shape) + 10
  outputs, statistics = train_norm(x)
  np.testing.assert_allclose(outputs, batch_norm(x), rtol=1e-4, atol=1e-4)
  flat = x.reshape(-1, 3).astype(np.float64)
  mean = 0.9 * STATISTICS["mean"] + 0.1 * flat.mean(0)
  var = 0.9 * STATISTICS["var"] + 0.1 * flat.var(0, ddof=1)
  np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-5)
  np.testing.assert_allclose(statistics["var"], var, rtol=1e-5)


def test_momentum_is_the_share_of_the_new():
  x = normal(0, 2, 5, 7, 3)
  _, statistics = train_norm(x, momentum=1.0)
  np.testing.assert_allclose(statistics["mean"], x.mean((0, 1, 2)), atol=1e-6)
  np.testing.assert_allclose(statistics["var"], x.reshape(-1, 3).var(0, ddof=1), rtol=1e-5)


def test_a_single_value_has_no_variance():
  outputs, statistics = train_norm(normal(0, 1, 1, 1, 3))
  np.testing.assert_allclose(outputs[0, 0, 0], AFFINE["bias"], atol=1e-6)
  np.testing.assert_allclose(statistics["var"], 0.9 * STATISTICS["var"], rtol=1e-6)


def test_statistics_are_of_the_global_batch():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})
  x = normal(0, 8, 3, 5, 3) + np.arange(8, dtype=np.float32)[:, None, None, None]
  found = train_norm(jax.device_put(x, sharding.batch_sharding(mesh)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, train_norm(x)
  )


def test_evaluation_uses_the_running_statistics():
  x = normal(0, 2, 5, 7, 3)
  variables = {"params": AFFINE, "batch_stats": STATISTICS}
  found = BatchNorm().apply(variables, x, train=False)
  inverse = AFFINE["scale"] / np.sqrt(STATISTICS["var"] + 1e-5)
  expected = (x - STATISTICS["mean"]) * inverse + AFFINE["bias"]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_initialising_counts_no_batch():
  variables = BatchNorm().init(jax.random.key(0), normal(0, 4, 3), train=True)
  np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
  np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))


def test_gradients_pass_through_the_statistics():
  x, cotangent = normal(0, 2, 5, 7, 3), normal(1, 2, 5, 7, 3)

  def reference(params, x):
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    return (x - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["bias"]

  def ours(params, x):
    variables = {"params": params, "batch_stats": STATISTICS}
    return BatchNorm().apply(variables, x, train=True, mutable="batch_stats")[0]

  gradients = jax.jit(lambda: [jax.vjp(f, AFFINE, x)[1](cotangent) for f in (ours, reference)])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients())


def test_bfloat16_statistics_are_float32():
  x = jnp.asarray(normal(0, 2, 5, 7, 3) + 100, jnp.bfloat16)
  outputs, statistics = train_norm(x, dtype=jnp.bfloat16)
  assert outputs.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(outputs.astype(np.float32), batch_norm(exact), atol=0.03)
  variables = {"params": AFFINE, "batch_stats": STATISTICS}
  half = BatchNorm(dtype=jnp.bfloat16).apply(variables, x, train=False)
  assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("activate", [True, False])
def test_conv_norm_is_its_parts(activate):
  x, kernel = normal(0, 2, 7, 5, 4), normal(1, 3, 3, 4, 3)
  variables = {
    "params": {"conv": {"kernel": kernel}, "norm": AFFINE},
    "batch_stats": {"norm": STATISTICS},
  }
  found = ConvNorm(3, 3, 2, activate).apply(variables, x, train=False)
  norm = {"params": AFFINE, "batch_stats": STATISTICS}
  expected = BatchNorm().apply(norm, lax_conv(x, kernel, 2), train=False)
  if activate:
    expected = expected * np.clip(expected + 3, 0, 6) / 6
  np.testing.assert_allclose(found, expected, atol=1e-5)


# Stochastic depth.


def test_whole_examples_are_dropped_and_the_expectation_stays():
  x, rate = np.ones((4096, 3, 2), np.float32), 0.3
  dropped = DropPath(rate).apply({}, x, train=True, rngs={"drop_path": jax.random.key(0)})
  per_example = np.asarray(dropped).reshape(4096, -1)
  np.testing.assert_array_equal(per_example, per_example[:, :1].repeat(6, 1))
  values = np.unique(per_example)
  np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-6)
  deviation = np.sqrt(rate / (1 - rate) / 4096)
  assert abs(per_example.mean() - 1) < 4 * deviation


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_dropped_examples_pass_no_gradient(platform):
  x = normal(0, 64, 5)
  drop = lambda x: DropPath(0.5).apply(  # noqa: E731
    {}, x, train=True, rngs={"drop_path": jax.random.key(1)}
  )
  with target_platform(platform):
    value, pull = jax.vjp(drop, x)
  np.testing.assert_allclose(pull(jnp.ones_like(value))[0], value / x, rtol=1e-5)
  assert {0.0, 2.0} == set(np.round(np.asarray(value / x)[:, 0], 4).tolist())


@pytest.mark.parametrize(("rate", "train"), [(0.3, False), (0.0, True)])
def test_nothing_is_dropped_without_reason(rate, train):
  x = jnp.asarray(normal(0, 4, 3), jnp.bfloat16)
  assert DropPath(rate).apply({}, x, train=train) is x  # and no rng is asked for


def test_dropping_keeps_bfloat16():
  x = jnp.ones((4, 3), jnp.bfloat16)
  drop = nn.apply(lambda module, x: module(x, train=True), DropPath(0.5))
  assert drop({}, x, rngs={"drop_path": jax.random.key(0)}).dtype == jnp.bfloat16


def test_group_norm():
  x, cotangent = 3 * normal(0, 2, 5, 3, 64) + 1, normal(1, 2, 5, 3, 64)
  params = {"scale": normal(2, 64), "bias": normal(3, 64)}

  @jax.jit
  def both(params, x):
    results = []
    for module in (GroupNorm(), nn.GroupNorm(32, epsilon=1e-5, use_fast_variance=False)):
      value, pull = jax.vjp(lambda p, x, m=module: m.apply({"params": p}, x), params, x)
      results.append((value, pull(cotangent)))
    return results

  found, expected = both(params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
  narrow = GroupNorm(jnp.bfloat16).apply({"params": params}, x.astype(jnp.bfloat16))
  assert narrow.dtype == jnp.bfloat16
