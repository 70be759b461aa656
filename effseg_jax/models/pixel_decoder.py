"""Mask2Former's pixel decoder: deformable attention over three levels, then one FPN step.

Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, CVPR 2022
(arXiv 2112.01527), section 3.2.3; the attention is Deformable DETR's (arXiv 2010.04159). Levels are
ordered from low to high resolution: strides 32, 16, 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.models.layers import Conv, GroupNorm
from effseg_jax.ops.deformable import deformable_attention
from effseg_jax.ops.pool import max_pool
from effseg_jax.ops.position import sine_position
from effseg_jax.ops.resize import resize_bilinear

Dtype = Any
Features = Mapping[str, jax.Array]
Sizes = tuple[tuple[int, int], ...]

LEVELS = ("res5", "res4", "res3")

xavier_init = nn.initializers.xavier_uniform()
# PyTorch's kaiming_uniform with a = 1, which detectron2 calls c2_xavier_fill.
fan_in_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class QueriesLastDense(nn.Module):
  """Linear layer in float32 whose outputs come before the queries.

  Attributes:
    features: outputs.
    bias_init: initialiser of the bias; the kernel starts at zero.
  """

  features: int
  bias_init: Any = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, Q, C) -> float32 (B, features, Q)."""
    kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features))
    bias = self.param("bias", self.bias_init, (self.features,))
    return jnp.einsum("bqc,co->boq", x.astype(jnp.float32), kernel) + bias[:, None]


class DeformableAttention(nn.Module):
  """Multi-scale deformable attention with its four projections.

  Attributes:
    sizes: (rows, columns) of each level that is attended to.
    heads: M.
    points: P, sampled per query, head and level.
    dtype: of the projections; offsets, softmax and sampling are float32.
  """

  sizes: Sizes
  heads: int = 8
  points: int = 4
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    queries: jax.Array,
    reference_points: jax.Array,
    tokens: jax.Array,
  ) -> jax.Array:
    """Attends.

    Args:
      queries: (B, Q, C), with their position codes.
      reference_points: float32 (Q, L, 2) or (B, Q, L, 2), (x, y) from 0 to 1.
      tokens: (B, S, C), without codes; the levels one after the other, row by row.

    Returns:
      (B, Q, C).
    """
    batch, count, channels = queries.shape
    split = (self.heads, len(self.sizes), self.points)
    dense = lambda name: nn.Dense(  # noqa: E731
      channels, kernel_init=xavier_init, dtype=self.dtype, name=name
    )
    value = dense("value_proj")(tokens).reshape(batch, -1, self.heads, channels // self.heads)

    offsets = QueriesLastDense(2 * math.prod(split), self._spread, name="sampling_offsets")
    weights = QueriesLastDense(math.prod(split), name="attention_weights")(queries)
    weights = nn.softmax(weights.reshape(batch, self.heads, -1, count), axis=2)
    # Offsets are in pixels of the level they point into.
    scale = np.asarray([(cols, rows) for rows, cols in self.sizes], np.float32)
    offsets = offsets(queries).reshape(batch, *split, 2, count) / scale[:, None, :, None]
    locations = jnp.moveaxis(reference_points, -3, -1)[..., None, :, None, :, :] + offsets
    out = deformable_attention(value, self.sizes, locations, weights.reshape(batch, *split, count))
    return dense("output_proj")(out.reshape(queries.shape).astype(self.dtype))

  def _spread(self, key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """Each head looks in a direction of its own, its points 1, 2, ... pixels away."""
    del key
    angle = 2 * np.pi * np.arange(self.heads) / self.heads
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    distance = np.arange(1, self.points + 1)
    bias = direction[:, None, None] * distance[:, None]
    bias = np.broadcast_to(bias, (self.heads, len(self.sizes), self.points, 2))
    return jnp.asarray(bias.reshape(shape), dtype)


class EncoderLayer(nn.Module):
  """Deformable self-attention and a feed-forward layer, each with residual and norm after it.

  Attributes:
    sizes: (rows, columns) of each level among the tokens.
    heads: of the attention.
    points: sampled per token, head and level.
    mlp_features: hidden channels of the feed-forward layer.
    dtype: of the computation; see `DeformableAttention`.
  """

  sizes: Sizes
  heads: int = 8
  points: int = 4
  mlp_features: int = 1024
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, tokens: jax.Array, position: jax.Array, reference_points: jax.Array
  ) -> jax.Array:
    """Works on tokens.

    Args:
      tokens: (B, S, C), S the sum of the levels' areas.
      position: (S, C) or (B, S, C), added to the queries.
      reference_points: float32 (S, L, 2) or (B, S, L, 2).

    Returns:
      (B, S, C).
    """
    norm = lambda name: nn.LayerNorm(  # noqa: E731
      epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=name
    )
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=xavier_init, dtype=self.dtype, name=name
    )
    attention = DeformableAttention(
      self.sizes, self.heads, self.points, self.dtype, name="attention"
    )
    tokens = tokens.astype(self.dtype)
    queries = tokens + position.astype(self.dtype)
    tokens = norm("norm1")(tokens + attention(queries, reference_points, tokens))
    hidden = nn.relu(dense(self.mlp_features, "linear1")(tokens))
    return norm("norm2")(tokens + dense(tokens.shape[-1], "linear2")(hidden))


def reference_points(sizes: Sizes) -> np.ndarray:
  """The tokens' own places, the same on every level.

  Args:
    sizes: (rows, columns) of the levels, L of them with S cells together.

  Returns:
    float32 (S, L, 2): (x, y) of a cell's centre, from 0 to 1.
  """
  grids = []
  for rows, cols in sizes:
    y, x = np.meshgrid(
      (np.arange(rows) + 0.5) / rows, (np.arange(cols) + 0.5) / cols, indexing="ij"
    )
    grids.append(np.stack([x, y], axis=-1).reshape(-1, 2))
  points = np.concatenate(grids).astype(np.float32)
  return np.repeat(points[:, None], len(sizes), axis=1)


def flatten_map(x: jax.Array) -> jax.Array:
  """(B, H, W, C) -> tokens (B, H W, C), row by row."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def split_levels(tokens: jax.Array, sizes: Sizes) -> tuple[jax.Array, ...]:
  """Tokens (B, S, C) -> one map (B, rows, columns, C) per level."""
  ends = np.cumsum([rows * cols for rows, cols in sizes])[:-1]
  parts = jnp.split(tokens, ends, axis=1)
  return tuple(
    part.reshape(part.shape[0], *size, part.shape[-1])
    for part, size in zip(parts, sizes, strict=True)
  )


class Projection(nn.Module):
  """1x1 convolution of a backbone's feature, and group normalisation.

  Attributes:
    features: output channels.
    use_bias: whether the convolution has a bias.
    kernel_init: initialiser of the kernel.
    dtype: of the computation.
  """

  features: int
  use_bias: bool
  kernel_init: Any
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, features)."""
    conv = Conv(
      self.features,
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      name="conv",
    )
    return GroupNorm(self.dtype, name="norm")(conv(x))


class LevelInputs(nn.Module):
  """The inputs of the encoder: projected levels and their position codes.

  Attributes:
    features: C.
    dtype: of the computation; codes are float32.
  """

  features: int = 256
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, features: Features) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Backbone features -> three maps (B, H, W, C), and the codes (H W, C) of each."""
    level_embed = self.param("level_embed", nn.initializers.normal(1.0), (3, self.features))
    maps, positions = [], []
    for level, name in enumerate(LEVELS):
      project = Projection(self.features, True, xavier_init, self.dtype, name=f"project_{level}")
      maps.append(project(features[name]))
      codes = sine_position(*maps[-1].shape[1:3], self.features)
      positions.append(codes.reshape(-1, self.features) + level_embed[level])
    return tuple(maps), tuple(positions)


class MaskFeatures(nn.Module):
  """The FPN step to stride 4, and the features that queries are compared with.

  Attributes:
    features: C.
    light: 3x3 max pooling after the sum instead of a 3x3 convolution (PRO-SCALE's light pixel
      embedding).
    dtype: of the computation.
  """

  features: int = 256
  light: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, res2: jax.Array, memory: jax.Array) -> jax.Array:
    """res2 (B, h, w, c) and the stride-8 memory (B, H, W, C) -> (B, h, w, C)."""
    adapter = Projection(self.features, False, fan_in_init, self.dtype, name="adapter")
    x = adapter(res2) + resize_bilinear(memory, res2.shape[1:3])
    if self.light:
      x = max_pool(x)
    else:
      x = Conv(self.features, 3, kernel_init=fan_in_init, dtype=self.dtype, name="conv")(x)
    x = nn.relu(GroupNorm(self.dtype, name="norm")(x))
    return Conv(
      self.features, use_bias=True, kernel_init=fan_in_init, dtype=self.dtype, name="project"
    )(x)


class Mask2FormerPixelDecoder(nn.Module):
  """Mask2Former's pixel decoder.

  Attributes:
    layers: of the encoder.
    features: C, of tokens, memories and mask features.
    heads: of the attention.
    points: sampled per token, head and level.
    mlp_features: hidden channels of the encoder's feed-forward layers.
    remat: compute each encoder layer again in the backward pass instead of keeping its activations.
    dtype: of the computation; sampling and norms' statistics are float32.
  """

  layers: int = 6
  features: int = 256
  heads: int = 8
  points: int = 4
  mlp_features: int = 1024
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, features: Features, train: bool
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Decodes a backbone's features.

    Args:
      features: "res2" to "res5", (B, H, W, c) at strides 4, 8, 16, 32.
      train: not used.

    Returns:
      Mask features (B, H/4, W/4, C), and the memories (B, h, w, C) at strides 32, 16, 8.
    """
    del train
    maps, positions = LevelInputs(self.features, self.dtype, name="inputs")(features)
    sizes = tuple(x.shape[1:3] for x in maps)
    tokens = jnp.concatenate([flatten_map(x) for x in maps], axis=1)
    position = jnp.concatenate(positions)
    points = jnp.asarray(reference_points(sizes))
    layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
    for index in range(self.layers):
      tokens = layer(
        sizes, self.heads, self.points, self.mlp_features, self.dtype, name=f"layer_{index}"
      )(tokens, position, points)
    memories = split_levels(tokens, sizes)
    mask_features = MaskFeatures(self.features, dtype=self.dtype, name="output")
    return mask_features(features["res2"], memories[-1]), memories
