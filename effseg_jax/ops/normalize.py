"""From uint8 pictures with padding to what a network takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax import imagenet

IMAGENET_MEAN, IMAGENET_STD = imagenet.MEAN, imagenet.STD


def normalize(
  images: jax.Array,
  valid_size: jax.Array,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
) -> jax.Array:
  """`(image - mean) / std`, and exactly 0 outside each image's valid rows and columns.

  Args:
    images: uint8 (B, H, W, 3).
    valid_size: int32 (B, 2), rows and columns of picture.
    mean: per channel.
    std: per channel.

  Returns:
    float32 (B, H, W, 3).
  """
  normalized = (images.astype(jnp.float32) - jnp.asarray(mean)) * (
    1.0 / np.asarray(std, np.float32)
  )
  rows = jnp.arange(images.shape[1])[None, :] < valid_size[:, :1]
  cols = jnp.arange(images.shape[2])[None, :] < valid_size[:, 1:]
  inside = rows[:, :, None, None] & cols[:, None, :, None]
  return jnp.where(inside, normalized, 0.0)
