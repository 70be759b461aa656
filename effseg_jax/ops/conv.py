"""Convolutions in NHWC with PyTorch's padding, in the formulation that suits the platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from effseg_jax.ops import backend

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

  On the CPU this is a sum of shifted products: XLA's grouped convolution is up to 50 times slower
  there. On accelerators it is a grouped convolution.

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


def depthwise_conv_shifts(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """`depthwise_conv` as a sum of k*k shifted products, row by row."""
  size = kernel.shape[0]
  radius = size // 2
  rows, cols = (-(-n // stride) for n in x.shape[1:3])
  padded = jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)))

  def tap(i: int, j: int) -> jax.Array:
    window = jax.lax.slice(
      padded,
      (0, i, j, 0),
      (x.shape[0], i + (rows - 1) * stride + 1, j + (cols - 1) * stride + 1, x.shape[3]),
      (1, stride, stride, 1),
    )
    return window * kernel[i, j, 0]

  return sum(sum(tap(i, j) for j in range(size)) for i in range(size))


def _same_padding(kernel: jax.Array) -> list[tuple[int, int]]:
  return [(size // 2, size // 2) for size in kernel.shape[:2]]
