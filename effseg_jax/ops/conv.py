"""Convolutions in NHWC with PyTorch's padding, in the formulation that suits the platform.

`centre` gives the pixel on which the first window is centred: (0, 0) in PyTorch, for every stride;
for TensorFlow's padding see `tensorflow_centre`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effseg_jax.ops import backend, fourier

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

Pixel = tuple[int, int]  # row and column
_ORIGIN = (0, 0)

# Channels up to which a window of 3x3 pixels is no wider than a TPU's matrix unit.
_NARROW = 16

# The largest kernels for which transforms are not faster, see `preferred_formulation`.
_LARGEST_SPATIAL = {
  "cpu": {"forward": 9, "input_gradient": 9, "kernel_gradient": 0},
  "gpu": {"forward": 9, "input_gradient": 9, "kernel_gradient": 5},
}


def tensorflow_centre(size: Sequence[int], kernel_size: int, stride: int) -> Pixel:
  """Where TensorFlow's "SAME" padding centres the first window.

  It pads no more than is needed, and the end before the beginning: with stride 2 and an even size
  windows are centred on odd pixels.

  Args:
    size: rows and columns of the grid.
    kernel_size: k, odd.
    stride: along both axes.
  """
  rows, cols = (kernel_size // 2 - max((-n) % stride + kernel_size - stride, 0) // 2 for n in size)
  return rows, cols


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, centre: Pixel = _ORIGIN) -> jax.Array:
  """Dense convolution; beyond the borders there are zeros.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, C, D), k odd.
    stride: along both axes.
    centre: of the first window, nearer to the border than stride and kernel are large.

  Returns:
    (B, h, w, D), a window on each pixel that is a multiple of strides from the first:
    ceil(H / stride) rows if that is (0, 0).
  """
  platform = backend.platform()
  if kernel.shape[:2] == (1, 1) and platform not in ("gpu", "export"):
    # Skipped pixels need no convolution. On the GPU it has to be one: XLA (jaxlib 0.11.2) fuses
    # strided slices into the product, and aborts ("subdim_size_accumulator == dim_size").
    x = x[:, centre[0] :: stride, centre[1] :: stride]
    if platform == "tpu":
      return x @ kernel[0, 0]
    # One long matrix: the CPU's gradients are 2 to 7 times as fast as a convolution's.
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)
  if _as_product(x, kernel, stride):
    columns = jnp.concatenate(windows(x, kernel.shape[0], stride, centre=centre), axis=-1)
    return columns @ kernel.reshape(-1, kernel.shape[-1])
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), _padding(kernel.shape, centre), dimension_numbers=_DIMENSIONS
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

  From `python -m benchmarks --filters`, recorded in docs/performance.md. On two CPU cores,
  at grids of 16 to 64 cells a side: a product per tap beats transforms up to 9x9, and so does its
  derivative with respect to the input. The sum over positions that the kernel's gradient needs is
  faster on spectra from 5x5 on, where all taps cost as much as one; at 3x3 it is slower in
  isolation, and yet the whole training step is faster with it, because no shifted window is stored.
  On an H200, at grids of 32 and 128, a grouped convolution wins at 3x3 and 7x7, transforms at
  15x15, and of the kernel's gradient from 7x7 on. On the TPU transforms move far more memory than
  convolutions of these sizes; "spatial" has another meaning there, see `_by_shifts`. Nor are there
  transforms where devices share a batch: spectra are larger than kernels, and would be exchanged
    between
  them.

  Args:
    purpose: "forward", "input_gradient" or "kernel_gradient".
    kernel_size: k.
    stride: transforms need 1.

  Returns:
    "spatial" or "fft".
  """
  largest = _LARGEST_SPATIAL.get(backend.platform())
  if stride > 1 or largest is None or backend.batch_is_cut():
    return "spatial"
  return "spatial" if kernel_size <= largest[purpose] else "fft"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise_conv(
  x: jax.Array,
  kernel: jax.Array,
  stride: int = 1,
  formulation: str = "auto",
  centre: Pixel = _ORIGIN,
) -> jax.Array:
  """Depthwise convolution, every channel with its own kernel; padded like `conv`.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, 1, C), k odd; may be larger than the grid.
    stride: along both axes.
    formulation: "spatial", "fft" (stride 1), or "auto": `preferred_formulation` for the value and
      for each gradient. All are the same function.
    centre: of the first window, see `conv`; with stride 1 it is (0, 0).

  Returns:
    (B, h, w, C), of `conv`'s size.
  """
  return _forward(x, kernel, stride, _choose(formulation, "forward", kernel, stride), centre)


def depthwise_conv_by_groups(x: jax.Array, kernels: Sequence[jax.Array]) -> jax.Array:
  """Depthwise convolutions of several sizes at once, each of its own group of channels.

  It is one convolution of the largest size, the smaller kernels surrounded by zeros: on the TPU,
  taking groups apart that are no multiple of 128 channels costs more than multiplying by zero.

  Args:
    x: (B, H, W, C).
    kernels: one (k, k, 1, c) per group of adjacent channels, k odd; the c add up to C.

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


def depthwise_conv_grouped(
  x: jax.Array, kernel: jax.Array, stride: int = 1, centre: Pixel = _ORIGIN
) -> jax.Array:
  """`depthwise_conv` as XLA's grouped convolution: the reference form."""
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    _padding(kernel.shape, centre),
    dimension_numbers=_DIMENSIONS,
    feature_group_count=x.shape[-1],
  )


def depthwise_conv_shifts(
  x: jax.Array, kernel: jax.Array, stride: int = 1, centre: Pixel = _ORIGIN
) -> jax.Array:
  """`depthwise_conv` as a sum of k*k shifted products.

  XLA's grouped convolution is up to 50 times slower on the CPU. The gradient that follows from
  this form keeps or copies every shifted window, which is why `depthwise_conv` has its own.
  """
  weights = kernel.reshape(-1, kernel.shape[-1])
  taps = windows(x, kernel.shape[0], stride, centre=centre)
  products = [tap * weight for tap, weight in zip(taps, weights, strict=True)]
  return sum(products[1:], start=products[0])


def _choose(formulation: str, purpose: str, kernel: jax.Array, stride: int) -> str:
  if formulation == "auto":
    return preferred_formulation(purpose, kernel.shape[0], stride)
  return formulation


def _forward(
  x: jax.Array, kernel: jax.Array, stride: int, formulation: str, centre: Pixel = _ORIGIN
) -> jax.Array:
  if formulation == "fft":
    return fourier.depthwise_conv_fft(x, kernel)
  if _by_shifts():
    return depthwise_conv_shifts(x, kernel, stride, centre)
  return depthwise_conv_grouped(x, kernel, stride, centre)


def _by_shifts() -> bool:
  """Whether "spatial" is a sum of shifted products (CPU, TPU) or a grouped convolution (GPU).

  On the TPU every pass then reads its operands once; by the compiler's account a grouped
  convolution moves 3 to 12 times the bytes, and takes 3 to 10 times as long to compile.
  """
  return backend.platform() in ("cpu", "tpu")


def _vjp_forward(x, kernel, stride, formulation, centre):
  return depthwise_conv(x, kernel, stride, formulation, centre), (x, kernel)


def _vjp_backward(stride, formulation, centre, residuals, cotangent):
  x, kernel = residuals
  for_input = _choose(formulation, "input_gradient", kernel, stride)
  for_kernel = _choose(formulation, "kernel_gradient", kernel, stride)
  if for_input == for_kernel == "spatial" and not _by_shifts():
    conv_grouped = functools.partial(depthwise_conv_grouped, stride=stride, centre=centre)
    return jax.vjp(conv_grouped, x, kernel)[1](cotangent)
  # With respect to x: the cotangent, zeros between strided outputs, with the kernel turned around.
  spread = cotangent
  if stride > 1:
    spread = onto_input_grid(cotangent, x.shape[1:3], stride, centre=centre)
  x_gradient = _forward(spread, kernel[::-1, ::-1], 1, for_input)
  if for_kernel == "fft":
    gradient = fourier.depthwise_conv_fft_kernel_gradient(x, kernel.shape, cotangent)
  else:
    gradient = _kernel_gradient_by_taps(x, kernel, cotangent, stride, centre)
  return x_gradient, gradient.astype(kernel.dtype)


depthwise_conv.defvjp(_vjp_forward, _vjp_backward)


def _kernel_gradient_by_taps(
  x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int, centre: Pixel
) -> jax.Array:
  """One sum over positions per tap, float32 (k, k, 1, C)."""
  # The barrier keeps the compiler from sharing (and so storing) the forward pass's windows.
  taps = windows(jax.lax.optimization_barrier(x), kernel.shape[0], stride, centre=centre)
  sums = [jnp.sum((tap * cotangent).astype(jnp.float32), axis=(0, 1, 2)) for tap in taps]
  return jnp.stack(sums).reshape(kernel.shape)


def onto_input_grid(
  outputs: jax.Array,
  size: tuple[int, int],
  stride: int,
  fill: float = 0,
  centre: Pixel = _ORIGIN,
) -> jax.Array:
  """Puts strided outputs (B, h, w, C) back where they came from, on a grid of rows x columns."""
  spread = [
    (begin, n - 1 - (m - 1) * stride - begin, stride - 1)
    for n, m, begin in zip(size, outputs.shape[1:3], centre, strict=True)
  ]
  return jax.lax.pad(outputs, jnp.asarray(fill, outputs.dtype), [(0, 0, 0), *spread, (0, 0, 0)])


def windows(
  x: jax.Array, size: int, stride: int = 1, fill: float = 0.0, centre: Pixel = _ORIGIN
) -> list[jax.Array]:
  """The pixels at each position of a window, padded like `conv`.

  Args:
    x: (B, H, W, C).
    size: k, odd.
    stride: between windows.
    fill: value of the padding.
    centre: of the first window, see `conv`.

  Returns:
    k*k arrays (B, h, w, C) of `conv`'s size, row by row.
  """
  padding = ((0, 0), *_padding((size, size), centre), (0, 0))
  padded = jnp.pad(x, padding, constant_values=fill)
  rows, cols = (-(-(n - begin) // stride) for n, begin in zip(x.shape[1:3], centre, strict=True))
  return [_tap(padded, i, j, (rows, cols), stride) for i in range(size) for j in range(size)]


def _tap(padded: jax.Array, i: int, j: int, size: tuple[int, int], stride: int) -> jax.Array:
  """The part of a padded array that the kernel's element (i, j) multiplies."""
  rows, cols = size
  end = (i + (rows - 1) * stride + 1, j + (cols - 1) * stride + 1)
  return jax.lax.slice(
    padded, (0, i, j, 0), (padded.shape[0], *end, padded.shape[3]), (1, stride, stride, 1)
  )


def _padding(kernel_size: Sequence[int], centre: Pixel) -> list[tuple[int, int]]:
  """Zeros before and after each axis. A first window further inside needs fewer before."""
  return [(k // 2 - begin, k // 2) for k, begin in zip(kernel_size[:2], centre, strict=True)]
