"""From uint8 pictures with padding to the normalised input of a network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax import imagenet
from effseg_jax.errors import UserError

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


def normalize_images(
  images: jax.Array | np.ndarray,
  mean: tuple[float, float, float] = IMAGENET_MEAN,
  std: tuple[float, float, float] = IMAGENET_STD,
) -> jax.Array:
  """`(image - mean) / std`, the input of a network.

  Args:
    images: uint8 RGB (B, H, W, 3), or one of (H, W, 3), values 0 to 255.
    mean: per channel, in uint8 units; default: ImageNet's.
    std: per channel, in uint8 units; default: ImageNet's.

  Returns:
    float32 (B, H, W, 3); B is 1 for one image.

  Raises:
    UserError: for another shape, or floating numbers, which may be scaled already.
  """
  images = jnp.asarray(images)
  if images.ndim == 3:
    images = images[None]
  if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.integer):
    raise UserError(
      f"the images are {images.dtype} {images.shape}; expected uint8 RGB (B, H, W, 3), values 0 to"
      " 255."
    )
  size = jnp.broadcast_to(jnp.array(images.shape[1:3], jnp.int32), (images.shape[0], 2))
  return normalize(images, size, mean, std)
