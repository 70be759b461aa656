"""Convolutions in NHWC with PyTorch's padding, in the formulation that suits the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from effseg_jax.ops import backend, fourier

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Dense convolution; both sides are padded with `k // 2` zeros, whatever the stride.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, C, D), k odd.
    stride: along both axes.

  Returns:
    (B, ceil(H / stride), ceil(W / stride), D).
  """
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), _same_padding(kernel), dimension_numbers=_DIMENSIONS
  )


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Depthwise convolution, every channel with its own kernel; padded like `conv`.

  On the CPU this is a sum of shifted products with a gradient of its own: XLA's grouped
  convolution is up to 50 times slower there. On accelerators it is a grouped convolution.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, 1, C), k odd.
    stride: along both axes.

  Returns:
    (B, ceil(H / stride), ceil(W / stride), C).
  """
  if backend.platform() == "cpu":
    return depthwise_conv_shifts(x, kernel, stride)
  return depthwise_conv_grouped(x, kernel, stride)


def depthwise_conv_grouped(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """`depthwise_conv` as XLA's grouped convolution: the reference form."""
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    _same_padding(kernel),
    dimension_numbers=_DIMENSIONS,
    feature_group_count=x.shape[-1],
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv_shifts(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """`depthwise_conv` as a sum of k*k shifted products.

  Its gradient is written out, because the derived one keeps or copies every shifted window: with
  respect to x it is the same sum with the kernel turned around, and with respect to the kernel one
  reduction per tap. Large kernels have many taps to compile; their gradient goes through one
  Fourier transform instead, which runs as fast and compiles four times faster.
  """
  padded, size = _pad_same(x, kernel), _output_size(x, stride)
  taps = [
    _tap(padded, i, j, size, stride) * kernel[i, j, 0]
    for i in range(kernel.shape[0])
    for j in range(kernel.shape[1])
  ]
  return sum(taps[1:], start=taps[0])


def _shifts_forward(x, kernel, stride):
  return depthwise_conv_shifts(x, kernel, stride), (x, kernel)


def _shifts_backward(stride, residuals, cotangent):
  # The barrier keeps the compiler from sharing (and so storing) the forward pass's windows.
  x, kernel = jax.lax.optimization_barrier(residuals)
  if stride == 1 and kernel.shape[0] > 3:
    return fourier.depthwise_conv_fft_gradients(x, kernel, cotangent)
  padded, size = _pad_same(x, kernel), _output_size(x, stride)
  rows = [
    [
      jnp.sum((_tap(padded, i, j, size, stride) * cotangent).astype(jnp.float32), axis=(0, 1, 2))
      for j in range(kernel.shape[1])
    ]
    for i in range(kernel.shape[0])
  ]
  kernel_gradient = jnp.stack([jnp.stack(row) for row in rows])[:, :, None].astype(kernel.dtype)
  if stride > 1:  # back onto the grid of x: zeros between, and after the last output
    ends = [n - 1 - (m - 1) * stride for n, m in zip(x.shape[1:3], size, strict=True)]
    spread = [(0, 0, 0), *((0, end, stride - 1) for end in ends), (0, 0, 0)]
    cotangent = jax.lax.pad(cotangent, jnp.zeros((), cotangent.dtype), spread)
  return depthwise_conv_shifts(cotangent, kernel[::-1, ::-1], 1), kernel_gradient


depthwise_conv_shifts.defvjp(_shifts_forward, _shifts_backward)


def _tap(padded: jax.Array, i: int, j: int, size: tuple[int, int], stride: int) -> jax.Array:
  """The window of a padded array that the kernel's element (i, j) meets."""
  rows, cols = size
  end = (i + (rows - 1) * stride + 1, j + (cols - 1) * stride + 1)
  return jax.lax.slice(
    padded, (0, i, j, 0), (padded.shape[0], *end, padded.shape[3]), (1, stride, stride, 1)
  )


def _pad_same(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jnp.pad(x, ((0, 0), *_same_padding(kernel), (0, 0)))


def _output_size(x: jax.Array, stride: int) -> tuple[int, int]:
  return -(-x.shape[1] // stride), -(-x.shape[2] // stride)


def _same_padding(kernel: jax.Array) -> list[tuple[int, int]]:
  return [(size // 2, size // 2) for size in kernel.shape[:2]]
