"""A convolution of an enlarged map, computed mostly before it is enlarged."""

from __future__ import annotations

import einops
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops.conv import conv
from effseg_jax.ops.resize import bilinear_matrix, resize_bilinear


def upsampled_conv(x: jax.Array, kernel: jax.Array, size: tuple[int, int]) -> jax.Array:
  """`conv(resize_bilinear(x, size), kernel)` without ever holding the enlarged input.

  Mixing channels commutes with resizing, so each tap mixes them on the small grid; then all taps
  are shifted, enlarged and summed by one matrix product per axis. Enlarging 4 times, that is a
  fraction of the products, and the map that is never made is the largest of the network.

  Args:
    x: (B, h, w, C), floating.
    kernel: (k, k, C, D), k odd.
    size: (H, W) of the result.

  Returns:
    (B, H, W, D) of x's dtype.
  """
  batch, rows, cols, channels = x.shape
  taps, features = kernel.shape[0], kernel.shape[-1]
  # Row taps beside rows and column taps beside columns: the axes that one product contracts.
  mixed = x @ jnp.transpose(kernel, (2, 0, 1, 3)).reshape(channels, -1)
  mixed = einops.rearrange(mixed, "b h w (i j d) -> b (i h) (w j d)", i=taps, j=taps)
  matrix = jnp.asarray(_enlarging(size[0], rows, taps), x.dtype)
  mixed = jnp.einsum("yk,bkn->byn", matrix, mixed)
  mixed = mixed.reshape(batch, size[0], cols * taps, features)
  matrix = _enlarging(size[1], cols, taps).reshape(size[1], taps, cols)
  matrix = jnp.asarray(matrix.transpose(0, 2, 1).reshape(size[1], -1), x.dtype)
  return jnp.einsum("xk,bykd->byxd", matrix, mixed)


def upsampled_conv_reference(x: jax.Array, kernel: jax.Array, size: tuple[int, int]) -> jax.Array:
  """`upsampled_conv` as it reads: the reference form."""
  return conv(resize_bilinear(x, size), kernel)


def _enlarging(size: int, source_size: int, taps: int) -> np.ndarray:
  """(size, taps * source_size): tap i of row y reads row y + i - taps // 2; 0 beyond the ends."""
  matrix = bilinear_matrix(size, source_size)
  padded = np.pad(matrix, ((taps // 2, taps // 2), (0, 0)))
  return np.concatenate([padded[i : i + size] for i in range(taps)], axis=1)
