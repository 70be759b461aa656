"""Every formulation of a convolution is the same function, with the same gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops import backend, conv
from effseg_jax.ops.backend import target_platform
from effseg_jax.training import sharding

# Rows and columns, kernel, stride: odd and prime grids, single rows, kernels larger than the grid.
CASES = [
  ((7, 11), 3, 1),
  ((7, 11), 3, 2),
  ((13, 5), 5, 4),
  ((3, 2), 7, 1),
  ((5, 7), 7, 2),
  ((1, 4), 3, 4),
  ((2, 3), 13, 1),
]


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def case(grid, kernel, stride, channels=3, batch=2):
  out = [-(-n // stride) for n in grid]
  return (
    normal(0, batch, *grid, channels),
    normal(1, kernel, kernel, 1, channels),
    normal(2, batch, *out, channels),
  )


@functools.cache
def value_and_gradients(form, stride, platform="cpu"):
  """(x, kernel, cotangent) -> value and both gradients of a depthwise form."""
  forms = {"grouped": conv.depthwise_conv_grouped, "shifts": conv.depthwise_conv_shifts}

  def run(x, kernel, cotangent):
    with target_platform(platform):
      if form in forms:
        value, pull = jax.vjp(lambda *a: forms[form](*a, stride), x, kernel)
      else:
        value, pull = jax.vjp(lambda *a: conv.depthwise_conv(*a, stride, form), x, kernel)
      return value, *pull(cotangent)

  return jax.jit(run)


def loop(x, kernel, stride):
  """Depthwise convolution as it is defined, float64."""
  size, radius = kernel.shape[0], kernel.shape[0] // 2
  padded = np.pad(x.astype(np.float64), ((0, 0), (radius, radius), (radius, radius), (0, 0)))
  rows = []
  for i in range(0, x.shape[1], stride):
    cells = [
      (padded[:, i : i + size, j : j + size] * kernel[None, :, :, 0]).sum((1, 2))
      for j in range(0, x.shape[2], stride)
    ]
    rows.append(np.stack(cells, 1))
  return np.stack(rows, 1)


def assert_close(found, expected, tolerance=1e-5):
  expected = np.asarray(expected, np.float32)
  assert found.shape == expected.shape
  scale = max(np.abs(expected).max(), 1.0)
  assert np.abs(np.asarray(found, np.float32) - expected).max() <= tolerance * scale


@pytest.mark.parametrize(("grid", "kernel", "stride"), CASES)
def test_the_reference_form_is_the_definition(grid, kernel, stride):
  x, weights, cotangent = case(grid, kernel, stride)
  assert_close(
    value_and_gradients("grouped", stride)(x, weights, cotangent)[0], loop(x, weights, stride)
  )


@pytest.mark.parametrize(
  ("form", "platform", "index"),
  [
    *[("auto", "cpu", index) for index in range(len(CASES))],
    *[("spatial", "cpu", index) for index in (0, 3, 5)],  # "auto" has the other strides
    *[("fft", "cpu", index) for index in (0, 3, 6)],  # stride 1 alone
    *[("auto", "gpu", index) for index in (1, 3)],
    *[("auto", "tpu", index) for index in (1, 3)],
    ("fft", "gpu", 3),
  ],
)
def test_forms_agree(form, platform, index):
  grid, kernel, stride = CASES[index]
  arrays = case(grid, kernel, stride)
  found = value_and_gradients(form, stride, platform)(*arrays)
  for ours, reference in zip(found, value_and_gradients("grouped", stride)(*arrays), strict=True):
    assert_close(ours, reference)


def test_shifted_products_differentiate_alone():
  arrays = case((7, 11), 3, 2)
  found = value_and_gradients("shifts", 2)(*arrays)
  for ours, reference in zip(found, value_and_gradients("grouped", 2)(*arrays), strict=True):
    assert_close(ours, reference)


@pytest.mark.parametrize("form", ["spatial", "fft"])
def test_bfloat16_stays(form):
  arrays = case((7, 11), 3, 1)
  halves = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  found = value_and_gradients(form, 1)(*halves)
  for ours, reference in zip(found, value_and_gradients("grouped", 1)(*arrays), strict=True):
    assert ours.dtype == jnp.bfloat16
    assert_close(ours, reference, 3e-2)


@pytest.mark.parametrize(
  ("kernel", "stride", "dtype"), [(3, 1, "float32"), (3, 2, "bfloat16"), (5, 4, "float32")]
)
def test_dense_convolution(kernel, stride, dtype):
  """A dense convolution is a sum over input channels of depthwise ones."""
  x, weights = normal(0, 2, 7, 5, 3), normal(1, kernel, kernel, 3, 4)
  found = conv.conv(jnp.asarray(x, dtype), jnp.asarray(weights, dtype), stride)
  assert found.dtype == jnp.dtype(dtype)
  expected = [
    sum(loop(x[..., [i]], weights[:, :, [i], [o]][:, :, None], stride) for i in range(3))
    for o in range(4)
  ]
  assert_close(found, np.concatenate(expected, -1), 3e-2 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize(("shape", "stride"), [((2, 8, 6, 3), 2), ((1, 7, 5, 16), 2)])
def test_a_narrow_strided_convolution_is_the_same_on_the_tpu(shape, stride):
  x, weights = normal(0, *shape), normal(1, 3, 3, shape[-1], 4)
  expected, pull = jax.vjp(lambda *a: conv.conv(*a, stride), x, weights)
  with target_platform("tpu"):
    text = str(jax.make_jaxpr(lambda *a: conv.conv(*a, stride))(x, weights))
    found, tpu_pull = jax.vjp(lambda *a: conv.conv(*a, stride), x, weights)
  assert "conv_general" not in text
  assert_close(found, expected, 1e-5)
  for ours, reference in zip(tpu_pull(expected), pull(expected), strict=True):
    assert_close(ours, reference, 1e-4)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_groups_of_channels_with_kernels_of_their_own(platform):
  x, widths = normal(0, 2, 7, 11, 6), (2, 3, 1)
  kernels = [
    normal(size, size, size, 1, width) for size, width in zip((3, 5, 7), widths, strict=True)
  ]
  parts = np.split(x, np.cumsum(widths)[:-1], axis=-1)
  expected = [loop(part, kernel, 1) for part, kernel in zip(parts, kernels, strict=True)]
  with target_platform(platform):
    found = conv.depthwise_conv_by_groups(x, kernels)
  assert_close(found, np.concatenate(expected, -1), 1e-4)


@pytest.mark.parametrize(("size", "stride", "fill"), [(3, 1, 0.0), (5, 2, -np.inf), (1, 4, 0.0)])
def test_windows_are_what_a_kernel_meets(size, stride, fill):
  x, radius = normal(3, 2, 7, 5, 2), size // 2
  found = jax.jit(conv.windows, static_argnums=(1, 2, 3))(x, size, stride, fill)
  padded = np.pad(x, ((0, 0), (radius,) * 2, (radius,) * 2, (0, 0)), constant_values=fill)
  assert len(found) == size * size
  for index, window in enumerate(found):
    i, j = divmod(index, size)
    expected = padded[:, i : i + 7 : stride, j : j + 5 : stride]
    np.testing.assert_array_equal(window, expected)


def test_the_formulation_depends_on_purpose_and_platform():
  choose = conv.preferred_formulation
  assert [choose("forward", k) for k in (3, 9, 11)] == ["spatial", "spatial", "fft"]
  assert [choose("input_gradient", k) for k in (9, 11)] == ["spatial", "fft"]
  assert choose("kernel_gradient", 3) == "fft"
  for purpose in ("forward", "input_gradient", "kernel_gradient"):
    assert choose(purpose, 31, stride=2) == "spatial"
    with target_platform("tpu"):
      assert choose(purpose, 31) == "spatial"
  with target_platform("gpu"):
    assert [choose("forward", k) for k in (3, 9, 15)] == ["spatial", "spatial", "fft"]
    assert [choose("kernel_gradient", k) for k in (3, 5, 7)] == ["spatial", "spatial", "fft"]


def test_formulations_mix_in_the_gradients():
  """A 7x7 kernel on the GPU: the input's gradient is a convolution, the kernel's a transform."""
  arrays = case((16, 20), 7, 1)
  mixed = value_and_gradients("auto", 1, "gpu")(*arrays)
  for ours, expected in zip(mixed, value_and_gradients("grouped", 1)(*arrays), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_strided_products_are_no_slices_on_the_gpu():
  """XLA's compiler for the GPU aborts when it fuses a strided slice into a product."""
  x, kernel = normal(0, 1, 9, 12, 3), normal(1, 1, 1, 3, 4)
  with target_platform("gpu"):
    program = jax.jit(lambda *given: conv.conv(*given, 2)).lower(x, kernel)
  assert "slice" not in program.as_text()
  expected = x[:, ::2, ::2] @ kernel[0, 0]
  np.testing.assert_allclose(program.compile()(x, kernel), expected, rtol=1e-5, atol=1e-5)


def test_devices_that_share_a_batch_exchange_no_spectra():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})
  with backend.several_devices(sharding.batch_sharding(mesh)):
    assert conv.preferred_formulation("kernel_gradient", 3) == "spatial"
    assert backend.batch_is_cut()
  assert not backend.batch_is_cut()


def test_the_target_platform_holds_inside_its_block():
  here = backend.platform()
  with target_platform("tpu"):
    with target_platform("gpu"):
      assert backend.platform() == "gpu"
    assert backend.platform() == "tpu"
  with pytest.raises(KeyError), target_platform("tpu"):
    raise KeyError
  assert backend.platform() == here


@pytest.mark.parametrize(("grid", "kernel", "stride"), [*CASES, ((8, 6), 3, 2), ((8, 7), 5, 2)])
def test_tensorflow_padding(grid, kernel, stride):
  centre = conv.tensorflow_centre(grid, kernel, stride)
  x, weights, cotangent = case(grid, kernel, stride)
  dense = normal(3, kernel, kernel, 3, 4)

  def reference(x, weights, dense):
    convolve = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=(stride, stride),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return convolve(x, weights, feature_group_count=3), convolve(x, dense)

  def ours(x, weights, dense):
    depthwise = conv.depthwise_conv(x, weights, stride, "spatial", centre)
    return depthwise, conv.conv(x, dense, stride, centre)

  def run(function):
    value, pull = jax.vjp(function, x, weights, dense)
    return value, pull((cotangent, jnp.ones_like(value[1])))

  expected = jax.jit(lambda: run(reference))()
  for platform in ("cpu", "gpu"):
    with target_platform(platform):
      found = jax.jit(lambda: run(ours))()
    jax.tree.map(assert_close, found, expected)
