"""Point sampling against its definition, and the formulations against one another."""

import jax
import numpy as np
import pytest

from effseg_jax.ops import backend
from effseg_jax.ops.point_sample import (
  NO_SEGMENT,
  sample_by_gather,
  sample_by_products,
  sample_points,
  sample_segments,
  splat_points,
)

SIZE = (5, 7)


def _definition(maps, points):
  """One point, one map, one neighbour at a time."""
  height, width = maps.shape[-2:]
  result = np.zeros((maps.shape[0], len(points)))
  for p, (x, y) in enumerate(points):
    x, y = x * width - 0.5, y * height - 0.5
    for row in range(height):
      for col in range(width):
        weight = max(1 - abs(y - row), 0) * max(1 - abs(x - col), 0)
        result[:, p] += weight * maps[:, row, col]
  return result


def _points(rng, count):
  corners = np.array([(0, 0), (1, 1), (0, 1), (0.5, 0.5), (0.5 / SIZE[1], 0.5 / SIZE[0])])
  return np.concatenate([corners, rng.random((count - len(corners), 2))]).astype(np.float32)


@pytest.mark.parametrize("form", [sample_by_gather, sample_by_products])
def test_equals_the_definition(form):
  rng = np.random.default_rng(0)
  maps = rng.standard_normal((3, *SIZE)).astype(np.float32)
  points = _points(rng, 20)
  expected = _definition(maps, points)
  np.testing.assert_allclose(jax.jit(form)(maps, points), expected, atol=1e-5)
  # At the image's corner three of the four neighbours are outside and count as 0.
  np.testing.assert_allclose(expected[:, 0], maps[:, 0, 0] / 4, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("channels", [1, 3])
def test_values_and_gradients_per_platform(platform, channels):
  rng = np.random.default_rng(1)
  maps = rng.standard_normal((2, 2, channels, *SIZE)).astype(np.float32)
  points = rng.random((2, 2, 1030, 2)).astype(np.float32)  # more than one chunk
  cotangent = rng.standard_normal((2, 2, channels, 1030)).astype(np.float32)

  def both(sample):
    values, pull = jax.vjp(lambda m: sample(m, points), maps)
    return values, pull(cotangent)[0]

  expected = jax.jit(lambda: both(jax.vmap(jax.vmap(sample_by_gather))))()
  with backend.target_platform(platform):
    values, gradient = jax.jit(lambda: both(sample_points))()
    splat = jax.jit(lambda: splat_points(cotangent, points, SIZE))()
  np.testing.assert_allclose(values, expected[0], atol=1e-5)
  np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(splat, gradient, rtol=1e-5, atol=1e-6)


def test_segments_stand_for_their_masks():
  rng = np.random.default_rng(2)
  segments = rng.integers(0, 4, (2, 2, *SIZE)).astype(np.uint8)
  segments[:, 1] = np.where(segments[:, 1] < 2, NO_SEGMENT, segments[:, 1] + 2)  # ids 4 and 5
  points = np.stack([_points(rng, 30), _points(rng, 30)])
  ids = np.array([[5, 0, 3, 9], [4, 1, 2, 9]])
  masks = np.stack(
    [[np.any(s == n, axis=0) for n in row] for s, row in zip(segments, ids, strict=True)]
  )
  expected = jax.jit(jax.vmap(sample_by_gather))(masks.astype(np.float32), points)
  found = jax.jit(sample_segments)(segments, points, ids)
  np.testing.assert_allclose(found, expected, atol=1e-6)
