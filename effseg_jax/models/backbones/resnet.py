"""ResNet: Deep Residual Learning for Image Recognition (He et al., CVPR 2016).

The form that PyTorch's model zoo and detectron2 share, sometimes called v1.5: a bottleneck's stride
is that of its 3x3 convolution.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError, suggestion
from effseg_jax.models.layers import BatchNorm, Conv
from effseg_jax.ops.pool import max_pool

Dtype = Any

# Depth -> blocks of the four stages, and whether they are bottlenecks.
DEPTHS = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}
NORMS = ("frozen_bn", "bn")

# Features of a block's convolutions per stage, times 4 at the end of a bottleneck.
_WIDTHS = (64, 128, 256, 512)
_EXPANSION = 4


class FrozenBatchNorm(nn.Module):
  """Batch normalisation that stays as pretraining left it: statistics, scale and offset.

  All four vectors are in the collection `batch_stats`, none in `params`, and none is ever written:
  no optimizer updates them, and they never change.

  Attributes:
    epsilon: added to the variance.
    dtype: of the result.
  """

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Scales and shifts (..., C); `train` makes no difference."""
    del train

    def vector(name: str, init: Any) -> jax.Array:
      return self.variable("batch_stats", name, init, (x.shape[-1],), jnp.float32).value

    scale, bias = vector("scale", jnp.ones), vector("bias", jnp.zeros)
    mean, var = vector("mean", jnp.zeros), vector("var", jnp.ones)
    inverse = scale * jax.lax.rsqrt(var + self.epsilon)
    offset = bias - mean * inverse
    return x.astype(self.dtype) * inverse.astype(self.dtype) + offset.astype(self.dtype)


class NormedConv(nn.Module):
  """Convolution without bias and its normalisation.

  Attributes:
    features: output channels.
    kernel_size: odd.
    stride: along both axes.
    norm: "frozen_bn" or "bn".
    dtype: of the computation.
  """

  features: int
  kernel_size: int
  stride: int = 1
  norm: str = "frozen_bn"
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    x = Conv(self.features, self.kernel_size, self.stride, dtype=self.dtype, name="conv")(x)
    norm = BatchNorm if self.norm == "bn" else FrozenBatchNorm
    return norm(dtype=self.dtype, name="norm")(x, train)


class Block(nn.Module):
  """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1.

  Attributes:
    width: features of the convolutions, a quarter of a bottleneck's output.
    stride: of the block.
    bottleneck: which of the two.
    norm: "frozen_bn" or "bn".
    dtype: of the computation.
  """

  width: int
  stride: int
  bottleneck: bool
  norm: str = "frozen_bn"
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), width or 4 width)."""

    def conv(features: int, kernel_size: int, stride: int, name: str) -> NormedConv:
      return NormedConv(features, kernel_size, stride, self.norm, self.dtype, name=name)

    if self.bottleneck:
      features = _EXPANSION * self.width
      y = nn.relu(conv(self.width, 1, 1, "conv1")(x, train))
      y = nn.relu(conv(self.width, 3, self.stride, "conv2")(y, train))
      y = conv(features, 1, 1, "conv3")(y, train)
    else:
      features = self.width
      y = nn.relu(conv(features, 3, self.stride, "conv1")(x, train))
      y = conv(features, 3, 1, "conv2")(y, train)
    if self.stride > 1 or x.shape[-1] != features:
      x = conv(features, 1, self.stride, "shortcut")(x, train)
    return nn.relu(y + x.astype(y.dtype))


class ResNet(nn.Module):
  """The convolutional stages of a ResNet.

  Attributes:
    depth: 18, 34 or 50.
    norm: "frozen_bn": statistics, scales and offsets of pretraining, never changed; "bn": batch
      normalisation with momentum 0.1, trained, over the global batch.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters and statistics are float32.
  """

  depth: int = 50
  norm: str = "frozen_bn"
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
    """Computes features.

    Args:
      images: (B, H, W, C) float32, normalised, of any size.
      train: whether batch normalisation uses the batch's own statistics.

    Returns:
      `res2`, `res3`, `res4`, `res5`: (B, ceil(H / s), ceil(W / s), D) at strides s of 4, 8, 16, 32;
      D is 256, 512, 1024, 2048 for depth 50, and a quarter of it otherwise.

    Raises:
      UserError: for a depth or a normalisation that does not exist.
    """
    if self.depth not in DEPTHS:
      raise UserError(f"depth is {self.depth!r}; expected one of {', '.join(map(str, DEPTHS))}.")
    if self.norm not in NORMS:
      raise UserError(
        f"norm is {self.norm!r}; expected one of {', '.join(NORMS)}.{suggestion(self.norm, NORMS)}"
      )
    counts, bottleneck = DEPTHS[self.depth]
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    x = NormedConv(_WIDTHS[0], 7, 2, self.norm, self.dtype, name="stem")(images, train)
    x = max_pool(nn.relu(x), 3, 2)
    features = {}
    for stage, (count, width) in enumerate(zip(counts, _WIDTHS, strict=True)):
      for index in range(count):
        stride = 2 if stage > 0 and index == 0 else 1
        x = block(width, stride, bottleneck, self.norm, self.dtype, name=f"res{stage + 2}_{index}")(
          x, train
        )
      features[f"res{stage + 2}"] = x
    return features
