"""SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers.

Xie, Wang, Yu, Anandkumar, Alvarez, Luo, NeurIPS 2021 (arXiv 2105.15203). The encoder ("MiT") is
PVT v2 with four hidden channels per channel everywhere; the decoder has linear layers only. The
image head is that of the pretraining on ImageNet; `head="mmseg"` is the decoder of MMSegmentation,
which is another function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError, require_one_of
from effseg_jax.models import build
from effseg_jax.models.backbones.pvt import HEADS, REDUCTIONS, PVTv2
from effseg_jax.models.layers import BatchNorm, Conv, ConvNorm, conv_init
from effseg_jax.ops.resize import resize_bilinear

Dtype = Any

STRIDES = (4, 8, 16, 32)
HEAD_KINDS = ("official", "mmseg", "image")


class Parameters(nn.Module):
  """Kernel and bias of a layer, for whoever multiplies it with the next one.

  Attributes:
    shape: of the kernel, (..., inputs, features).
    kernel_init: initialiser of the kernel.
    use_bias: whether there is a bias.
  """

  shape: tuple[int, ...]
  kernel_init: Any
  use_bias: bool = True

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array | None]:
    """Kernel (shape) and bias (features,), float32."""
    kernel = self.param("kernel", self.kernel_init, self.shape, jnp.float32)
    if not self.use_bias:
      return kernel, None
    return kernel, self.param("bias", nn.initializers.zeros, self.shape[-1:], jnp.float32)


def fuse_levels(
  levels: Sequence[jax.Array],
  layers: Sequence[tuple[jax.Array, jax.Array]],
  mixing: jax.Array,
  dtype: Dtype = jnp.float32,
) -> jax.Array:
  """A linear layer on each level, resized to the first, concatenated, mixed by a 1x1 convolution.

  All of it is linear, so the order is free: each level's two matrices are multiplied once, its
  positions by the product, and the results are resized and summed. The published
  order has the largest product of the network, of 4 D channels on the finest grid.

  Args:
    levels: (B, h, w, C), the finest first.
    layers: of each level, kernel (C, D) and bias (D,), float32.
    mixing: (L, D, F) float32, one matrix for each level.
    dtype: of the products with the levels.

  Returns:
    (B, h, w, F) on the first level's grid.
  """
  size = levels[0].shape[1:3]
  fused = jnp.zeros((), dtype)
  for level, (kernel, bias), matrix in zip(levels, layers, mixing, strict=True):
    folded = jnp.matmul(kernel, matrix, precision="highest").astype(dtype)
    offset = jnp.matmul(bias, matrix, precision="highest").astype(dtype)
    fused += resize_bilinear(level.astype(dtype) @ folded + offset, size)
  return fused


def fuse_levels_reference(
  levels: Sequence[jax.Array],
  layers: Sequence[tuple[jax.Array, jax.Array]],
  mixing: jax.Array,
) -> jax.Array:
  """`fuse_levels` in the published order: the reference form."""
  size = levels[0].shape[1:3]
  resized = [
    resize_bilinear(level @ kernel + bias, size)
    for level, (kernel, bias) in zip(levels, layers, strict=True)
  ]
  return jnp.concatenate(resized, axis=-1) @ mixing.reshape(-1, mixing.shape[-1])


class Head(nn.Module):
  """The all-MLP decoder of the paper (section 3.2).

  Attributes:
    features: D, channels of the decoder.
    num_classes: output channels.
    dropout: rate at which whole channels are dropped before the classifier.
    dtype: of the computation.
  """

  features: int
  num_classes: int
  dropout: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, levels: Sequence[jax.Array], train: bool) -> jax.Array:
    """Maps (B, h, w, C), the finest first -> logits float32 (B, h, w, num_classes)."""
    layers = [
      Parameters(
        (level.shape[-1], self.features), nn.initializers.normal(0.02), name=f"linear_{i}"
      )()
      for i, level in enumerate(levels)
    ]
    # The official concatenation has the deepest level first.
    mixing = _mixing(self.features, len(levels))[::-1]
    x = fuse_levels(levels, layers, mixing, self.dtype)
    x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train))
    return _classify(x, self, train)


class MMSegHead(nn.Module):
  """The decoder as MMSegmentation has it: normalised and rectified levels, the shallow one first.

  Attributes: those of `Head`.
  """

  features: int
  num_classes: int
  dropout: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, levels: Sequence[jax.Array], train: bool) -> jax.Array:
    """Maps (B, h, w, C), the finest first -> logits float32 (B, h, w, num_classes)."""
    size = levels[0].shape[1:3]
    x = jnp.zeros((), self.dtype)
    mixing = _mixing(self.features, len(levels)).astype(self.dtype)
    for index, level in enumerate(levels):
      conv = ConvNorm(self.features, activate=False, dtype=self.dtype, name=f"level_{index}")
      # Mixing channels commutes with resizing: on the level's own grid it has fewer products.
      x += resize_bilinear(nn.relu(conv(level, train)) @ mixing[index], size)
    x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train))
    return _classify(x, self, train)


def _mixing(features: int, levels: int) -> jax.Array:
  """The 1x1 convolution of the concatenated levels, one matrix (D, D) for each of them."""
  shape = (1, 1, levels * features, features)
  kernel, _ = Parameters(shape, conv_init, use_bias=False, name="fuse")()
  return kernel.reshape(levels, features, features)


def _classify(x: jax.Array, head: Head | MMSegHead, train: bool) -> jax.Array:
  """Dropout and classifier, (B, h, w, D) -> float32 (B, h, w, num_classes)."""
  x = nn.Dropout(head.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
  init = nn.initializers.normal(0.01)
  conv = Conv(head.num_classes, use_bias=True, kernel_init=init, dtype=head.dtype, name="classify")
  return conv(x).astype(jnp.float32)


class ImageHead(nn.Module):
  """Linear layer on the mean over all positions: the classifier of the pretraining.

  Attributes:
    num_classes: output channels.
    dtype: of the computation.
  """

  num_classes: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, levels: Sequence[jax.Array], train: bool) -> jax.Array:
    """Maps (B, h, w, C), the deepest last -> logits float32 (B, num_classes)."""
    del train
    x = jnp.mean(levels[-1].astype(jnp.float32), axis=(1, 2))
    init = nn.initializers.normal(0.02)
    dense = nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="classify")
    return dense(x).astype(jnp.float32)


class SegFormer(nn.Module):
  """SegFormer for semantic segmentation.

  Attributes:
    widths: channels of the stages.
    depths: transformer blocks of the stages.
    heads: of the stages' attention.
    reductions: positions per key along each axis, per stage.
    mlp_ratio: hidden channels per channel.
    decoder_features: channels of the decoder.
    num_classes: classes.
    in_channels: channels of the images.
    head: "official": the paper's; "mmseg": MMSegmentation's; "image": one for the whole image.
    features_only: return the four stages' maps instead of logits.
    drop_path: stochastic-depth rate of the last block; the others' grow linearly from 0.
    dropout: rate of dropped channels before the classifier.
    norm_epsilon: of the layer normalisations in front of a block's branches and after a stage.
      1e-5 in Hugging Face's models, which the weights of the hub are used with; 1e-6 in
      MMSegmentation.
    embed_norm_epsilon: of those after patch embeddings and reductions; 1e-6 in MMSegmentation.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters, statistics, softmax and logits are float32.
  """

  widths: tuple[int, int, int, int] = (32, 64, 160, 256)
  depths: tuple[int, int, int, int] = (2, 2, 2, 2)
  heads: tuple[int, int, int, int] = HEADS
  reductions: tuple[int, int, int, int] = REDUCTIONS
  mlp_ratio: int = 4
  decoder_features: int = 256
  num_classes: int = 150
  in_channels: int = 3
  head: str = "official"
  features_only: bool = False
  drop_path: float = 0.1
  dropout: float = 0.1
  norm_epsilon: float = 1e-5
  embed_norm_epsilon: float = 1e-5
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Segments images.

    Args:
      images: (B, H, W, in_channels) float32, normalised; H and W at least 29.
      train: whether batch statistics, dropout and stochastic depth are those of training.

    Returns:
      Logits float32 (B, ceil(H/4), ceil(W/4), num_classes), (B, num_classes) with the head "image",
      or the maps of the four stages, after their normalisations.

    Raises:
      UserError: if an image is smaller than a key's window or has other channels.
    """
    if images.ndim != 4 or images.shape[-1] != self.in_channels:
      raise UserError(
        f"images are {images.shape}; expected (batch, rows, columns, {self.in_channels})."
      )
    least = max((r - 1) * stride + 1 for r, stride in zip(self.reductions, STRIDES, strict=True))
    if min(images.shape[1:3]) < least:
      raise UserError(
        f"images are {images.shape[1]}x{images.shape[2]}; {least}x{least} is the least."
      )
    backbone = PVTv2(
      self.widths,
      self.depths,
      (self.mlp_ratio,) * len(self.depths),
      self.heads,
      self.reductions,
      self.drop_path,
      self.norm_epsilon,
      self.embed_norm_epsilon,
      self.remat,
      self.dtype,
      name="backbone",
    )
    levels = tuple(backbone(images, train).values())
    if self.features_only:
      return levels
    if self.head == "image":
      head = ImageHead(self.num_classes, self.dtype, name="head")
    else:
      kind = Head if self.head == "official" else MMSegHead
      head = kind(self.decoder_features, self.num_classes, self.dropout, self.dtype, name="head")
    return head(levels, train)


_WIDE = {"widths": (64, 128, 320, 512)}
_WIDEST = {**_WIDE, "decoder_features": 768}
_VARIANTS: dict[str, dict[str, Any]] = {
  "segformer_b0": {},
  "segformer_b1": {**_WIDE, "depths": (2, 2, 2, 2)},
  "segformer_b2": {**_WIDEST, "depths": (3, 4, 6, 3)},
  "segformer_b3": {**_WIDEST, "depths": (3, 4, 18, 3)},
  "segformer_b4": {**_WIDEST, "depths": (3, 8, 27, 3)},
  "segformer_b5": {**_WIDEST, "depths": (3, 6, 40, 3)},
}


def create(name: str, **fields: Any) -> SegFormer:
  """Creates `segformer_b0` to `segformer_b5`."""
  model = build(SegFormer, name, _VARIANTS[name], fields)
  require_one_of("head", model.head, HEAD_KINDS)
  return model
