"""Deformable attention: official outputs and gradients, all forms, edges, and sharding."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effseg_jax import UserError
from effseg_jax.ops import deformable
from effseg_jax.ops.backend import target_platform
from effseg_jax.ops.deformable import deformable_attention, deformable_attention_reference

GOLDEN = Path(__file__).parents[1] / "golden"


def queries_last(x):
  """(B, Q, M, L, P, ...) -> (B, M, L, P, ..., Q)."""
  return jnp.moveaxis(jnp.asarray(x), 1, -1)


@functools.cache
def program(form, sizes):
  """(value, locations, weights, cotangent) -> output and the three gradients."""

  @jax.jit
  def run(value, locations, weights, cotangent):
    out, pull = jax.vjp(lambda v, x, w: form(v, sizes, x, w), value, locations, weights)
    return out, *pull(cotangent)

  return run


def on_gpu(*args):
  """The form for GPUs, through the dispatch."""
  with target_platform("gpu"):
    return deformable_attention(*args)


def on_tpu(*args):
  """The form for TPUs, through the dispatch."""
  with target_platform("tpu"):
    return deformable_attention(*args)


def inputs(sizes, batch=2, queries=37, heads=3, points=2, channels=6, seed=0):
  """Points inside, on and outside the edges, some far away."""
  rng = np.random.default_rng(seed)
  tokens = sum(rows * cols for rows, cols in sizes)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  locations = 0.5 + 0.5 * draw(batch, heads, len(sizes), points, 2, queries)
  locations[..., :3] *= 50
  weights = np.abs(draw(batch, heads, len(sizes), points, queries))
  return (
    jnp.asarray(draw(batch, tokens, heads, channels)),
    jnp.asarray(locations),
    jnp.asarray(weights),
    jnp.asarray(draw(batch, queries, heads, channels)),
  )


def assert_same(found, expected, tolerance=1e-5):
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    scale = max(1.0, float(np.abs(b).max()))
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance * scale
    )


@pytest.mark.parametrize(
  "form", [deformable_attention, on_gpu, on_tpu, deformable_attention_reference]
)
def test_official_values_and_gradients(form):
  with np.load(GOLDEN / "pixel_decoder.npz") as file:
    golden = {key.removeprefix("sampling/"): file[key] for key in file if "sampling/" in key}
  value = jnp.asarray(golden["value"])
  split = lambda x: x.reshape(*x.shape[:2], *value.shape[2:])  # noqa: E731
  sizes = tuple(tuple(size) for size in golden["spatial_shapes"].tolist())
  out, of_value, of_locations, of_weights = program(form, sizes)(
    value,
    queries_last(golden["sampling_locations"]),
    queries_last(golden["attention_weights"]),
    split(golden["cotangent"]),
  )
  compare = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)
  compare(out, split(golden["out"]))
  compare(of_value, golden["grad_value"])
  # Query 4 is one pixel outside, where the derivative has two values; on level 2 the last bit of
  # the official code's arithmetic, which no compiler keeps, chooses the other one.
  expected = queries_last(golden["grad_sampling_locations"])
  compare(of_locations.at[:, :, 2, :, :, 4].set(0), expected)
  compare(of_weights, queries_last(golden["grad_attention_weights"]))


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    (((3, 5), (1, 7), (11, 1)), {}),
    (((1, 1),), {"channels": 1, "heads": 1, "points": 1}),
    # More queries than a step of the backward pass takes, in no whole number of steps.
    (((4, 3), (5, 9)), {"queries": 301, "batch": 1, "heads": 5, "channels": 8}),
  ],
  ids=["edges", "one cell", "steps"],
)
def test_the_forms_are_the_reference_form(sizes, shape, monkeypatch):
  monkeypatch.setattr(deformable, "_STEP_QUERIES", 128)
  arguments = inputs(sizes, **shape)
  expected = program(deformable_attention_reference, sizes)(*arguments)
  for form in (deformable_attention, on_tpu):
    assert_same(program(form, sizes)(*arguments), expected)


def test_half_a_pixel_outside_has_half_the_weight():
  """A map of one cell of 8: what is read of it at x pixels from its centre is 8 (1 - |x|)."""
  x = np.asarray([-1.5, -1, -0.75, -0.5, 0, 0.25, 0.5, 1, 40, 1e30], np.float32)
  locations = np.stack([x + 0.5, np.full_like(x, 0.5)])[None, None, None, None]
  value, weights = np.full((1, 1, 1, 1), 8.0), np.ones((1, 1, 1, 1, len(x)), np.float32)
  arguments = [jnp.asarray(x, jnp.float32) for x in (value, locations, weights)]
  for form in (deformable_attention, on_tpu, deformable_attention_reference):
    out = jax.jit(lambda v, x, w, form=form: form(v, ((1, 1),), x, w))(*arguments)
    np.testing.assert_allclose(out[0, :, 0, 0], [0, 0, 2, 4, 8, 6, 4, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("form", [deformable_attention, on_gpu, on_tpu])
def test_sampling_is_float32_of_any_values(form):
  sizes = ((3, 5), (2, 2))
  value, *rest = inputs(sizes, batch=1, queries=9)
  value = value.astype(jnp.bfloat16)
  found = program(form, sizes)(value, *rest)
  expected = program(deformable_attention_reference, sizes)(value.astype(jnp.float32), *rest)
  assert found[0].dtype == jnp.float32 and found[1].dtype == jnp.bfloat16
  assert_same((found[0], *found[2:]), (expected[0], *expected[2:]))
  np.testing.assert_allclose(found[1].astype(jnp.float32), expected[1], atol=0.05, rtol=0.01)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_sharded_batch_is_not_gathered(platform):
  sizes = ((3, 4), (2, 2))
  arguments = inputs(sizes, batch=4, queries=16, heads=2, channels=4)
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
  arguments = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("data")))

  @jax.jit
  def run(value, locations, weights, cotangent):
    with target_platform(platform) if platform != "cpu" else contextlib.nullcontext():
      out, pull = jax.vjp(
        lambda v, x, w: deformable_attention(v, sizes, x, w), value, locations, weights
      )
    return out, *pull(cotangent)

  compiled = run.lower(*arguments).compile()
  for movement in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert movement not in compiled.as_text()
  assert_same(compiled(*arguments), program(deformable_attention_reference, sizes)(*arguments))


def test_levels_must_hold_the_values():
  value, locations, weights, _ = inputs(((3, 5),))
  with pytest.raises(UserError, match=r"there are 15 values; expected .*\(3, 4\)"):
    deformable_attention(value, ((3, 4),), locations, weights)
