"""EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction.

Cai, Li, Hu, Gan, Han, ICCV 2023 (arXiv 2205.14756); B0 to B3 for semantic segmentation. Not
Microsoft's network of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError
from effseg_jax.models import build
from effseg_jax.models.layers import BatchNorm, Conv, DepthwiseConv, DropPath
from effseg_jax.ops.resize import resize_bicubic

Dtype = Any

STRIDE = 32
AGGREGATION_KERNEL = 5
_EPSILON = 1e-15  # of the attention's denominators

_init = nn.initializers.normal(0.02)


class Layer(nn.Module):
  """Convolution, batch normalisation or a bias, hardswish or nothing.

  Attributes:
    features: output channels; 0: depthwise, as many as there are.
    kernel_size: odd.
    stride: along both axes.
    norm: batch normalisation and no bias, or a bias and no normalisation.
    activate: whether hardswish follows.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  norm: bool = True
  activate: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    arguments = {"use_bias": not self.norm, "kernel_init": _init, "dtype": self.dtype}
    if self.features:
      conv = Conv(self.features, self.kernel_size, self.stride, name="conv", **arguments)
    else:
      conv = DepthwiseConv(self.kernel_size, self.stride, name="conv", **arguments)
    x = conv(x)
    if self.norm:
      x = BatchNorm(dtype=self.dtype, name="norm")(x, train)
    return nn.hard_swish(x) if self.activate else x


class MBConv(nn.Module):
  """Inverted bottleneck: 1x1 to more channels, depthwise 3x3, 1x1 to the output's.

  Attributes:
    features: output channels.
    stride: of the depthwise convolution.
    expand_ratio: hidden channels per channel.
    norms: whether all three convolutions are normalised, or the last alone.
    dtype: of the computation.
  """

  features: int
  stride: int = 1
  expand_ratio: int = 4
  norms: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    hidden = self.expand_ratio * x.shape[-1]
    x = Layer(hidden, norm=self.norms, dtype=self.dtype, name="expand")(x, train)
    x = Layer(0, 3, self.stride, self.norms, dtype=self.dtype, name="depthwise")(x, train)
    return Layer(self.features, activate=False, dtype=self.dtype, name="project")(x, train)


def relu_linear_attention(qkv: jax.Array, head_dim: int) -> jax.Array:
  """Attention whose similarity is `relu(q) . relu(k)` (section 3.1): linear in the positions.

  `out_n = Q_n (sum_m K_m v_m^T) / (Q_n . sum_m K_m)`. A position whose query is nowhere positive,
  and a head without a positive key, give 0.

  Args:
    qkv: (B, h, w, heads * 3 * head_dim), of each head q, k and v.
    head_dim: channels of a head.

  Returns:
    float32 (B, h, w, heads * head_dim).
  """
  rows = qkv.shape[1]
  split = "b h w (n s d) -> s b n (h w) d"
  query, key, value = einops.rearrange(qkv.astype(jnp.float32), split, s=3, d=head_dim)
  query, key = nn.relu(query), nn.relu(key)
  mix = lambda spec, *xs: jnp.einsum(spec, *xs, precision="highest")  # noqa: E731
  kernel = mix("bnkd,bnke->bnde", key, value)
  mixed = mix("bnkd,bnde->bnke", query, kernel)
  total = mix("bnkd,bnd->bnk", query, jnp.sum(key, axis=2))
  mixed = mixed / (total + _EPSILON)[..., None]
  return einops.rearrange(mixed, "b n (h w) d -> b h w (n d)", h=rows)


class MultiScaleAttention(nn.Module):
  """ReLU linear attention of the positions, and of their 5x5 neighbourhoods (figure 2).

  Attributes:
    head_dim: channels of a head.
    dtype: of the computation; the attention itself is float32.
  """

  head_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C)."""
    channels = x.shape[-1]
    qkv = Conv(3 * channels, kernel_init=_init, dtype=self.dtype, name="qkv")(x)
    coarse = DepthwiseConv(
      AGGREGATION_KERNEL, kernel_init=_init, dtype=self.dtype, name="aggregate"
    )(qkv)
    coarse = GroupedPointwise(self.head_dim, self.dtype, name="aggregate_mix")(coarse)
    scales = [relu_linear_attention(scale, self.head_dim) for scale in (qkv, coarse)]
    mixed = jnp.concatenate(scales, axis=-1).astype(self.dtype)
    return Layer(channels, activate=False, dtype=self.dtype, name="project")(mixed, train)


class GroupedPointwise(nn.Module):
  """1x1 convolution of groups of channels, each by itself.

  Attributes:
    width: channels of a group.
    dtype: of the computation.
  """

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C)."""
    channels = x.shape[-1]
    kernel = self.param("kernel", _init, (1, 1, self.width, channels), jnp.float32)
    kernel = einops.rearrange(kernel[0, 0].astype(self.dtype), "i (g o) -> g i o", o=self.width)
    x = einops.rearrange(x.astype(self.dtype), "b h w (g i) -> b h w g i", i=self.width)
    x = jnp.einsum("bhwgi,gio->bhwgo", x, kernel)
    return einops.rearrange(x, "b h w g o -> b h w (g o)")


class Block(nn.Module):
  """Multi-scale attention, then an inverted bottleneck; nothing is normalised in front.

  Attributes:
    head_dim: channels of an attention head.
    expand_ratio: of the bottleneck.
    drop_paths: rates of both residual branches.
    dtype: of the computation.
  """

  head_dim: int
  expand_ratio: int
  drop_paths: tuple[float, float] = (0.0, 0.0)
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C)."""
    y = MultiScaleAttention(self.head_dim, self.dtype, name="attention")(x, train)
    x = x + DropPath(self.drop_paths[0], name="drop_path1")(y, train)
    local = MBConv(
      x.shape[-1], expand_ratio=self.expand_ratio, norms=False, dtype=self.dtype, name="local"
    )
    return x + DropPath(self.drop_paths[1], name="drop_path2")(local(x, train), train)


class StemBlock(nn.Module):
  """Depthwise 3x3 and 1x1 convolution.

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C)."""
    y = Layer(0, 3, dtype=self.dtype, name="depthwise")(x, train)
    return Layer(x.shape[-1], activate=False, dtype=self.dtype, name="pointwise")(y, train)


class Backbone(nn.Module):
  """Stem and four stages (section 3.2): convolutions first, attention in the last two.

  Attributes:
    widths: channels of the stem and of the stages.
    depths: their blocks, those that halve the size aside.
    head_dim: channels of an attention head.
    expand_ratio: hidden channels per channel.
    drop_path: rate of the last residual branch; the others' grow linearly.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation.
  """

  widths: tuple[int, ...]
  depths: tuple[int, ...]
  head_dim: int
  expand_ratio: int = 4
  drop_path: float = 0.0
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
    """Images (B, H, W, 3) -> the four stages' maps, at strides 4, 8, 16 and 32."""
    rates = iter(self._rates())
    kinds = (StemBlock, MBConv, Block)
    if self.remat:
      kinds = tuple(nn.remat(kind, static_argnums=(2,)) for kind in kinds)
    stem_block, bottleneck, block = kinds

    def residual(module: nn.Module, x: jax.Array, name: str) -> jax.Array:
      return x + DropPath(next(rates), name=f"{name}_drop_path")(module(x, train), train)

    x = Layer(self.widths[0], 3, 2, dtype=self.dtype, name="stem")(x, train)
    for index in range(self.depths[0]):
      name = f"stem_block_{index}"
      x = residual(stem_block(self.dtype, name=name), x, name)
    outputs = []
    for stage in range(1, len(self.widths)):
      width, local = self.widths[stage], stage < 3
      bottlenecks = range(self.depths[stage] if local else 1)
      for index in bottlenecks:
        name = f"stage_{stage}_block_{index}"
        conv = bottleneck(width, 1 if index else 2, self.expand_ratio, local, self.dtype, name=name)
        x = residual(conv, x, name) if index else conv(x, train)
      for index in range(1, 1 if local else self.depths[stage] + 1):
        both = next(rates), next(rates)
        name = f"stage_{stage}_block_{index}"
        x = block(self.head_dim, self.expand_ratio, both, self.dtype, name=name)(x, train)
      outputs.append(x)
    return tuple(outputs)

  def _rates(self) -> list[float]:
    """Drop rate of each residual branch with an identity beside it, in their order."""
    stem, *stages = self.depths
    count = stem + sum(depth - 1 for depth in stages[:2]) + 2 * sum(stages[2:])
    return [self.drop_path * index / count for index in range(1, count + 1)]


class Head(nn.Module):
  """The three deepest stages at stride 8, summed, and a few bottlenecks (section 3.2).

  Attributes:
    features: channels of the head.
    depth: bottlenecks.
    num_classes: output channels.
    expand_ratio: of the bottlenecks.
    head_expand: hidden channels of the classifier per channel; None or 0: no hidden layer.
    remat: compute each bottleneck again in the backward pass.
    dtype: of the computation; upsampling is float32.
  """

  features: int
  depth: int
  num_classes: int
  expand_ratio: int = 4
  head_expand: int | None = 4
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, levels: Sequence[jax.Array], train: bool) -> jax.Array:
    """Maps of strides 8, 16 and 32 -> logits float32 (B, H/8, W/8, num_classes)."""
    size = levels[0].shape[1:3]
    x = jnp.zeros((), jnp.float32)
    for index, level in enumerate(reversed(levels)):
      layer = Layer(self.features, activate=False, dtype=self.dtype, name=f"input_{index}")
      x += resize_bicubic(layer(level, train).astype(jnp.float32), size)
    x = x.astype(self.dtype)
    bottleneck = nn.remat(MBConv, static_argnums=(2,)) if self.remat else MBConv
    for index in range(self.depth):
      conv = bottleneck(
        self.features, 1, self.expand_ratio, True, self.dtype, name=f"block_{index}"
      )
      x = x + conv(x, train)
    if self.head_expand:
      hidden = self.head_expand * self.features
      x = Layer(hidden, dtype=self.dtype, name="hidden")(x, train)
    conv = Conv(
      self.num_classes, use_bias=True, kernel_init=_init, dtype=self.dtype, name="classify"
    )
    return conv(x).astype(jnp.float32)


class EfficientViT(nn.Module):
  """EfficientViT for semantic segmentation.

  Attributes:
    widths: channels of the stem and of the four stages.
    depths: their blocks; the last two stages have one more, which halves the size.
    attention_dim: channels of an attention head.
    head_features: channels of the head.
    head_depth: its bottlenecks.
    expand_ratio: hidden channels per channel, in every bottleneck.
    head_expand: hidden channels of the classifier per channel, 4 in the models for Cityscapes;
      None or 0: no hidden layer, as in those for ADE20K.
    num_classes: classes.
    in_channels: channels of the images.
    features_only: return the four stages' maps instead of logits.
    drop_path: stochastic-depth rate of the last residual branch; 0 in segmentation.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters, statistics, attention, upsampling and logits are float32.
  """

  widths: tuple[int, int, int, int, int]
  depths: tuple[int, int, int, int, int]
  attention_dim: int
  head_features: int
  head_depth: int
  expand_ratio: int = 4
  head_expand: int | None = 4
  num_classes: int = 19
  in_channels: int = 3
  features_only: bool = False
  drop_path: float = 0.0
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Segments images.

    The head adds maps of strides 8, 16 and 32, which fit where the rows and columns divided by 32
    leave nothing or at least 25. Other sizes are an extension of ours: zeros, the mean colour, are
    added at the bottom and at the right up to the next multiple of 32, and the logits cut to the
    image. Attention is global, so this changes all logits a little.

    Args:
      images: (B, H, W, in_channels) float32, normalised.
      train: whether batch statistics and stochastic depth are those of training.

    Returns:
      Logits float32 (B, ceil(H/8), ceil(W/8), num_classes), or the maps of the four stages of the
      images as they are, at strides 4, 8, 16 and 32.

    Raises:
      UserError: if images have other channels.
    """
    if images.ndim != 4 or images.shape[-1] != self.in_channels:
      raise UserError(
        f"images are {images.shape}; expected (batch, rows, columns, {self.in_channels})."
      )
    backbone = Backbone(
      self.widths,
      self.depths,
      self.attention_dim,
      self.expand_ratio,
      self.drop_path,
      self.remat,
      self.dtype,
      name="backbone",
    )
    if self.features_only:
      return backbone(images, train)
    size = images.shape[1:3]
    padding = [(0, 0), *((0, _missing(n)) for n in size), (0, 0)]
    levels = backbone(jnp.pad(images, padding), train)
    head = Head(
      self.head_features,
      self.head_depth,
      self.num_classes,
      self.expand_ratio,
      self.head_expand,
      self.remat,
      self.dtype,
      name="head",
    )
    rows, cols = (-(-n // 8) for n in size)
    return head(levels[1:], train)[:, :rows, :cols]


def _missing(length: int) -> int:
  """How many pixels an axis lacks of a size whose three grids fit into each other."""
  rest = length % STRIDE
  return 0 if rest == 0 or rest >= 25 else STRIDE - rest


_VARIANTS: dict[str, dict[str, Any]] = {
  "efficientvit_b0": {
    "widths": (8, 16, 32, 64, 128),
    "depths": (1, 2, 2, 2, 2),
    "attention_dim": 16,
    "head_features": 32,
    "head_depth": 1,
  },
  "efficientvit_b1": {
    "widths": (16, 32, 64, 128, 256),
    "depths": (1, 2, 3, 3, 4),
    "attention_dim": 16,
    "head_features": 64,
    "head_depth": 3,
  },
  "efficientvit_b2": {
    "widths": (24, 48, 96, 192, 384),
    "depths": (1, 3, 4, 4, 6),
    "attention_dim": 32,
    "head_features": 96,
    "head_depth": 3,
  },
  "efficientvit_b3": {
    "widths": (32, 64, 128, 256, 512),
    "depths": (1, 4, 6, 6, 9),
    "attention_dim": 32,
    "head_features": 128,
    "head_depth": 3,
  },
}


def create(name: str, **fields: Any) -> EfficientViT:
  """Creates `efficientvit_b0` to `efficientvit_b3`."""
  model = build(EfficientViT, name, _VARIANTS[name], fields)
  for width in model.widths[3:]:
    if width % model.attention_dim:
      raise UserError(
        f"widths are {model.widths}; the last two must be multiples of attention_dim,"
        f" {model.attention_dim}."
      )
  return model
