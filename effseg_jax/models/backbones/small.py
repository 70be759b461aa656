"""A visual encoder of a few layers, for small pictures and quick runs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.models.backbones.resnet import Block, NormedConv

Dtype = Any


class SmallVisualEncoder(nn.Module):
  """Two strided convolutions and four residual blocks: a tenth of ResNet-18's products.

  Attributes:
    widths: channels of the four stages.
    dtype: of the computation; parameters and statistics are float32.
  """

  widths: tuple[int, int, int, int] = (32, 64, 96, 128)
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
    """Computes features.

    Args:
      images: (B, H, W, C) float32, normalised.
      train: whether batch normalisation uses the batch's own statistics.

    Returns:
      `res2`, `res3`, `res4`, `res5` at strides 4, 8, 16 and 32, with the channels of `widths`.
    """
    x = images
    for index, features in enumerate((self.widths[0] // 2, self.widths[0])):
      conv = NormedConv(features, 3, 2, "bn", self.dtype, name=f"stem_{index}")
      x = nn.relu(conv(x, train))
    features = {}
    for stage, width in enumerate(self.widths):
      block = Block(width, 2 if stage else 1, False, "bn", self.dtype, name=f"res{stage + 2}_0")
      x = features[f"res{stage + 2}"] = block(x, train)
    return features
