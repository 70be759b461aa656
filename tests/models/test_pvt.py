"""PVT v2: the published sizes, and one stage's arithmetic against its formulas in float64."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from effseg_jax.models.backbones.pvt import PVT_V2, Block, PVTv2, SpatialReduction
from effseg_jax.models.layers import DropPath


@pytest.mark.parametrize(
  ("name", "millions"),
  [("b0", 3.67), ("b1", 14.01), ("b2", 25.36), ("b3", 45.24), ("b4", 62.56), ("b5", 81.96)],
)
def test_published_sizes(name, millions):
  model = PVTv2(**PVT_V2[f"pvt_v2_{name}"])
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  classifier = 1000 * (model.widths[-1] + 1)
  assert round((size + classifier) / 1e6, 2) == millions
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strides_of_any_size(dtype):
  model = PVTv2(**PVT_V2["pvt_v2_b0"], dtype=dtype)
  outputs = jax.eval_shape(
    lambda key, x: model.init_with_output(key, x)[0], jax.random.key(0), jnp.zeros((2, 70, 39, 3))
  )
  assert {name: out.shape for name, out in outputs.items()} == {
    "res2": (2, 18, 10, 32),
    "res3": (2, 9, 5, 64),
    "res4": (2, 5, 3, 160),
    "res5": (2, 3, 2, 256),
  }
  assert {out.dtype for out in outputs.values()} == {jnp.dtype(dtype)}


def test_spatial_reduction_is_a_strided_convolution():
  x = np.random.default_rng(0).standard_normal((2, 7, 5, 3)).astype(np.float32)
  model = SpatialReduction(2)
  variables = model.init(jax.random.key(0), x)
  expected = jax.lax.conv_general_dilated(
    x, variables["params"]["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  np.testing.assert_allclose(model.apply(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize("reduction", [2, 1])
def test_block(reduction):
  heads, channels, rows, cols = 2, 4, 4, 6
  x = np.random.default_rng(0).standard_normal((1, rows, cols, channels))
  block = Block(heads, reduction, ratio=3, drop_path=0.5)
  # Every parameter is drawn, so that none can be left out unnoticed.
  shapes = jax.eval_shape(lambda key: block.init(key, jnp.asarray(x), False), jax.random.key(0))
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape), shapes["params"])
  found = jax.jit(lambda p, x: block.apply({"params": p}, x, False))(params, x)

  def norm(x, p, epsilon):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * p["scale"] + p["bias"]

  dense = lambda x, p: x @ p["kernel"] + p["bias"]  # noqa: E731
  a = params["attention"]
  y = norm(x[0], params["norm1"], 1e-6)
  query = dense(y, a["query"]).reshape(-1, heads, channels // heads)
  if reduction > 1:
    y = np.einsum("hrwsc,rscd->hwd", y.reshape(2, 2, 3, 2, channels), a["reduce"]["kernel"])
    y = norm(y + a["reduce"]["bias"], a["norm"], 1e-5)
  key, value = np.split(dense(y, a["key_value"]), 2, axis=-1)
  key, value = (z.reshape(-1, heads, channels // heads) for z in (key, value))
  weights = softmax(np.einsum("qnd,knd->nqk", query, key) / np.sqrt(channels / heads), axis=-1)
  mixed = np.einsum("nqk,knd->qnd", weights, value).reshape(rows, cols, channels)
  x = x[0] + dense(mixed, a["proj"])
  y = np.pad(dense(norm(x, params["norm2"], 1e-6), params["fc1"]), ((1, 1), (1, 1), (0, 0)))
  y = sum(
    y[i : i + rows, j : j + cols] * params["depthwise"]["kernel"][i, j, 0]
    for i in range(3)
    for j in range(3)
  )
  y = y + params["depthwise"]["bias"]
  y = 0.5 * y * (1 + erf(y / np.sqrt(2)))
  np.testing.assert_allclose(found[0], x + dense(y, params["fc2"]), atol=1e-4)


def test_stochastic_depth_drops_branches_and_grows():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 1, 1, 4)), jnp.float32)
  block = Block(1, 1, ratio=1, drop_path=0.5)
  own = jax.jit(lambda key: block.init(key, x, False))(jax.random.key(0))
  run = jax.jit(lambda key: block.apply(own, x, True, rngs={"drop_path": key}))
  same = np.all(run(jax.random.key(1)) == x, axis=(1, 2, 3))
  assert 4 <= same.sum() <= 32  # a quarter loses both branches
  kept = jax.jit(lambda: block.apply(own, x, False))()
  assert not np.any(np.all(kept == x, axis=(1, 2, 3)))

  rates = []

  def note(call, args, kwargs, context):
    if isinstance(context.module, DropPath):
      rates.append(context.module.rate)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    model = PVTv2((8, 8, 10, 8), (1, 2, 1, 1), (1, 1, 1, 1), drop_path=0.8)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  np.testing.assert_allclose(rates, np.repeat(np.linspace(0, 0.8, 5), 2))
