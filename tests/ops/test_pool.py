"""Pooling against loops and the reduction, and PyTorch where it is installed."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops.pool import adaptive_average_matrix, max_pool, max_pool_reduction

SIZES = [(12, 6), (13, 6), (7, 3), (5, 2), (11, 1), (2, 3), (1, 6), (4, 4)]


@pytest.mark.parametrize(("size", "bins"), SIZES)
def test_bins_are_means_of_their_cells(size, bins):
  x = np.random.default_rng(0).standard_normal(size)
  expected = [
    np.mean(x[math.floor(i * size / bins) : math.ceil((i + 1) * size / bins)]) for i in range(bins)
  ]
  matrix = adaptive_average_matrix(size, bins)
  assert matrix.dtype == np.float64
  np.testing.assert_allclose(matrix @ x, expected, rtol=1e-12)
  np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-12)


@pytest.mark.parametrize(("size", "bins"), SIZES)
def test_bins_are_pytorchs(size, bins):
  torch = pytest.importorskip("torch")
  # Pooling the unit vectors gives the matrix, a column each; its transpose is the gradient.
  units = torch.eye(size, dtype=torch.float64)[None]
  pooled = torch.nn.functional.adaptive_avg_pool1d(units, bins)[0].numpy()
  np.testing.assert_allclose(adaptive_average_matrix(size, bins), pooled.T, rtol=1e-12)


@pytest.mark.parametrize(("shape", "stride"), [
  ((2, 7, 6, 3), 1), ((2, 7, 6, 3), 2), ((1, 1, 2, 3), 2),
])  # fmt: skip
def test_max_pool_is_the_window_reduction(shape, stride):
  x = -np.abs(np.random.default_rng(0).standard_normal(shape)).astype(np.float32)

  @jax.jit
  def both(x):
    found, pull = jax.vjp(lambda x: max_pool(x, 3, stride), x)
    expected, pull_reference = jax.vjp(lambda x: max_pool_reduction(x, 3, stride), x)
    cotangent = jax.random.normal(jax.random.key(0), expected.shape)
    return (found, pull(cotangent)), (expected, pull_reference(cotangent))

  found, expected = both(x)
  assert found[0].shape == (shape[0], -(-shape[1] // stride), -(-shape[2] // stride), shape[3])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_of_equal_cells_the_one_that_wins_in_pytorch_wins(stride):
  torch = pytest.importorskip("torch")
  x = np.random.default_rng(1).integers(0, 3, (2, 7, 6, 5)).astype(np.float32)
  value, pull = jax.vjp(lambda x: max_pool(x, 3, stride), x)
  cotangent = np.random.default_rng(2).integers(0, 9, value.shape).astype(np.float32)
  theirs = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
  pooled = torch.nn.functional.max_pool2d(theirs, 3, stride, 1)
  pooled.backward(torch.from_numpy(cotangent).permute(0, 3, 1, 2))
  np.testing.assert_array_equal(value, pooled.detach().permute(0, 2, 3, 1))
  np.testing.assert_array_equal(pull(cotangent)[0], theirs.grad.permute(0, 2, 3, 1))


def test_max_pool_keeps_bfloat16():
  assert max_pool(jnp.zeros((1, 3, 3, 1), jnp.bfloat16)).dtype == jnp.bfloat16
