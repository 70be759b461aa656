"""Filters on spectra against the sums over positions that they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops import conv, fourier
from effseg_jax.ops.backend import target_platform

GRIDS = [(7, 11), (6, 8), (1, 4)]

low_pass = jax.jit(fourier.ideal_low_pass, static_argnums=1)
learned_filter = jax.jit(fourier.learned_filter)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(found, expected, tolerance=1e-5):
  assert found.shape == expected.shape
  difference = np.abs(np.asarray(found) - np.asarray(expected)).max()
  assert difference <= tolerance * max(np.abs(np.asarray(expected)).max(), 1.0)


def assert_same_function(form, reference, *arrays):
  """Values and all gradients agree."""

  @jax.jit
  def both(*arrays):
    found, pull = jax.vjp(form, *arrays)
    expected, pull_reference = jax.vjp(reference, *arrays)
    cotangent = jax.random.normal(jax.random.key(0), expected.shape)
    return (found, *pull(cotangent)), (expected, *pull_reference(cotangent))

  for found, expected in zip(*both(*arrays), strict=True):
    assert_close(found, expected)


def wrapped(x, kernel):
  """The circular convolution: wrap the borders, then convolve without padding."""
  radius = kernel.shape[0] // 2
  for axis in (1, 2):
    x = jnp.take(x, np.arange(-radius, x.shape[axis] + radius) % x.shape[axis], axis=axis)
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


@pytest.mark.parametrize(("grid", "size"), [((7, 11), 3), ((6, 5), 7), ((3, 2), 9)])
def test_padded_convolution(grid, size):
  x, kernel = normal(0, 2, *grid, 3), normal(1, size, size, 1, 3)
  assert_same_function(fourier.depthwise_conv_fft, conv.depthwise_conv_grouped, x, kernel)


@pytest.mark.parametrize(("grid", "size"), [((7, 11), 3), ((6, 5), 7), ((3, 2), 9)])
def test_circular_convolution(grid, size):
  x, kernel = normal(0, 2, *grid, 3), normal(1, size, size, 1, 3)
  assert_same_function(fourier.depthwise_conv_circular, wrapped, x, kernel)


@pytest.mark.parametrize(("grid", "size"), [((7, 11), 3), ((3, 2), 9)])
def test_kernel_gradient(grid, size):
  x, cotangent = normal(0, 2, *grid, 3), normal(1, 2, *grid, 3)
  kernel = normal(2, size, size, 1, 3)
  reference = jax.jit(jax.vjp(lambda k: conv.depthwise_conv_grouped(x, k), kernel)[1])
  (expected,) = reference(cotangent)
  found = jax.jit(fourier.depthwise_conv_fft_kernel_gradient, static_argnums=1)(
    x, kernel.shape, cotangent
  )
  assert found.dtype == jnp.float32
  assert_close(found, expected)


def test_kernel_spectrum_is_the_sum_of_section_7_2():
  kernel, (rows, cols) = normal(0, 5, 5, 1, 2), (7, 6)
  found = fourier.kernel_spectrum(kernel, (rows, cols))
  u, v = np.arange(rows)[:, None, None, None], np.arange(cols // 2 + 1)[:, None, None]
  a, b = np.arange(-2, 3)[:, None], np.arange(-2, 3)
  waves = np.exp(2j * np.pi * (u * a / rows + v * b / cols))
  assert_close(found, np.einsum("uvab,abc->uvc", waves, kernel[:, :, 0])[None])


def test_point_symmetric_kernels_have_real_spectra():
  kernel = normal(0, 5, 5, 1, 2)
  symmetric = kernel + kernel[::-1, ::-1]
  assert np.abs(fourier.kernel_spectrum(symmetric, (7, 6)).imag).max() <= 1e-5
  assert np.abs(fourier.kernel_spectrum(kernel, (7, 6)).imag).max() > 0.1


@pytest.mark.parametrize("grid", GRIDS)
def test_the_lowest_pass_is_the_mean(grid):
  x = normal(0, 2, *grid, 4)
  mean = np.broadcast_to(np.mean(x, (1, 2), keepdims=True), x.shape)
  assert_close(low_pass(x, (1,)), mean)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("cutoff", [1, 2, 3, 6])
def test_low_pass_keeps_low_and_removes_high_frequencies(axis, length, cutoff):
  size = (length, 5) if axis == 1 else (5, length)
  frequencies = np.arange(length // 2 + 1)
  waves = np.cos(2 * np.pi * np.arange(length)[:, None] * frequencies / length + 0.3)
  waves[:, 0] = 1.0
  x = np.broadcast_to(np.expand_dims(waves, (0, 3 - axis)), (1, *size, len(frequencies)))
  x = x.astype(np.float32)
  gain = np.where(frequencies < cutoff / 2, 1.0, np.where(frequencies == cutoff / 2, 0.5, 0.0))
  assert_close(low_pass(x, (cutoff,)), x * gain.astype(np.float32), 2e-6)


def test_each_group_of_channels_has_its_low_pass():
  x = normal(0, 1, 7, 6, 6)
  found = low_pass(x, (1, 3, 6))
  parts = [low_pass(part, (s,)) for part, s in zip(jnp.split(x, 3, -1), (1, 3, 6), strict=True)]
  assert_close(found, jnp.concatenate(parts, -1))


@pytest.mark.parametrize("grid", [(7, 11), (6, 8)])
def test_low_pass_is_its_own_gradient(grid):
  """A real multiplier, the same at u and -u, is a symmetric matrix over positions."""
  x, cotangent = normal(0, 2, *grid, 4), normal(1, 2, *grid, 4)

  @jax.jit
  def pull(cotangent):
    return jax.vjp(lambda x: fourier.ideal_low_pass(x, (2, 6)), x)[1](cotangent)[0]

  assert_close(pull(cotangent), low_pass(cotangent, (2, 6)))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_learned_filter_of_ones_is_the_identity(grid):
  x, ones = normal(0, 2, *grid, 3), np.ones((8, 5, 3), np.float32)
  assert_close(learned_filter(x, ones, np.zeros_like(ones)), x)


@pytest.mark.parametrize("grid", [(7, 11), (6, 8)])
def test_a_learned_filter_is_exact_on_its_own_grid(grid):
  def direct(x, real, imaginary):
    spectrum = jnp.fft.rfft2(x, axes=(1, 2)) * (real + 1j * imaginary)
    return jnp.fft.irfft2(spectrum, grid, axes=(1, 2))

  factors = normal(1, 2, grid[0], grid[1] // 2 + 1, 3)
  assert_same_function(fourier.learned_filter, direct, normal(0, 2, *grid, 3), *factors)


@pytest.mark.parametrize("grid", [(7, 11), (6, 8), (3, 4), (16, 9)])
def test_a_learned_filter_means_the_same_on_another_grid(grid):
  """Factors that fall linearly with frequency do so on every grid."""
  reference = 1 - np.abs(np.fft.fftfreq(8))
  factors = np.broadcast_to(reference.astype(np.float32)[:, None, None], (8, 5, 1))
  impulse = np.zeros((1, *grid, 1), np.float32)
  impulse[0, 0, 0, 0] = 1.0
  found = learned_filter(impulse, factors, np.zeros_like(factors))
  gain = np.fft.fft2(found[0, :, :, 0]).real
  frequencies = np.abs(np.fft.fftfreq(grid[0]))
  inner = frequencies <= 3 / 8  # where the reference grid has a neighbour on both sides
  expected = np.broadcast_to((1 - frequencies)[:, None], grid)
  np.testing.assert_allclose(gain[inner], expected[inner], atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_frequency_similarity_is_the_sum_over_tokens(grid):
  tokens = grid[0] * grid[1]
  weights, values = normal(0, 2, 3, tokens, 4), normal(1, 2, 3, tokens, 5)
  assert_same_function(
    lambda w, v: fourier.frequency_similarity_kernel(w, v, grid),
    lambda w, v: jnp.einsum("bnpd,bnpe->bnde", w, v),
    weights,
    values,
  )


def test_bfloat16_stays():
  kernel, factors = normal(1, 3, 3, 1, 4), jnp.ones((4, 3, 4))

  @jax.jit
  def forms(x):
    return (
      fourier.depthwise_conv_fft(x, kernel),
      fourier.depthwise_conv_circular(x, kernel),
      fourier.ideal_low_pass(x, (3,)),
      fourier.learned_filter(x, factors, factors),
    )

  x = normal(0, 1, 7, 6, 4)
  for found, expected in zip(forms(jnp.asarray(x, jnp.bfloat16)), forms(x), strict=True):
    assert found.dtype == jnp.bfloat16
    assert_close(found.astype(jnp.float32), expected, 2e-2)


@pytest.mark.parametrize("grid", [(7, 11), (6, 8), (1, 5), (4, 3)])
def test_transforms_by_products_are_the_same_function(grid):
  x, kernel = normal(0, 2, *grid, 4), normal(1, 3, 3, 1, 4)
  factors = normal(2, 2, 8, 5, 4)

  def forms(x, kernel):
    tokens = x.reshape(2, 1, -1, 4)
    return (
      fourier.depthwise_conv_fft(x, kernel),
      fourier.depthwise_conv_circular(x, kernel),
      fourier.ideal_low_pass(x, (1, 3)),
      fourier.learned_filter(x, *factors),
      fourier.frequency_similarity_kernel(tokens, tokens, grid),
    )

  here, pull_here = jax.vjp(forms, x, kernel)
  with target_platform("tpu"):
    found, pull = jax.vjp(forms, x, kernel)
    traced = str(jax.make_jaxpr(lambda x: fourier.ideal_low_pass(x, (1, 3)))(x))
  assert "fft[" not in traced
  for ours, expected in zip([*found, *pull(here)], [*here, *pull_here(here)], strict=True):
    assert_close(ours, expected, 1e-5)


def test_fast_sizes_are_the_next_smooth_numbers():
  def smooth(n):
    for prime in (2, 3, 5):
      while n % prime == 0:
        n //= prime
    return n == 1

  for size in range(1, 700):
    assert fourier.fast_size(size) == next(n for n in range(size, 2 * size + 1) if smooth(n))
