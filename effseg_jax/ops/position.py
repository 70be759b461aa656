"""Sine codes of positions on a grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sine_position(rows: int, cols: int, channels: int, *, normalize: bool = True) -> jax.Array:
  """Sines and cosines of the row, then of the column, interleaved.

  Half of the channels encode y and half x, each with wave lengths from 2 pi to 10000 * 2 pi.
  Carion et al., DETR, ECCV 2020 (arXiv 2005.12872); Mask2Former normalises positions, AVESFormer
  does not.

  Args:
    rows: of the grid.
    cols: of the grid.
    channels: C, a multiple of 4.
    normalize: positions run from 2 pi / n to 2 pi along an axis of n cells, instead of 1 to n.

  Returns:
    float32 (rows, cols, C).
  """
  half = channels // 2
  codes = [jnp.asarray(_axis_codes(size, half, normalize)) for size in (rows, cols)]
  # Only the two axes' codes are constants of the program; the grid would be megabytes.
  return jnp.concatenate(
    [
      jnp.broadcast_to(codes[0][:, None], (rows, cols, half)),
      jnp.broadcast_to(codes[1][None, :], (rows, cols, half)),
    ],
    axis=-1,
  )


def _axis_codes(size: int, channels: int, normalize: bool) -> np.ndarray:
  """float32 (size, channels): even channels sines, odd ones cosines."""
  position = np.arange(1, size + 1, dtype=np.float64)
  if normalize:
    position *= 2 * np.pi / (size + 1e-6)
  index = np.arange(channels)
  angle = position[:, None] / 1e4 ** (2 * (index // 2) / channels)
  return np.where(index % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)
