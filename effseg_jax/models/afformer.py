"""AFFormer: Head-Free Lightweight Semantic Segmentation with Linear Transformer.

Dong, Wang, Wang, AAAI 2023 (arXiv 2301.04648). The defaults are the released model: the same
function of the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.models import build
from effseg_jax.models.layers import BatchNorm, DropPath
from effseg_jax.ops.conv import conv, depthwise_conv
from effseg_jax.ops.pool import adaptive_average_matrix
from effseg_jax.ops.resize import bilinear_matrix, resize_bilinear

Dtype = Any

HEADS = 8
HIGHPASS_KERNELS = (3, 5, 7)
HIGHPASS_HEADS = (2, 3, 3)
LOWPASS_SIZES = (1, 2, 3, 6)

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def depthwise_init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
  """Normal with the official variance `2 / (k k)`: fan-out over the groups, one channel each."""
  return jax.random.normal(key, shape, dtype) * np.sqrt(2.0 / (shape[0] * shape[1]))


class Conv(nn.Module):
  """Convolution; 1x1 as a matrix product.

  Attributes:
    features: output channels.
    kernel_size: odd.
    stride: along both axes.
    use_bias: whether a bias is added.
    kernel_init: initialiser of the kernel.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  use_bias: bool = False
  kernel_init: Any = conv_init
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
    x = x.astype(self.dtype)
    if self.kernel_size == 1 and self.stride == 1:
      x = x @ kernel[0, 0]
    else:
      x = conv(x, kernel, self.stride)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
      x = x + bias.astype(self.dtype)
    return x


class DepthwiseConv(nn.Module):
  """Depthwise convolution.

  Attributes:
    kernel_size: odd.
    stride: along both axes.
    use_bias: whether a bias is added.
    dtype: of the computation.
  """

  kernel_size: int = 3
  stride: int = 1
  use_bias: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""
    channels = x.shape[-1]
    shape = (self.kernel_size, self.kernel_size, 1, channels)
    kernel = self.param("kernel", depthwise_init, shape, jnp.float32).astype(self.dtype)
    x = depthwise_conv(x.astype(self.dtype), kernel, self.stride)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
      x = x + bias.astype(self.dtype)
    return x


class ConvNorm(nn.Module):
  """Convolution without bias, batch normalisation, and (by default) hardswish.

  Attributes:
    features: output channels.
    kernel_size: odd.
    stride: along both axes.
    activate: whether hardswish follows.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  activate: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    x = Conv(self.features, self.kernel_size, self.stride, dtype=self.dtype, name="conv")(x)
    x = BatchNorm(dtype=self.dtype, name="norm")(x, train)
    return nn.hard_swish(x) if self.activate else x


class Cluster(nn.Module):
  """Patch embedding: clusters pixels into prototypes (equation 1 of the paper, as released).

  The paper's local clustering is a convolution in the released code: depthwise 3x3, pointwise,
  normalisation, hardswish.

  Attributes:
    stride: pixels per prototype along each axis.
    dtype: of the computation.
  """

  stride: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""
    x = DepthwiseConv(stride=self.stride, dtype=self.dtype, name="depthwise")(x)
    return ConvNorm(x.shape[-1], dtype=self.dtype, name="pointwise")(x, train)


class PixelDescriptor(nn.Module):
  """Residual bottleneck on the pixels: 1x1 to half the channels, depthwise 3x3, 1x1 back.

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C)."""
    channels = x.shape[-1]
    y = ConvNorm(channels // 2, dtype=self.dtype, name="reduce")(x, train)
    y = DepthwiseConv(dtype=self.dtype, name="depthwise")(y)
    y = nn.hard_swish(BatchNorm(dtype=self.dtype, name="norm")(y, train))
    return x + ConvNorm(channels, activate=False, dtype=self.dtype, name="expand")(y, train)


class FrequencyFilters(nn.Module):
  """The dynamic high-pass and low-pass filters of the values, shared by the blocks of a stage.

  High-pass: depthwise convolutions of 3x3, 5x5 and 7x7 on 2, 3 and 3 of the 8 heads. Low-pass:
  the channels' quarters averaged on grids of 1, 2, 3 and 6 cells a side, resized back, rectified.

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, h, w, C) -> high-pass and low-pass parts, both (B, h, w, C)."""
    width = values.shape[-1] // HEADS
    heads = jnp.split(values, np.cumsum(HIGHPASS_HEADS)[:-1] * width, axis=-1)
    high = [
      DepthwiseConv(size, use_bias=True, dtype=self.dtype, name=f"highpass_{size}")(part)
      for size, part in zip(HIGHPASS_KERNELS, heads, strict=True)
    ]
    return jnp.concatenate(high, axis=-1), nn.relu(pooled_low_pass(values))


def pooled_low_pass(values: jax.Array) -> jax.Array:
  """Averages each quarter of the channels over s x s cells and resizes it back, s = 1, 2, 3, 6.

  Both are linear maps along the axes: `U P x P^T U^T` with small constant matrices.
  """
  rows, cols = values.shape[1:3]
  parts = []
  for bins, part in zip(LOWPASS_SIZES, jnp.split(values, 4, axis=-1), strict=True):
    pool_rows, pool_cols = (
      jnp.asarray(adaptive_average_matrix(n, bins), values.dtype) for n in (rows, cols)
    )
    cells = jnp.einsum("sh,tw,bhwc->bstc", pool_rows, pool_cols, part)
    up_rows, up_cols = (jnp.asarray(bilinear_matrix(n, bins), values.dtype) for n in (rows, cols))
    parts.append(jnp.einsum("hs,wt,bstc->bhwc", up_rows, up_cols, cells))
  return jnp.concatenate(parts, axis=-1)


def frequency_similarity(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """The frequency similarity kernel applied to the queries: `q (softmax(k)^T v) / sqrt(d)`.

  The softmax runs over the tokens; the kernel is d x d per head, so the cost is linear in N.

  Args:
    query: (B, h, w, C); C is split into 8 heads of d channels.
    key: like `query`.
    value: like `query`.

  Returns:
    (B, h, w, C).
  """
  split = "b h w (n d) -> b n (h w) d"
  rows, cols, channels = query.shape[1:]
  query, key, value = (einops.rearrange(x, split, n=HEADS) for x in (query, key, value))
  weights = nn.softmax(key.astype(jnp.float32), axis=2).astype(value.dtype)
  kernel = jnp.einsum("bnkd,bnke->bnde", weights, value)
  mixed = jnp.einsum("bnkd,bnde->bnke", query, kernel) * (channels // HEADS) ** -0.5
  return einops.rearrange(mixed, "b n (h w) d -> b h w (n d)", h=rows, w=cols)


class AdaptiveFrequencyFilter(nn.Module):
  """Three frequency filters of one projection, added up (section "adaptive frequency filter").

  `proj(q softmax(k)^T v / sqrt(d) + q * highpass(v) + lowpass(v))`

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, filters: FrequencyFilters) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C)."""
    channels = x.shape[-1]
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype, name=name
    )
    query, key, value = jnp.split(dense(3 * channels, "qkv")(x), 3, axis=-1)
    high, low = filters(value)
    mixed = frequency_similarity(query, key, value) + query * high + low
    return dense(channels, "proj")(mixed)


class MLP(nn.Module):
  """Feed-forward layer with a depthwise convolution inside; GELU after the inner residual.

  Attributes:
    ratio: hidden channels per channel.
    dtype: of the computation.
  """

  ratio: int = 2
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C)."""
    channels = x.shape[-1]
    init = nn.initializers.normal(0.02)
    x = nn.Dense(self.ratio * channels, kernel_init=init, dtype=self.dtype, name="fc1")(x)
    x = x + DepthwiseConv(use_bias=True, dtype=self.dtype, name="depthwise")(x)
    x = nn.gelu(x, approximate=False)
    return nn.Dense(channels, kernel_init=init, dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
  """One transformer block on the prototypes.

  Attributes:
    drop_path: rate of both residual branches.
    dtype: of the computation.
  """

  drop_path: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, position: DepthwiseConv, filters: FrequencyFilters, train: bool
  ) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C); `position` and `filters` belong to the stage."""
    norm = lambda name: nn.LayerNorm(  # noqa: E731
      epsilon=1e-6, use_fast_variance=False, dtype=self.dtype, name=name
    )
    x = x + position(x)
    y = AdaptiveFrequencyFilter(dtype=self.dtype, name="filter")(norm("norm1")(x), filters)
    x = x + DropPath(self.drop_path, name="drop_path1")(y, train)
    y = MLP(dtype=self.dtype, name="mlp")(norm("norm2")(x))
    return x + DropPath(self.drop_path, name="drop_path2")(y, train)


class Stage(nn.Module):
  """Prototypes from pixels, filtered, and restored beside the pixel descriptor.

  Attributes:
    features: output channels.
    strides: of the pixel grid and of the prototype grid after it.
    drop_paths: rate of each block; empty for the first stage, which has no prototypes.
    dtype: of the computation.
  """

  features: int
  strides: tuple[int, int]
  drop_paths: tuple[float, ...]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / strides[0]), ceil(W / strides[0]), features)."""
    pixels = Cluster(self.strides[0], self.dtype, name="cluster_0")(x, train)
    prototypes = Cluster(self.strides[1], self.dtype, name="cluster_1")(pixels, train)
    descriptor = PixelDescriptor(self.dtype, name="descriptor")
    if not self.drop_paths:
      restored = descriptor(pixels + prototypes, train)
    else:
      position = DepthwiseConv(use_bias=True, dtype=self.dtype, name="position")
      filters = FrequencyFilters(self.dtype, name="filters")
      for index, rate in enumerate(self.drop_paths):
        block = Block(rate, self.dtype, name=f"block_{index}")
        prototypes = block(prototypes, position, filters, train)
      restored = descriptor(pixels, train) + resize_bilinear(
        prototypes, pixels.shape[1:3], align_corners=True
      )
    return ConvNorm(self.features, dtype=self.dtype, name="aggregate")(restored, train)


class Backbone(nn.Module):
  """The four stages.

  Attributes:
    widths: channels entering each stage.
    depths: transformer blocks of each stage.
    drop_path: rate of the last block; the others' grow linearly from 0.
    remat: compute each stage again in the backward pass instead of keeping its activations.
    dtype: of the computation.
  """

  widths: tuple[int, int, int, int]
  depths: tuple[int, int, int, int]
  drop_path: float = 0.0
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
    """Images (B, H, W, 3) -> features at strides 4, 8, 8 and 8."""
    x = ConvNorm(self.widths[0] // 2, 3, 2, dtype=self.dtype, name="stem_0")(x, train)
    x = ConvNorm(self.widths[0], 3, 2, dtype=self.dtype, name="stem_1")(x, train)
    # The first stage has no blocks, but counts one in the official schedule of rates.
    counts = np.maximum(self.depths, 1)
    rates = np.split(np.linspace(0.0, self.drop_path, sum(counts)), np.cumsum(counts)[:-1])
    stage = nn.remat(Stage, static_argnums=(2,)) if self.remat else Stage
    outputs = []
    for index, strides in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
      x = stage(
        (*self.widths[1:], self.widths[-1])[index],
        strides,
        tuple(float(rate) for rate in rates[index][: self.depths[index]]),
        self.dtype,
        name=f"stage_{index}",
      )(x, train)
      outputs.append(x)
    return tuple(outputs)


class Head(nn.Module):
  """Squeeze, normalise, classify.

  Attributes:
    num_classes: output channels.
    dropout: rate at which whole channels are dropped before the classifier.
    dtype: of the computation.
  """

  num_classes: int
  dropout: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, h, w, 216) -> logits float32 (B, h, w, num_classes)."""
    x = Conv(256, dtype=self.dtype, name="squeeze")(x)
    x = nn.GroupNorm(32, epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name="norm")(x)
    x = nn.relu(x)
    x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
    init = nn.initializers.normal(0.01)
    x = Conv(self.num_classes, use_bias=True, kernel_init=init, dtype=self.dtype, name="classify")(
      x
    )
    return x.astype(jnp.float32)


class AFFormer(nn.Module):
  """AFFormer for semantic segmentation.

  Attributes:
    widths: channels entering each stage.
    depths: transformer blocks of each stage.
    num_classes: classes.
    features_only: return the four stages' features instead of logits.
    drop_path: stochastic-depth rate of the last block.
    dropout: rate of dropped channels in the head.
    remat: compute each stage again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters, statistics and logits are float32.
  """

  widths: tuple[int, int, int, int]
  depths: tuple[int, int, int, int]
  num_classes: int = 150
  features_only: bool = False
  drop_path: float = 0.0
  dropout: float = 0.1
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Segments images.

    Args:
      images: (B, H, W, 3) float32, normalised; H and W at least 32.
      train: whether batch statistics, dropout and stochastic depth are those of training.

    Returns:
      Logits float32 (B, ceil(H/8), ceil(W/8), num_classes), or the features of the four stages.

    Raises:
      UserError: if an image is smaller than 32x32.
    """
    if min(images.shape[1:3]) < 32:
      raise UserError(f"images are {images.shape[1]}x{images.shape[2]}; 32x32 is the least.")
    backbone = Backbone(
      self.widths, self.depths, self.drop_path, self.remat, self.dtype, name="backbone"
    )
    features = backbone(images, train)
    if self.features_only:
      return features
    return Head(self.num_classes, self.dropout, self.dtype, name="head")(features[-1], train)


_VARIANTS = {
  "tiny": {"widths": (32, 64, 160, 216), "depths": (0, 2, 4, 2)},
  "small": {"widths": (32, 64, 176, 216), "depths": (0, 2, 4, 2)},
  "base": {"widths": (32, 96, 176, 216), "depths": (0, 2, 6, 2)},
}


def create(name: str, **fields: Any) -> AFFormer:
  """Creates `afformer_{tiny,small,base}`, or with `_fft` the model whose filters are spectral."""
  size = name.removeprefix("afformer_").removesuffix("_fft")
  return build(AFFormer, name, _VARIANTS[size], fields)
