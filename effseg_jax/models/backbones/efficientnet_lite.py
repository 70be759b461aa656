"""EfficientNet-Lite: EfficientNet (Tan and Le, ICML 2019) for phones, as published in 2020.

Without squeeze-and-excitation, with ReLU6, and with a stem and two stages that do not grow.
Weights of ImageNet come from TensorFlow, and so does the padding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.models.layers import BatchNorm, Conv, DepthwiseConv
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD

Dtype = Any

# How much wider and deeper than lite0.
EFFICIENTNET_LITE: dict[str, dict[str, float]] = {
  "efficientnet_lite0": {"width": 1.0, "depth": 1.0},
  "efficientnet_lite1": {"width": 1.0, "depth": 1.1},
  "efficientnet_lite2": {"width": 1.1, "depth": 1.2},
  "efficientnet_lite3": {"width": 1.2, "depth": 1.4},
  "efficientnet_lite4": {"width": 1.4, "depth": 1.8},
}


class Stage(NamedTuple):
  """Of lite0: channels, blocks, stride of the first, kernel size, and factor of expansion."""

  channels: int
  blocks: int
  stride: int
  kernel_size: int
  expansion: int


STAGES = (
  Stage(16, 1, 1, 3, 1),
  Stage(24, 2, 2, 3, 6),
  Stage(40, 2, 2, 5, 6),
  Stage(80, 3, 2, 3, 6),
  Stage(112, 3, 1, 5, 6),
  Stage(192, 4, 2, 5, 6),
  Stage(320, 1, 1, 3, 6),
)
_STEM = 32
_OUTPUTS = {1: "res2", 2: "res3", 4: "res4", 6: "res5"}  # the last stage of each stride


def relu6(x: jax.Array) -> jax.Array:
  """Between 0 and 6."""
  return jnp.clip(x, 0, 6)


class MobileBlock(nn.Module):
  """Inverted residual (MobileNetV2): expansion, depthwise convolution, projection.

  Attributes:
    features: output channels.
    stride: of the depthwise convolution.
    kernel_size: of the depthwise convolution.
    expansion: how many times wider it is than the input; 1: no expansion.
    dtype: of the computation.
  """

  features: int
  stride: int
  kernel_size: int
  expansion: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    y = x
    if self.expansion > 1:
      y = Conv(x.shape[-1] * self.expansion, dtype=self.dtype, name="expand")(y)
      y = relu6(batch_norm("expand_norm", self.dtype)(y, train))
    y = DepthwiseConv(
      self.kernel_size, self.stride, tensorflow_padding=True, dtype=self.dtype, name="depthwise"
    )(y)
    y = relu6(batch_norm("depthwise_norm", self.dtype)(y, train))
    y = Conv(self.features, dtype=self.dtype, name="project")(y)
    y = batch_norm("project_norm", self.dtype)(y, train)
    return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class EfficientNetLite(nn.Module):
  """The stages of an EfficientNet-Lite, without the last convolution before its classifier.

  Attributes:
    width: factor of the channels.
    depth: factor of the blocks in a stage.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters and statistics are float32.
  """

  width: float = 1.0
  depth: float = 1.0
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
    """Computes features.

    Args:
      images: (B, H, W, 3) float32, normalised by ImageNet's mean and deviation like all our
        backbones' images, and here brought to the range from -1 to 1 that this one was made for.
      train: whether batch normalisation uses the batch's own statistics.

    Returns:
      `res2`, `res3`, `res4`, `res5`: (B, ceil(H / s), ceil(W / s), D) at strides s of 4, 8, 16, 32;
      D is 24, 40, 112 and 320, times `width`.
    """
    mean, std = (np.asarray(x, np.float32) for x in (IMAGENET_MEAN, IMAGENET_STD))
    x = images * (std / 128) + (mean - 127) / 128
    stem = Conv(_STEM, 3, 2, tensorflow_padding=True, dtype=self.dtype, name="stem")
    x = relu6(batch_norm("stem_norm", self.dtype)(stem(x), train))
    block = nn.remat(MobileBlock, static_argnums=(2,)) if self.remat else MobileBlock
    features = {}
    for stage, form in enumerate(STAGES):
      channels, blocks = stage_size(stage, self.width, self.depth)
      for index in range(blocks):
        x = block(
          channels,
          1 if index else form.stride,
          form.kernel_size,
          form.expansion,
          self.dtype,
          name=f"stage_{stage}_block_{index}",
        )(x, train)
      if stage in _OUTPUTS:
        features[_OUTPUTS[stage]] = x
    return features


def stage_size(stage: int, width: float, depth: float) -> tuple[int, int]:
  """Channels and blocks of one of the seven stages."""
  channels, blocks = STAGES[stage].channels, STAGES[stage].blocks
  if stage not in (0, len(STAGES) - 1):
    blocks = math.ceil(blocks * depth)
  # To the nearest multiple of 8, but by no more than a tenth down.
  rounded = max(8, int(channels * width + 4) // 8 * 8)
  return rounded + 8 * (rounded < 0.9 * channels * width), blocks


def batch_norm(name: str, dtype: Dtype) -> BatchNorm:
  """With TensorFlow's constants."""
  return BatchNorm(momentum=0.01, epsilon=1e-3, dtype=dtype, name=name)
