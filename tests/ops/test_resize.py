"""Bilinear resizing against its matrices, and against PyTorch where it is installed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops.resize import bilinear_matrix, resize_bicubic, resize_bilinear
from tests.models import reference

# Source, target: up, down, prime to prime, one axis alone, from and to a single cell, doubled.
SIZES = [
  ((5, 7), (13, 11)),
  ((13, 11), (5, 7)),
  ((4, 6), (8, 3)),
  ((5, 7), (5, 3)),
  ((1, 3), (4, 1)),
  ((5, 7), (10, 14)),
  ((1, 3), (2, 6)),
]


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def resize(size, align_corners):
  """(x, cotangent) -> value and gradient."""

  @jax.jit
  def run(x, cotangent):
    value, pull = jax.vjp(lambda x: resize_bilinear(x, size, align_corners), x)
    return value, pull(cotangent)[0]

  return run


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resizing_is_a_product_with_two_matrices(source, target, align_corners):
  x, cotangent = normal(0, 2, *source, 3), normal(1, 2, *target, 3)
  rows, cols = (bilinear_matrix(n, m, align_corners) for n, m in zip(target, source, strict=True))
  for matrix in (rows, cols):
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-12)
    assert (matrix >= 0).all() and ((matrix > 0).sum(1) <= 2).all()
  value, gradient = resize(target, align_corners)(x, cotangent)
  np.testing.assert_allclose(value, np.einsum("ih,jw,bhwc->bijc", rows, cols, x), atol=1e-5)
  np.testing.assert_allclose(
    gradient, np.einsum("ih,jw,bijc->bhwc", rows, cols, cotangent), atol=1e-5
  )


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resizing_is_pytorchs(source, target, align_corners):
  torch = pytest.importorskip("torch")
  x, cotangent = normal(0, 2, *source, 3), normal(1, 2, *target, 3)
  theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  resized = torch.nn.functional.interpolate(
    theirs, size=target, mode="bilinear", align_corners=align_corners
  )
  resized.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
  value, gradient = resize(target, align_corners)(x, cotangent)
  expected = resized.detach().numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(value, expected, atol=5e-6)  # PyTorch's weights are float32
  np.testing.assert_allclose(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_a_ramp_by_hand():
  np.testing.assert_allclose(bilinear_matrix(4, 2) @ [0, 4], [0, 1, 3, 4])
  np.testing.assert_allclose(bilinear_matrix(5, 2, True) @ [0, 4], [0, 1, 2, 3, 4])


def test_the_same_size_is_the_same_array():
  x = jnp.asarray(normal(0, 1, 5, 7, 2))
  assert resize_bilinear(x, (5, 7)) is x


def test_bfloat16_stays():
  x = jnp.asarray(normal(0, 1, 5, 7, 2))
  found = resize_bilinear(x.astype(jnp.bfloat16), (11, 13))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), resize_bilinear(x, (11, 13)), atol=0.05)


@pytest.mark.parametrize("grid", ["3x5", "1x2"])
@pytest.mark.parametrize("factor", [2, 4])
def test_bicubic_is_pytorchs(grid, factor):
  expected = reference.read("efficientvit")
  x = reference.channels_last(expected[f"ops/bicubic/{grid}/input"])
  found = resize_bicubic(x, (factor * x.shape[1], factor * x.shape[2]))
  wanted = expected[f"ops/bicubic/{grid}/x{factor}"]
  reference.assert_close(reference.channels_first(found), wanted, 1e-6)
  assert resize_bicubic(x, x.shape[1:3]) is x
