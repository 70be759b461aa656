"""The Dice loss in strips of rows is the one that is defined on whole maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops.dice import reference_dice, upsampled_dice


@pytest.mark.parametrize(("size", "target"), [((5, 4), (70, 33)), ((6, 7), (6, 7))])
def test_value_and_gradient(size, target):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(3 * rng.standard_normal((2, *size, 4)), jnp.float32)
  labels = rng.integers(0, 3, (2, *target))  # the last class is absent
  labels[rng.random(labels.shape) < 0.2] = 255
  slope = jnp.asarray([1.0, -2.0])

  @jax.jit
  def run(logits):
    found, pull = jax.vjp(lambda x: upsampled_dice(x, labels), logits)
    expected, pull_expected = jax.vjp(lambda x: reference_dice(x, labels), logits)
    return found, expected, pull(slope)[0], pull_expected(slope)[0]

  found, expected, gradient, expected_gradient = run(logits)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)
  assert np.abs(gradient).max() > 1e-4


def test_a_perfect_prediction_costs_nothing_and_absent_classes_neither():
  labels = np.zeros((1, 8, 8), np.int32)
  labels[:, 4:] = 1
  logits = 50.0 * jax.nn.one_hot(labels, 3)
  np.testing.assert_allclose(upsampled_dice(logits, labels), 0.0, atol=1e-6)
  assert upsampled_dice(logits[..., ::-1], labels) > 0.6
  nothing = np.full_like(labels, 255)
  np.testing.assert_allclose(upsampled_dice(logits, nothing), 0.0, atol=1e-6)
