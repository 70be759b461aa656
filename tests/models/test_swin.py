"""Swin Transformer: odd sizes against official outputs, windows and bias against their rules."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError

from effseg_jax import create_model
from effseg_jax.models.backbones.swin import (
  PatchMerging,
  Swin,
  relative_position_bias,
  shifted_window_bias,
)
from effseg_jax.models.layers import DropPath
from tests.universal_models import nhwc, official_variables, small_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_official_features_of_an_odd_size():
  golden = np.load(GOLDEN / "swin_tiny_odd.npz")
  model = create_model("mask2former_swin_tiny")
  variables = {"params": official_variables(model)["params"]["backbone"]}
  features = jax.jit(model.backbone.apply)(variables, nhwc(golden["x"]))
  for key, found in features.items():
    np.testing.assert_allclose(found[..., ::16], nhwc(golden[key]), atol=2e-5, rtol=1e-4)


def test_bias_is_looked_up_by_the_offset_of_query_and_key():
  window, heads = 3, 2
  table = np.random.default_rng(0).standard_normal((25, heads)).astype(np.float32)
  bias = np.asarray(relative_position_bias(jnp.asarray(table), window))
  assert bias.shape == (heads, 9, 9)
  pixels = [(y, x) for y in range(window) for x in range(window)]
  for query, (y, x) in enumerate(pixels):
    for key, (other_y, other_x) in enumerate(pixels):
      index = (y - other_y + 2) * 5 + x - other_x + 2
      np.testing.assert_array_equal(bias[:, query, key], table[index])


@pytest.mark.parametrize("grid", [(7, 7), (7, 21), (14, 14)])
def test_pixels_of_different_regions_are_kept_apart(grid):
  window, shift = 7, 3
  regions = np.zeros(grid)
  slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
  for i, rows in enumerate(slices):
    for j, cols in enumerate(slices):
      regions[rows, cols] = 3 * i + j
  regions = regions.reshape(grid[0] // 7, 7, grid[1] // 7, 7).transpose(0, 2, 1, 3).reshape(-1, 49)
  expected = np.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)
  np.testing.assert_array_equal(shifted_window_bias(grid, window), expected)


def test_neighbours_are_merged_down_the_columns_first():
  x = np.random.default_rng(0).standard_normal((1, 3, 5, 2)).astype(np.float32)
  module = PatchMerging()
  variables = jax.jit(module.init)(jax.random.key(0), x)
  padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
  quarters = [padded[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
  joined = np.concatenate(quarters, axis=-1)
  mean, var = joined.mean(-1, keepdims=True), joined.var(-1, keepdims=True)
  normed = (joined - mean) / np.sqrt(var + 1e-5)
  expected = normed @ variables["params"]["reduce"]["kernel"]
  np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)


def test_no_gather_is_left_in_the_program():
  model = small_model("mask2former_swin_tiny").backbone
  x = jnp.zeros((1, 50, 70, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  loss = lambda v: sum(jnp.sum(y) for y in model.apply(v, x).values())  # noqa: E731
  program = jax.jit(jax.grad(loss)).lower(variables).as_text()
  assert "gather" not in program
  assert "scatter" not in program


def test_branches_are_dropped_in_training_more_and_more():
  model = Swin(8, (1, 1, 2, 1), (1, 2, 2, 4), 4, drop_path=0.8)
  x = jnp.zeros((1, 32, 32, 3))
  rates, called = [], []

  def watch(call, args, kwargs, context):
    if isinstance(context.module, DropPath):
      rates.append(context.module.rate)
      called.append(args[1])
    return call(*args, **kwargs)

  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  with nn.intercept_methods(watch):
    rngs = {"drop_path": jax.random.key(0)}
    jax.eval_shape(lambda v: model.apply(v, x, True, rngs=rngs), variables)
    jax.eval_shape(model.apply, variables, x)
  np.testing.assert_allclose(rates, 2 * [0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8], atol=1e-9)
  assert called == 10 * [True] + 10 * [False]
  with pytest.raises(InvalidRngError, match="drop_path"):
    jax.eval_shape(lambda v: model.apply(v, x, True), variables)


def test_bfloat16_is_close_and_keeps_parameters():
  model = small_model("mask2former_swin_tiny")
  half = small_model("mask2former_swin_tiny", dtype=jnp.bfloat16).backbone
  variables = {"params": official_variables(model)["params"]["backbone"]}
  x = np.random.default_rng(0).standard_normal((1, 50, 70, 3)).astype(np.float32)
  initial = jax.eval_shape(half.init, jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
  expected, found = jax.jit(model.backbone.apply)(variables, x), jax.jit(half.apply)(variables, x)
  for key, value in expected.items():
    assert found[key].dtype == jnp.bfloat16
    error = np.abs(np.asarray(found[key], np.float32) - value).mean()
    assert 0 < error < 0.02 * value.std(), key


def test_parameter_count():
  shapes = jax.eval_shape(Swin().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 27_520_698
