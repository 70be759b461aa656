"""Convolutions in NHWC with PyTorch's padding, in the formulation that suits the platform."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effseg_jax.ops import backend, fourier

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# Channels up to which a window of 3x3 pixels is no wider than a TPU's matrix unit.
_NARROW = 16


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Dense convolution; both sides are padded with `k // 2` zeros, whatever the stride.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, C, D), k odd.
    stride: along both axes.

  Returns:
    (B, ceil(H / stride), ceil(W / stride), D).
  """
  if kernel.shape[:2] == (1, 1) and backend.platform() == "cpu":
    # The value takes as long either way, the gradients of a convolution 2 to 7 times as long.
    x = x[:, ::stride, ::stride]
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)
  if _as_product(x, kernel, stride):
    columns = jnp.concatenate(windows(x, kernel.shape[0], stride), axis=-1)
    return columns @ kernel.reshape(-1, kernel.shape[-1])
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), _same_padding(kernel), dimension_numbers=_DIMENSIONS
  )


def _as_product(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
  """Whether a convolution is a matrix product with all windows side by side.

  So it is for the strided 3x3 convolutions of stems on the TPU, whose few channels leave most of a
  matrix unit idle: by the compiler's account it moves a third to a tenth of the bytes, and compiles
  three times as fast.
  """
  narrow = x.shape[-1] <= _NARROW and kernel.shape[0] == 3
  return backend.platform() == "tpu" and stride > 1 and narrow


def preferred_formulation(purpose: str, kernel_size: int, stride: int = 1) -> str:
  """Which formulation of a depthwise convolution is fast on the platform traced for.

  From `python tools/benchmark.py --filters`, recorded in docs/performance.md. On two CPU cores,
  at grids of 16 to 64 cells a side: a product per tap beats transforms up to 9x9, and so does its
  derivative with respect to the input. The sum over positions that the kernel's gradient needs is
  faster on spectra from 5x5 on, where all taps cost as much as one; at 3x3 it is slower by itself,
  and yet the whole training step is faster with it, because no shifted window is stored. On
  accelerators transforms move far more memory than convolutions of these sizes; what "spatial"
  means differs there, see `_by_shifts`. Nor are there transforms where devices share a batch:
  spectra are larger than kernels, and would be what crosses between them.

  Args:
    purpose: "forward", "input_gradient" or "kernel_gradient".
    kernel_size: k.
    stride: transforms need 1.

  Returns:
    "spatial" or "fft".
  """
  if stride > 1 or backend.platform() != "cpu" or backend.batch_is_cut():
    return "spatial"
  largest = {"forward": 9, "input_gradient": 9, "kernel_gradient": 0}[purpose]
  return "spatial" if kernel_size <= largest else "fft"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
  x: jax.Array, kernel: jax.Array, stride: int = 1, formulation: str = "auto"
) -> jax.Array:
  """Depthwise convolution, every channel with its own kernel; padded like `conv`.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, 1, C), k odd; may be larger than the grid.
    stride: along both axes.
    formulation: "spatial", "fft" (stride 1), or "auto": `preferred_formulation` for the value and
      for each gradient. All are the same function.

  Returns:
    (B, ceil(H / stride), ceil(W / stride), C).
  """
  return _forward(x, kernel, stride, _choose(formulation, "forward", kernel, stride))


def depthwise_conv_by_groups(x: jax.Array, kernels: Sequence[jax.Array]) -> jax.Array:
  """Depthwise convolutions of several sizes at once, each of its own group of channels.

  It is one convolution of the largest size, the smaller kernels surrounded by zeros: on the TPU,
  taking groups apart that are no multiple of 128 channels costs more than multiplying by zero.

  Args:
    x: (B, H, W, C).
    kernels: one (k, k, 1, c) per group of neighbouring channels, k odd; the c add up to C.

  Returns:
    (B, H, W, C).
  """
  largest = max(kernel.shape[0] for kernel in kernels)
  borders = [(largest - kernel.shape[0]) // 2 for kernel in kernels]
  padded = [
    jnp.pad(kernel, ((border, border), (border, border), (0, 0), (0, 0)))
    for kernel, border in zip(kernels, borders, strict=True)
  ]
  return depthwise_conv(x, jnp.concatenate(padded, axis=-1))


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
  """`depthwise_conv` as a sum of k*k shifted products.

  XLA's grouped convolution is up to 50 times slower on the CPU. The gradient that follows from
  this form keeps or copies every shifted window, which is why `depthwise_conv` has its own.
  """
  weights = kernel.reshape(-1, kernel.shape[-1])
  products = [
    tap * weight for tap, weight in zip(windows(x, kernel.shape[0], stride), weights, strict=True)
  ]
  return sum(products[1:], start=products[0])


def _choose(formulation: str, purpose: str, kernel: jax.Array, stride: int) -> str:
  if formulation == "auto":
    return preferred_formulation(purpose, kernel.shape[0], stride)
  return formulation


def _forward(x: jax.Array, kernel: jax.Array, stride: int, formulation: str) -> jax.Array:
  if formulation == "fft":
    return fourier.depthwise_conv_fft(x, kernel)
  if _by_shifts():
    return depthwise_conv_shifts(x, kernel, stride)
  return depthwise_conv_grouped(x, kernel, stride)


def _by_shifts() -> bool:
  """Whether "spatial" is a sum of shifted products (CPU, TPU) or a grouped convolution (GPU).

  On the TPU every pass then reads its operands once; by the compiler's account a grouped
  convolution moves 3 to 12 times the bytes, and takes 3 to 10 times as long to compile.
  """
  return backend.platform() in ("cpu", "tpu")


def _vjp_forward(x, kernel, stride, formulation):
  return depthwise_conv(x, kernel, stride, formulation), (x, kernel)


def _vjp_backward(stride, formulation, residuals, cotangent):
  x, kernel = residuals
  for_input = _choose(formulation, "input_gradient", kernel, stride)
  for_kernel = _choose(formulation, "kernel_gradient", kernel, stride)
  if for_input == for_kernel == "spatial" and not _by_shifts():
    conv_grouped = functools.partial(depthwise_conv_grouped, stride=stride)
    return jax.vjp(conv_grouped, x, kernel)[1](cotangent)
  # With respect to x: the cotangent, zeros between strided outputs, with the kernel turned around.
  spread = onto_input_grid(cotangent, x.shape[1:3], stride) if stride > 1 else cotangent
  x_gradient = _forward(spread, kernel[::-1, ::-1], 1, for_input)
  if for_kernel == "fft":
    gradient = fourier.depthwise_conv_fft_kernel_gradient(x, kernel.shape, cotangent)
  else:
    gradient = _kernel_gradient_by_taps(x, kernel, cotangent, stride)
  return x_gradient, gradient.astype(kernel.dtype)


depthwise_conv.defvjp(_vjp_forward, _vjp_backward)


def _kernel_gradient_by_taps(
  x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int
) -> jax.Array:
  """One sum over positions per tap, float32 (k, k, 1, C)."""
  # The barrier keeps the compiler from sharing (and so storing) the forward pass's windows.
  taps = windows(jax.lax.optimization_barrier(x), kernel.shape[0], stride)
  sums = [jnp.sum((tap * cotangent).astype(jnp.float32), axis=(0, 1, 2)) for tap in taps]
  return jnp.stack(sums).reshape(kernel.shape)


def onto_input_grid(
  outputs: jax.Array, size: tuple[int, int], stride: int, fill: float = 0
) -> jax.Array:
  """Puts strided outputs (B, h, w, C) back where they came from, on a grid of rows x columns."""
  ends = [n - 1 - (m - 1) * stride for n, m in zip(size, outputs.shape[1:3], strict=True)]
  spread = [(0, 0, 0), *((0, end, stride - 1) for end in ends), (0, 0, 0)]
  return jax.lax.pad(outputs, jnp.asarray(fill, outputs.dtype), spread)


def windows(x: jax.Array, size: int, stride: int = 1, fill: float = 0.0) -> list[jax.Array]:
  """The pixels that each position of a window meets, padded like `conv`.

  Args:
    x: (B, H, W, C).
    size: k, odd.
    stride: between windows.
    fill: value of the padding.

  Returns:
    k*k arrays (B, ceil(H / stride), ceil(W / stride), C), row by row.
  """
  padding = (size // 2, size // 2)
  padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=fill)
  output = _output_size(x, stride)
  return [_tap(padded, i, j, output, stride) for i in range(size) for j in range(size)]


def _tap(padded: jax.Array, i: int, j: int, size: tuple[int, int], stride: int) -> jax.Array:
  """The window of a padded array that the kernel's element (i, j) meets."""
  rows, cols = size
  end = (i + (rows - 1) * stride + 1, j + (cols - 1) * stride + 1)
  return jax.lax.slice(
    padded, (0, i, j, 0), (padded.shape[0], *end, padded.shape[3]), (1, stride, stride, 1)
  )


def _output_size(x: jax.Array, stride: int) -> tuple[int, int]:
  return -(-x.shape[1] // stride), -(-x.shape[2] // stride)


def _same_padding(kernel: jax.Array) -> list[tuple[int, int]]:
  return [(size // 2, size // 2) for size in kernel.shape[:2]]
