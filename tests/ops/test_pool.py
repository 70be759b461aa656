"""Adaptive average pooling against a loop over bins, and PyTorch where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from effseg_jax.ops.pool import adaptive_average_matrix

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
