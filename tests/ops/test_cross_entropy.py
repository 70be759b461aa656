"""The fused cross-entropy against "resize, then log-softmax", and what it exists for: memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops import cross_entropy
from effseg_jax.ops.cross_entropy import reference_cross_entropy, upsampled_cross_entropy
from effseg_jax.training import sharding

CLASSES = 5
# Logits, labels: one strip, several, rows that do not divide into strips, odd, down, single rows.
SIZES = [
  ((4, 6), (32, 48)),
  ((5, 3), (37, 23)),
  ((9, 2), (71, 13)),
  ((11, 7), (5, 3)),
  ((1, 2), (1, 9)),
]


def case(source, target, ignore_label=255, batch=3):
  rng = np.random.default_rng(0)
  logits = 3 * rng.standard_normal((batch, *source, CLASSES)).astype(np.float32)
  labels = rng.integers(0, CLASSES, (batch, *target))
  labels[rng.random(labels.shape) < 0.3] = ignore_label
  labels[1] = ignore_label  # an image without a label
  return logits, labels.astype(np.int32), rng.standard_normal(batch).astype(np.float32)


@functools.cache
def jitted(form, ignore_label=255):
  """(logits, labels, class weights, cotangent) -> three sums and the gradient."""

  @jax.jit
  def run(logits, labels, weights, cotangent):
    def loss(logits):
      nll, *counts = form(logits, labels, ignore_label=ignore_label, class_weights=weights)
      return jnp.vdot(nll, cotangent), (nll, *counts)

    gradient, sums = jax.grad(loss, has_aux=True)(logits)
    return *sums, gradient

  return run


def assert_same(found, expected):
  nll, correct, valid, gradient = (np.asarray(x) for x in found)
  np.testing.assert_allclose(nll, expected[0], rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(correct, expected[1])
  np.testing.assert_array_equal(valid, expected[2])
  assert correct.dtype == valid.dtype == np.int32
  scale = max(np.abs(expected[3]).max(), 1.0)
  assert np.abs(gradient - expected[3]).max() <= 1e-6 * scale


@pytest.mark.parametrize(
  ("size", "weighted"), [(0, False), (1, False), (1, True), (2, True), (3, False), (4, True)]
)
def test_sums_and_gradient(size, weighted):
  logits, labels, cotangent = case(*SIZES[size])
  weights = np.array([0.5, 2.0, 0.0, 1.0, 3.0], np.float32) if weighted else None
  arrays = (logits, labels, weights, cotangent)
  found = jitted(upsampled_cross_entropy)(*arrays)
  assert_same(found, jitted(reference_cross_entropy)(*arrays))
  assert float(found[0][1]) == int(found[1][1]) == int(found[2][1]) == 0
  assert not np.asarray(found[3][1]).any()


def test_the_value_alone_is_the_same():
  logits, labels, cotangent = case(*SIZES[1])
  nll = jax.jit(lambda *a: upsampled_cross_entropy(*a)[0])(logits, labels)
  expected = jitted(upsampled_cross_entropy)(logits, labels, None, cotangent)[0]
  np.testing.assert_allclose(nll, expected, rtol=1e-6)


def test_a_class_can_be_the_ignored_one():
  logits, labels, cotangent = case(*SIZES[1], ignore_label=0)
  arrays = (logits, labels, None, cotangent)
  found = jitted(upsampled_cross_entropy, 0)(*arrays)
  assert_same(found, jitted(reference_cross_entropy, 0)(*arrays))


def test_large_logits_stay_finite():
  logits, labels, cotangent = case(*SIZES[0])
  arrays = (1e4 * logits, labels, None, cotangent)
  found = jitted(upsampled_cross_entropy)(*arrays)
  assert all(np.isfinite(x).all() for x in found)
  np.testing.assert_allclose(found[0], jitted(reference_cross_entropy)(*arrays)[0], rtol=1e-6)


def test_bfloat16_logits_have_bfloat16_gradients():
  logits, labels, cotangent = case(*SIZES[1])
  half = jnp.asarray(logits, jnp.bfloat16)
  found = jitted(upsampled_cross_entropy)(half, labels.astype(np.uint8), None, cotangent)
  assert found[0].dtype == jnp.float32 and found[3].dtype == jnp.bfloat16
  arrays = (half.astype(jnp.float32), labels, None, cotangent)
  expected = jitted(reference_cross_entropy)(*arrays)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
  scale = np.abs(expected[3]).max()
  assert np.abs(found[3].astype(jnp.float32) - expected[3]).max() <= 1e-2 * scale


def test_a_sharded_batch_stays_where_it_is():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})
  cut, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  logits, labels, _ = case((5, 3), (37, 23), batch=8)

  def loss(logits, labels):
    nll, _, valid = upsampled_cross_entropy(logits, labels)
    return jnp.sum(nll) / jnp.maximum(jnp.sum(valid), 1)

  step = jax.jit(jax.value_and_grad(loss), in_shardings=(cut, cut), out_shardings=(everywhere, cut))
  program = step.lower(logits, labels).compile()
  text = program.as_text()
  assert "all-reduce" in text
  for movement in ("all-gather", "all-to-all", "collective-permute"):
    assert movement not in text
  value, gradient = program(*(jax.device_put(x, cut) for x in (logits, labels)))
  expected = jax.value_and_grad(loss)(logits, labels)
  np.testing.assert_allclose(value, expected[0], rtol=1e-6)
  np.testing.assert_allclose(gradient, expected[1], atol=1e-7)


def test_full_logits_are_never_held():
  size, classes = 512, 32
  shapes = (
    jax.ShapeDtypeStruct((1, size // 8, size // 8, classes), jnp.float32),
    jax.ShapeDtypeStruct((1, size, size), jnp.int32),
  )
  loss = lambda logits, labels: upsampled_cross_entropy(logits, labels)[0].sum()  # noqa: E731
  program = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
  full = 4 * size * size * classes
  strip = full * cross_entropy._STRIP_ROWS // size
  assert program.memory_analysis().temp_size_in_bytes < min(full / 2, 8 * strip)
