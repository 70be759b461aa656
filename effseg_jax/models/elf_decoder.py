"""Between AVESFormer's backbones and its logits: attention, prompt queries, decoder, mask head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.models.layers import Conv, GroupNorm, conv_init
from effseg_jax.ops.conv import conv
from effseg_jax.ops.position import sine_position
from effseg_jax.ops.resize import resize_bilinear
from effseg_jax.ops.upsampled_conv import upsampled_conv

Dtype = Any

# Tokens that attend to all others at once: 56x56 of them would take 300 MB a frame and layer.
_MOST_QUERIES = 1024

xavier_init = nn.initializers.xavier_uniform()


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Softmax attention.

  Args:
    query: (B, heads, N, D).
    key: (B, heads, M, D).
    value: (B, heads, M, D).

  Returns:
    (B, heads, N, D), and the weights, float32 (B, heads, N, M), whose rows sum to 1.
  """
  logits = jnp.einsum("bhnd,bhmd->bhnm", query * query.shape[-1] ** -0.5, key)
  weights = nn.softmax(logits.astype(jnp.float32), axis=-1)
  return jnp.einsum("bhnm,bhmd->bhnd", weights.astype(value.dtype), value), weights


def attend_in_parts(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """`attend` for many queries: some at a time, and again in the backward pass."""
  count = query.shape[2]
  parts = -(-count // _MOST_QUERIES)
  size = -(-count // parts)
  query = jnp.pad(query, ((0, 0), (0, 0), (0, parts * size - count), (0, 0)))
  query = einops.rearrange(query, "b h (p n) d -> p b h n d", p=parts)
  attended = jax.lax.map(jax.checkpoint(lambda part: attend(part, key, value)[0]), query)
  return einops.rearrange(attended, "p b h n d -> b h (p n) d")[:, :, :count]


class Attention(nn.Module):
  """Multi-head attention with its four projections.

  The weights are sown as `intermediates/.../weights` for pictures and tests.

  Attributes:
    heads: of the attention.
    dtype: of the computation; the softmax is float32.
  """

  heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """(B, N, C), (B, M, D), (B, M, D) -> (B, N, C)."""
    features = queries.shape[-1]

    def project(x: jax.Array, name: str) -> jax.Array:
      x = nn.Dense(features, kernel_init=xavier_init, dtype=self.dtype, name=name)(x)
      return einops.rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    query, key, value = project(queries, "query"), project(keys, "key"), project(values, "value")
    if queries.shape[1] > _MOST_QUERIES:
      attended = attend_in_parts(query, key, value)
    else:
      attended, weights = attend(query, key, value)
      self.sow("intermediates", "weights", weights)
    attended = einops.rearrange(attended, "b h n d -> b n (h d)")
    return nn.Dense(features, kernel_init=xavier_init, dtype=self.dtype, name="out")(attended)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention to other tokens if there are any, feed-forward layer.

  A residual and a layer normalisation after each.

  Attributes:
    heads: of the attention.
    hidden: channels inside the feed-forward layer.
    dropout: rate, after each of the three and inside the feed-forward layer.
    dtype: of the computation.
  """

  heads: int
  hidden: int
  dropout: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, position: jax.Array | None, memory: jax.Array | None, train: bool
  ) -> jax.Array:
    """Mixes tokens.

    Args:
      x: (B, N, C).
      position: (N, C), added to queries and keys of x but not to values, or None.
      memory: (B, M, D), keys and values of the cross-attention, or None for none.
      train: whether dropout is active.

    Returns:
      (B, N, C).
    """

    def add(x: jax.Array, branch: jax.Array, name: str) -> jax.Array:
      norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=name)
      return norm(x + nn.Dropout(self.dropout, deterministic=not train)(branch))

    placed = lambda x: x if position is None else x + position  # noqa: E731
    attention = lambda name: Attention(self.heads, self.dtype, name=name)  # noqa: E731
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=xavier_init, dtype=self.dtype, name=name
    )
    x = add(x, attention("self_attention")(placed(x), placed(x), x), "norm1")
    if memory is not None:
      x = add(x, attention("cross_attention")(placed(x), memory, memory), "norm2")
    y = nn.gelu(dense(self.hidden, "expand")(x), approximate=False)
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    return add(x, dense(x.shape[-1], "contract")(y), "norm3")


class PromptQueryGenerator(nn.Module):
  """Queries from the sound and learned prompts (section 4.1).

  With a single audio token per second, the cross-attention softmax is 1 everywhere, so the sound
  has no effect ("attention dissipation"). Self-attention among prompts and sound makes as
  many tokens as there are prompts, each of which depends on the sound.

  Attributes:
    count: prompts.
    mode: "concat": the sound is one more token before the prompts; "add": it is added to each.
    layers: of the transformer.
    heads: of its attention.
    hidden: channels inside its feed-forward layers.
    dropout: rate.
    dtype: of the computation.
  """

  count: int = 100
  mode: str = "concat"
  layers: int = 6
  heads: int = 8
  hidden: int = 1024
  dropout: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, sound: jax.Array, train: bool) -> jax.Array:
    """(B, 1, C) -> (B, count + 1, C) with "concat", (B, count, C) with "add"."""
    shape = (self.count, sound.shape[-1])
    prompts = self.param("prompts", nn.initializers.normal(1.0), shape, jnp.float32)
    prompts = prompts.astype(self.dtype)
    if self.mode == "add":
      x = prompts + sound
    else:
      prompts = jnp.broadcast_to(prompts, (sound.shape[0], *shape))
      x = jnp.concatenate([sound, prompts], axis=1)
    for index in range(self.layers):
      block = TransformerBlock(
        self.heads, self.hidden, self.dropout, self.dtype, name=f"block_{index}"
      )
      x = block(x, None, None, train)
    return x


class ConvNorm(nn.Module):
  """Convolution and group normalisation.

  Attributes:
    features: output channels, a multiple of 32.
    kernel_size: odd.
    stride: along both axes.
    use_bias: whether the convolution has a bias.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  use_bias: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    x = Conv(
      self.features, self.kernel_size, self.stride, self.use_bias, dtype=self.dtype, name="conv"
    )(x)
    return GroupNorm(self.dtype, name="norm")(x)


class ConvBlock(nn.Module):
  """Two 3x3 convolutions and a residual.

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C)."""
    y = nn.relu(ConvNorm(x.shape[-1], dtype=self.dtype, name="conv1")(x))
    return nn.relu(x + ConvNorm(x.shape[-1], dtype=self.dtype, name="conv2")(y))


class ELFDecoder(nn.Module):
  """Early-focus decoder (section 4.2): convolutions on fine maps, attention on coarse ones.

  Top down it is `Z_i = blocks(project(C_i) + down(Z_(i-1)))` over strides 4 to 32, and back up
  `U_i = relu(norm(conv(Z_i + up(U_(i+1)))))`. The sound enters
  only through the attention blocks.

  Attributes:
    stage_types: of the four stages from stride 4 to 32, "conv" or "attn" each.
    depths: blocks of each.
    widths: channels of each, multiples of 32.
    heads: of the attention.
    hidden: channels inside the feed-forward layers.
    dropout: rate in the transformer blocks.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation.
  """

  stage_types: tuple[str, ...]
  depths: tuple[int, ...]
  widths: tuple[int, ...]
  heads: int
  hidden: int
  dropout: float = 0.1
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, features: Sequence[jax.Array], queries: jax.Array, train: bool) -> jax.Array:
    """Fuses pictures and sound.

    Args:
      features: four maps (B, h, w, C) from fine to coarse.
      queries: (B, M, D), the keys and values of the attention.
      train: whether dropout is active.

    Returns:
      (B, h, w, widths[0]) on the finest grid.
    """
    conv_block, attn_block = ConvBlock, TransformerBlock
    if self.remat:
      conv_block = nn.remat(ConvBlock)
      attn_block = nn.remat(TransformerBlock, static_argnums=(4,))
    stages = []
    for stage, (kind, depth, width) in enumerate(
      zip(self.stage_types, self.depths, self.widths, strict=True)
    ):
      project = ConvNorm(width, 1, use_bias=True, dtype=self.dtype, name=f"project_{stage}")
      x = project(features[stage])
      if stages:
        x = x + ConvNorm(width, 3, 2, dtype=self.dtype, name=f"down_{stage}")(stages[-1])
      if kind == "conv":
        for index in range(depth):
          x = conv_block(self.dtype, name=f"stage_{stage}_block_{index}")(x)
      else:
        rows, cols = x.shape[1:3]
        position = sine_position(rows, cols, width, normalize=False).reshape(-1, width)
        position = jnp.asarray(position, self.dtype)
        x = einops.rearrange(x, "b h w c -> b (h w) c")
        for index in range(depth):
          block = attn_block(
            self.heads, self.hidden, self.dropout, self.dtype, name=f"stage_{stage}_block_{index}"
          )
          x = block(x, position, queries, train)
        x = einops.rearrange(x, "b (h w) c -> b h w c", h=rows)
      stages.append(x)

    x = stages.pop()
    for stage in reversed(range(len(stages))):
      fine = stages[stage]
      if x.shape[-1] != fine.shape[-1]:
        x = Conv(fine.shape[-1], dtype=self.dtype, name=f"narrow_{stage}")(x)
      x = fine + resize_bilinear(x, fine.shape[1:3])
      x = nn.relu(ConvNorm(fine.shape[-1], dtype=self.dtype, name=f"up_{stage}")(x))
    return x


class EnlargedConv(nn.Module):
  """Bilinear resizing, then a 3x3 convolution with bias.

  Attributes:
    features: output channels.
    dtype: of the computation.
  """

  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """(B, h, w, C) -> (B, *size, features)."""
    shape = (3, 3, x.shape[-1], self.features)
    kernel = self.param("kernel", conv_init, shape, jnp.float32).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    x = x.astype(self.dtype)
    x = conv(x, kernel) if x.shape[1:3] == size else upsampled_conv(x, kernel, size)
    return x + bias.astype(self.dtype)


class MaskHead(nn.Module):
  """Logits per pixel from the fused features: convolve, enlarge, convolve, classify.

  Attributes:
    num_classes: output channels.
    widths: channels of the two convolutions.
    stride: of the grid on which the second one and the classifier work; 1 is that of the frames.
    dtype: of the computation.
  """

  num_classes: int
  widths: tuple[int, int] = (128, 32)
  stride: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """(B, h, w, C) -> float32 (B, *size, num_classes)."""
    grid = (-(-size[0] // self.stride), -(-size[1] // self.stride))
    x = Conv(self.widths[0], 3, use_bias=True, dtype=self.dtype, name="conv1")(x)
    x = nn.relu(EnlargedConv(self.widths[1], self.dtype, name="conv2")(x, grid))
    x = Conv(self.num_classes, dtype=self.dtype, name="classify")(x).astype(jnp.float32)
    return resize_bilinear(x, size)
