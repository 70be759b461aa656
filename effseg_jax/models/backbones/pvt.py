"""PVT v2: Improved Baselines with Pyramid Vision Transformer (Wang et al., CVMJ 2022).

b0 to b5 with convolutional spatial reduction; the "linear" variant is not here. SegFormer's encoder
(`models/segformer.py`) is the same network with other hidden widths.
"""

from __future__ import annotations

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.models.layers import Conv, DepthwiseConv, DropPath, conv_init

Dtype = Any

# Per stage: kernel and stride of the patch embedding, and how far keys and values are reduced.
_EMBEDDINGS = ((7, 4), (3, 2), (3, 2), (3, 2))
REDUCTIONS = (8, 4, 2, 1)
HEADS = (1, 2, 5, 8)
_WIDTHS = (64, 128, 320, 512)

PVT_V2: dict[str, dict[str, Any]] = {
  "pvt_v2_b0": {"widths": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
  "pvt_v2_b1": {"widths": _WIDTHS, "depths": (2, 2, 2, 2)},
  "pvt_v2_b2": {"widths": _WIDTHS, "depths": (3, 4, 6, 3)},
  "pvt_v2_b3": {"widths": _WIDTHS, "depths": (3, 4, 18, 3)},
  "pvt_v2_b4": {"widths": _WIDTHS, "depths": (3, 8, 27, 3)},
  "pvt_v2_b5": {"widths": _WIDTHS, "depths": (3, 6, 40, 3), "ratios": (4, 4, 4, 4)},
}

_init = nn.initializers.normal(0.02)


class SpatialReduction(nn.Module):
  """Convolution whose stride is its kernel size; the remainder at the right and bottom is dropped.

  Attributes:
    size: of the kernel.
    dtype: of the computation.
  """

  size: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H // size, W // size, C)."""
    channels, size = x.shape[-1], self.size
    shape = (size, size, channels, channels)
    kernel = self.param("kernel", conv_init, shape, jnp.float32).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    rows, cols = x.shape[1] // size, x.shape[2] // size
    # Blocks times a matrix: the same products as a convolution, whose gradient is slow on the CPU.
    x = x[:, : rows * size, : cols * size].astype(self.dtype)
    x = einops.rearrange(x, "b (h r) (w s) c -> b h w (r s c)", r=size, s=size)
    return x @ kernel.reshape(-1, channels) + bias.astype(self.dtype)


class SpatialReductionAttention(nn.Module):
  """Attention of every position to a coarser grid of keys and values.

  Attributes:
    heads: of the attention.
    reduction: positions per key along each axis.
    norm_epsilon: of the normalisation after the reduction.
    dtype: of the computation; the softmax is float32.
  """

  heads: int
  reduction: int
  norm_epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C)."""
    _, rows, _, channels = x.shape
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=_init, dtype=self.dtype, name=name
    )
    split = lambda x: einops.rearrange(x, "b h w (n d) -> b n (h w) d", n=self.heads)  # noqa: E731
    query = split(dense(channels, "query")(x)) * (channels // self.heads) ** -0.5
    if self.reduction > 1:
      x = SpatialReduction(self.reduction, self.dtype, name="reduce")(x)
      x = _norm("norm", self.norm_epsilon, self.dtype)(x)
    key, value = map(split, jnp.split(dense(2 * channels, "key_value")(x), 2, axis=-1))
    logits = jnp.einsum("bnqd,bnkd->bnqk", query, key).astype(jnp.float32)
    weights = nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bnqk,bnkd->bnqd", weights, value)
    mixed = einops.rearrange(mixed, "b n (h w) d -> b h w (n d)", h=rows)
    return dense(channels, "proj")(mixed)


class Block(nn.Module):
  """Attention, then a feed-forward layer with a depthwise convolution inside.

  Attributes:
    heads: of the attention.
    reduction: see `SpatialReductionAttention`.
    ratio: hidden channels per channel.
    drop_path: rate of both residual branches.
    norm_epsilon: of the normalisations before both branches.
    reduction_norm_epsilon: of the one after the reduction.
    dtype: of the computation.
  """

  heads: int
  reduction: int
  ratio: int
  drop_path: float
  norm_epsilon: float = 1e-6
  reduction_norm_epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C)."""
    channels = x.shape[-1]
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=_init, dtype=self.dtype, name=name
    )
    norm = lambda name: _norm(name, self.norm_epsilon, self.dtype)  # noqa: E731
    attention = SpatialReductionAttention(
      self.heads, self.reduction, self.reduction_norm_epsilon, self.dtype, name="attention"
    )
    y = attention(norm("norm1")(x))
    x = x + DropPath(self.drop_path, name="drop_path1")(y, train)
    y = dense(self.ratio * channels, "fc1")(norm("norm2")(x))
    y = DepthwiseConv(use_bias=True, dtype=self.dtype, name="depthwise")(y)
    y = dense(channels, "fc2")(nn.gelu(y, approximate=False))
    return x + DropPath(self.drop_path, name="drop_path2")(y, train)


class PVTv2(nn.Module):
  """The four stages of PVT v2; `PVT_V2` has the fields of b0 to b5.

  Attributes:
    widths: channels of the stages.
    depths: blocks of the stages.
    ratios: hidden channels per channel in the feed-forward layers.
    heads: of the stages' attention.
    reductions: positions per key along each axis; 1: no reduction.
    drop_path: rate of the last block; the others' grow linearly from 0.
    norm_epsilon: of the normalisations in front of a block's branches and after a stage.
    embed_norm_epsilon: of those after patch embeddings and reductions.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters, norms' statistics and softmax are float32.
  """

  widths: tuple[int, int, int, int]
  depths: tuple[int, int, int, int]
  ratios: tuple[int, int, int, int] = (8, 8, 4, 4)
  heads: tuple[int, int, int, int] = HEADS
  reductions: tuple[int, int, int, int] = REDUCTIONS
  drop_path: float = 0.1
  norm_epsilon: float = 1e-6
  embed_norm_epsilon: float = 1e-5
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
    """Computes features.

    Args:
      images: (B, H, W, C) float32, normalised; every stage's grid at least as large as its
        reduction: H and W at least 29 for the published ones.
      train: whether stochastic depth is active (rng "drop_path").

    Returns:
      `res2`, `res3`, `res4`, `res5`: (B, ceil(H / s), ceil(W / s), width) at strides s of 4, 8, 16,
      32.
    """
    rates = np.split(
      np.linspace(0.0, self.drop_path, sum(self.depths)), np.cumsum(self.depths)[:-1]
    )
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    features, x = {}, images
    for stage, (kernel_size, stride) in enumerate(_EMBEDDINGS):
      embed = Conv(
        self.widths[stage], kernel_size, stride, True, dtype=self.dtype, name=f"embed_{stage}"
      )
      x = _norm(f"embed_norm_{stage}", self.embed_norm_epsilon, self.dtype)(embed(x))
      for index, rate in enumerate(rates[stage]):
        x = block(
          self.heads[stage],
          self.reductions[stage],
          self.ratios[stage],
          float(rate),
          self.norm_epsilon,
          self.embed_norm_epsilon,
          self.dtype,
          name=f"stage_{stage}_block_{index}",
        )(x, train)
      x = _norm(f"norm_{stage}", self.norm_epsilon, self.dtype)(x)
      features[f"res{stage + 2}"] = x
    return features


def _norm(name: str, epsilon: float, dtype: Dtype) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)
