"""Filters in the frequency domain.

Conventions: arrays are (B, H, W, C), transforms run over H and W in float32, and `rfft2` keeps the
half plane of the last transformed axis. Circular means without padding: the border wraps around.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops import backend

_AXES = (1, 2)

# Name of a traced transform that is written as products.
TRANSFORMS = ("_rfft2_by_products", "_irfft2_by_products")


def fast_size(size: int) -> int:
  """The smallest 2^a 3^b 5^c that is not below `size`: prime lengths are 5 times slower."""
  best = 1 << max(size - 1, 0).bit_length()
  power5 = 1
  while power5 < best:
    power35 = power5
    while power35 < best:
      candidate = power35
      while candidate < size:
        candidate *= 2
      best = min(best, candidate)
      power35 *= 3
    power5 *= 5
  return best


def depthwise_conv_fft(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Zero-padded depthwise convolution by Fourier transforms (specification, section 7.2).

  Equal to `ops.conv.depthwise_conv`: the grid is padded by the kernel's radius, so that values that
  wrap around are multiplied by zeros.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, 1, C), k odd; may be larger than the grid.

  Returns:
    (B, H, W, C) of x's dtype.
  """
  size = _padded_size(x, kernel.shape)
  spectrum = _times(_rfft2(x, size), kernel_spectrum(kernel, size))
  return _irfft2(spectrum, size)[:, : x.shape[1], : x.shape[2]].astype(x.dtype)


def depthwise_conv_fft_kernel_gradient(
  x: jax.Array, kernel_shape: Sequence[int], cotangent: jax.Array
) -> jax.Array:
  """Gradient of a zero-padded depthwise convolution of stride 1 with respect to its kernel.

  All taps at once: the correlation of input and cotangent, read off at the taps' offsets.

  Args:
    x: (B, H, W, C), the input.
    kernel_shape: (k, k, 1, C), k odd.
    cotangent: (B, H, W, C), of the output.

  Returns:
    float32 (k, k, 1, C).
  """
  size = _padded_size(x, kernel_shape)
  spectrum = jnp.sum(_rfft2(x, size) * jnp.conj(_rfft2(cotangent, size)), axis=0)
  correlation = jnp.fft.irfft2(spectrum, size, axes=(0, 1))
  rows, cols = (np.arange(k) - k // 2 for k in kernel_shape[:2])
  # The padded size holds k offsets apart, so those beyond the grid meet zeros and not each other.
  return correlation[rows % size[0]][:, cols % size[1]][:, :, None]


def depthwise_conv_circular(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Depthwise convolution with wrapped borders, by Fourier transforms of the grid's own size.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, 1, C), k odd; taps beyond the grid wrap around and add up.

  Returns:
    (B, H, W, C) of x's dtype.
  """
  size = x.shape[1], x.shape[2]
  spectrum = _times(_rfft2(x, size), kernel_spectrum(kernel, size))
  return _irfft2(spectrum, size).astype(x.dtype)


def kernel_spectrum(kernel: jax.Array, size: tuple[int, int]) -> jax.Array:
  """The multiplier that applies a kernel by cross-correlation on a grid (section 7.2).

  Args:
    kernel: (k, k, 1, C), k odd.
    size: (rows, cols) of the transform.

  Returns:
    complex64 (1, rows, cols // 2 + 1, C).
  """
  kernel = kernel[:, :, 0].astype(jnp.float32)
  radius = kernel.shape[0] // 2
  offsets = radius - np.arange(kernel.shape[0])
  grid = jnp.zeros((*size, kernel.shape[-1]), jnp.float32)
  grid = grid.at[(offsets % size[0])[:, None], (offsets % size[1])[None, :]].add(kernel)
  return jnp.fft.rfft2(grid, axes=(0, 1))[None]


def ideal_low_pass_mask(size: tuple[int, int], cutoff: int) -> np.ndarray:
  """The ideal mask with the cut-off of an s x s grid (specification, section 7.3).

  1 for frequencies below s / 2, one half at s / 2, 0 above; s = 1 keeps the mean alone.

  Args:
    size: (rows, cols) of the grid.
    cutoff: s.

  Returns:
    float32 (rows, cols // 2 + 1).
  """

  def along(frequencies: np.ndarray) -> np.ndarray:
    distance = np.abs(frequencies) - cutoff / 2
    return np.where(distance < 0, 1.0, np.where(distance == 0, 0.5, 0.0))

  rows = along(np.round(np.fft.fftfreq(size[0]) * size[0]))
  cols = along(np.arange(size[1] // 2 + 1))
  return (rows[:, None] * cols[None, :]).astype(np.float32)


def low_pass_masks(size: tuple[int, int], channels: int, cutoffs: Sequence[int]) -> np.ndarray:
  """One mask per equal group of channels: float32 (1, rows, cols // 2 + 1, channels)."""
  masks = [ideal_low_pass_mask(size, cutoff) for cutoff in cutoffs]
  return np.repeat(np.stack(masks, axis=-1), channels // len(cutoffs), axis=-1)[None]


def ideal_low_pass(x: jax.Array, cutoffs: Sequence[int]) -> jax.Array:
  """Keeps low frequencies: one ideal cut-off per equal group of channels (section 7.3).

  Args:
    x: (B, H, W, C).
    cutoffs: s of each of the groups.

  Returns:
    (B, H, W, C) of x's dtype.
  """
  size = x.shape[1], x.shape[2]
  masks = low_pass_masks(size, x.shape[-1], cutoffs)
  return _irfft2(_rfft2(x, size) * masks, size).astype(x.dtype)


def learned_filter(x: jax.Array, real: jax.Array, imaginary: jax.Array) -> jax.Array:
  """The vanilla frequency filter: a learned complex factor per frequency and channel.

  The factors live on a reference grid and are interpolated (bilinear, over signed frequencies) to
  the grid at hand.

  Args:
    x: (B, H, W, C).
    real: (h0, w0 // 2 + 1, C), rows in `fftfreq` order.
    imaginary: like `real`.

  Returns:
    (B, H, W, C) of x's dtype.
  """
  size = x.shape[1], x.shape[2]
  rows = _frequency_matrix(size[0], real.shape[0])
  cols = _interpolation_matrix(np.linspace(0, real.shape[1] - 1, size[1] // 2 + 1), real.shape[1])
  factors = jax.lax.complex(
    *(jnp.einsum("ur,vs,rsc->uvc", rows, cols, part) for part in (real, imaginary))
  )
  return _irfft2(_times(_rfft2(x, size), factors[None]), size).astype(x.dtype)


def frequency_similarity_kernel(
  weights: jax.Array, values: jax.Array, size: tuple[int, int]
) -> jax.Array:
  """`sum over tokens of weights^T values` evaluated on spectra, by Parseval (section 7.1).

  Args:
    weights: (B, n, H * W, d), softmax over the tokens.
    values: (B, n, H * W, e).
    size: (H, W).

  Returns:
    float32 (B, n, d, e).
  """

  def spectrum(tokens: jax.Array) -> jax.Array:
    batch, heads, _, width = tokens.shape
    grids = tokens.reshape(batch * heads, *size, width)
    return _rfft2(grids, size).reshape(batch, heads, *size[:1], -1, width) / math.sqrt(
      math.prod(size)
    )

  # The half plane stands for both: its inner columns count twice.
  columns = np.full(size[1] // 2 + 1, 2.0, np.float32)
  columns[0] = 1.0
  if size[1] % 2 == 0:
    columns[-1] = 1.0
  weighted = jnp.conj(spectrum(weights)) * columns[:, None]
  return jnp.einsum("bnuvd,bnuve->bnde", weighted, spectrum(values)).real


def _times(spectrum: jax.Array, factors: jax.Array) -> jax.Array:
  """The product of complex (B, rows, cols, C) and (1, rows, cols, C).

  In real numbers, so that the gradient of the factors is a real sum over the batch: for a complex
  one XLA's TPU compiler gathers the batch of all devices on each of them.
  """
  return jax.lax.complex(
    spectrum.real * factors.real - spectrum.imag * factors.imag,
    spectrum.real * factors.imag + spectrum.imag * factors.real,
  )


def _padded_size(x: jax.Array, kernel_shape: Sequence[int]) -> tuple[int, int]:
  """A fast transform size at which a centred kernel does not wrap onto the grid."""
  rows, cols = (
    fast_size(max(n + k // 2, k)) for n, k in zip(x.shape[1:3], kernel_shape, strict=False)
  )
  return rows, cols


def _rfft2(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """(B, H, W, C) real, continued with zeros to `size` -> (B, rows, cols // 2 + 1, C) complex64."""
  x = x.astype(jnp.float32)
  if _as_transform():
    return jnp.fft.rfft2(x, size, axes=_AXES)
  return _rfft2_by_products(x, tuple(size))


def _irfft2(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """(B, rows, cols // 2 + 1, C) complex64 -> (B, rows, cols, C) float32, by `size`."""
  if _as_transform():
    return jnp.fft.irfft2(x, size, axes=_AXES)
  return _irfft2_by_products(x, tuple(size))


def _as_transform() -> bool:
  """Whether a Fourier transform is one, or products with its matrix.

  Grids are small, so products take a matrix unit little time. And they are sharded along the batch
  like any other operation, while for a transform XLA gathers the batch of all devices on each.
  """
  return backend.platform() != "tpu" and not backend.batch_is_cut()


@functools.partial(jax.jit, static_argnums=1)
def _rfft2_by_products(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  rows, cols = (_waves(n)[:length] for n, length in zip(size, x.shape[1:3], strict=True))
  cols = cols[:, : size[1] // 2 + 1]
  real, imaginary = (_product("bhwc,wv->bhvc", x, part) for part in (cols.real, cols.imag))
  return _along_rows(real, imaginary, rows)


@functools.partial(jax.jit, static_argnums=1)
def _irfft2_by_products(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  half = size[1] // 2 + 1
  # The half plane stands for both: its inner columns count twice.
  counts = np.where((np.arange(half) == 0) | (2 * np.arange(half) == size[1]), 1.0, 2.0)
  rows = np.conj(_waves(size[0])) / size[0]
  cols = np.conj(_waves(size[1])[:half]) * counts[:, None] / size[1]
  x = _along_rows(x.real, x.imag, rows)
  real, imaginary = (
    _product("bhvc,vw->bhwc", part, matrix)
    for part, matrix in ((x.real, cols.real), (x.imag, cols.imag))
  )
  return real - imaginary


def _waves(size: int) -> np.ndarray:
  """The matrix of the Fourier transform, complex128 (size, size)."""
  return np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size)


def _along_rows(real: jax.Array, imaginary: jax.Array, matrix: np.ndarray) -> jax.Array:
  """Multiplies the rows (axis 1) of a complex array by a complex matrix (from, to)."""
  equation = "bhvc,hu->buvc"
  return jax.lax.complex(
    _product(equation, real, matrix.real) - _product(equation, imaginary, matrix.imag),
    _product(equation, real, matrix.imag) + _product(equation, imaginary, matrix.real),
  )


def _product(equation: str, x: jax.Array, matrix: np.ndarray) -> jax.Array:
  """A float32 product, whatever the platform's default precision."""
  return jnp.einsum(
    equation, x, jnp.asarray(matrix, jnp.float32), precision=jax.lax.Precision.HIGHEST
  )


def _frequency_matrix(size: int, reference: int) -> np.ndarray:
  """Interpolates rows in `fftfreq` order between grids, through the shifted (monotone) order."""
  positions = np.fft.fftshift(np.fft.fftfreq(size)) * reference + reference // 2
  matrix = _interpolation_matrix(np.clip(positions, 0, reference - 1), reference)
  return np.fft.ifftshift(np.fft.ifftshift(matrix, axes=0), axes=1)


def _interpolation_matrix(positions: np.ndarray, length: int) -> np.ndarray:
  """Rows that interpolate linearly at `positions` of a line of `length`, float32."""
  lower = np.floor(positions).astype(int)
  upper = np.minimum(lower + 1, length - 1)
  matrix = np.zeros((len(positions), length), np.float32)
  np.add.at(matrix, (np.arange(len(positions)), lower), 1.0 - (positions - lower))
  np.add.at(matrix, (np.arange(len(positions)), upper), positions - lower)
  return matrix
