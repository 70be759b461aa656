"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., ICCV 2021).

The form that detectors and segmenters use: any image size, no absolute position embedding, and a
normalisation of its own for each stage's output.
"""

from __future__ import annotations

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.models.layers import DropPath

Dtype = Any

PATCH = 4
MLP_RATIO = 4

# Added to the logits of pixel pairs that are adjacent only because the grid was rolled.
_ACROSS_BORDERS = -100.0

_init = nn.initializers.normal(0.02)


def relative_position_bias(table: jax.Array, window: int) -> jax.Array:
  """Spreads a table over the pairs of a window's pixels.

  The entry for a query at (y, x) and a key at (y', x') is `(y - y' + w - 1) (2 w - 1) + x - x' +
  w - 1`. A lookup per axis as a product with constants needs no gather, nor its gradient a scatter.

  Args:
    table: float32 ((2 w - 1)^2, heads).
    window: w.

  Returns:
    float32 (heads, w^2, w^2).
  """
  span = 2 * window - 1
  offset = np.arange(window)[:, None] - np.arange(window)[None, :] + window - 1
  lookup = jnp.asarray(offset[:, :, None] == np.arange(span), jnp.float32)
  bias = jnp.einsum(
    "yYr,xXc,rch->hyxYX",
    lookup,
    lookup,
    table.reshape(span, span, -1),
    precision=jax.lax.Precision.HIGHEST,
  )
  return bias.reshape(-1, window**2, window**2)


def shifted_window_bias(grid: tuple[int, int], window: int) -> jax.Array:
  """The mask between pixels that share a window only because of the cyclic shift.

  Args:
    grid: rows and columns of the rolled grid, multiples of the window.
    window: w; the shift is `w // 2`.

  Returns:
    float32 (windows, w^2, w^2): 0 for pixels of one region, -100 for others.
  """

  def regions(size: int) -> np.ndarray:
    """Regions along an axis, (windows, w): the last window has two of them."""
    index = np.arange(size)
    ids = (index >= size - window).astype(np.int32) + (index >= size - window // 2)
    return ids.reshape(-1, window)

  rows, cols = (jnp.asarray(regions(size)) for size in grid)
  ids = 3 * rows[:, None, :, None] + cols[None, :, None, :]
  ids = ids.reshape(-1, window**2)
  return jnp.where(ids[:, :, None] == ids[:, None, :], 0.0, _ACROSS_BORDERS)


class WindowAttention(nn.Module):
  """Self-attention within windows.

  Attributes:
    heads: of the attention.
    window: pixels along a window's side.
    shift: whether the windows are moved by half their side, by rolling the grid.
    dtype: of the computation; logits and softmax are float32.
  """

  heads: int
  window: int
  shift: bool
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C); H and W need not be multiples of the window."""
    batch, rows, cols, channels = x.shape
    window, half = self.window, self.window // 2
    padding = [-size % window for size in (rows, cols)]
    x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
    grid = x.shape[1:3]
    if self.shift:
      x = jnp.roll(x, (-half, -half), (1, 2))
    x = einops.rearrange(x, "b (i y) (j x) c -> (b i j) (y x) c", y=window, x=window)

    qkv = nn.Dense(3 * channels, kernel_init=_init, dtype=self.dtype, name="qkv")(x)
    query, key, value = einops.rearrange(qkv, "w n (s h d) -> s w h n d", s=3, h=self.heads)
    query = query * (channels // self.heads) ** -0.5
    logits = jnp.einsum("whnd,whmd->whnm", query, key, preferred_element_type=jnp.float32)
    table = self.param(
      "relative_position_bias", _init, ((2 * window - 1) ** 2, self.heads), jnp.float32
    )
    logits = logits + relative_position_bias(table, window)
    if self.shift:
      apart = shifted_window_bias(grid, window)[:, None]
      logits = logits.reshape(batch, -1, *logits.shape[1:]) + apart
      logits = logits.reshape(-1, *logits.shape[2:])
    weights = nn.softmax(logits, axis=-1).astype(self.dtype)
    x = jnp.einsum("whnm,whmd->whnd", weights, value)
    x = einops.rearrange(x, "w h n d -> w n (h d)")
    x = nn.Dense(channels, kernel_init=_init, dtype=self.dtype, name="proj")(x)

    x = einops.rearrange(
      x, "(b i j) (y x) c -> b (i y) (j x) c", b=batch, i=grid[0] // window, y=window
    )
    if self.shift:
      x = jnp.roll(x, (half, half), (1, 2))
    return x[:, :rows, :cols]


class Block(nn.Module):
  """Window attention and a feed-forward layer, each normalised first.

  Attributes:
    heads: of the attention.
    window: pixels along a window's side.
    shift: whether the windows are shifted.
    drop_path: rate of both residual branches.
    dtype: of the computation; statistics and softmax are float32.
  """

  heads: int
  window: int
  shift: bool
  drop_path: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C)."""
    channels = x.shape[-1]
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=_init, dtype=self.dtype, name=name
    )
    attention = WindowAttention(self.heads, self.window, self.shift, self.dtype, name="attention")
    y = attention(_layer_norm("norm1", self.dtype)(x))
    x = x + DropPath(self.drop_path, name="drop_path1")(y, train)
    y = dense(MLP_RATIO * channels, "fc1")(_layer_norm("norm2", self.dtype)(x))
    y = dense(channels, "fc2")(nn.gelu(y, approximate=False))
    return x + DropPath(self.drop_path, name="drop_path2")(y, train)


class PatchEmbed(nn.Module):
  """Linear embedding of patches of 4x4 pixels, and its normalisation.

  Attributes:
    features: output channels.
    dtype: of the computation.
  """

  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / 4), ceil(W / 4), features)."""
    shape = (PATCH, PATCH, images.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    x = _pad_to(images, PATCH).astype(self.dtype)
    # Patches do not overlap: the convolution is one product.
    x = einops.rearrange(x, "b (i y) (j x) c -> b i j (y x c)", y=PATCH, x=PATCH)
    x = x @ kernel.reshape(-1, self.features).astype(self.dtype) + bias.astype(self.dtype)
    return _layer_norm("norm", self.dtype)(x)


class PatchMerging(nn.Module):
  """Halves the resolution: concatenates 2x2 pixels, normalises, projects to twice the channels.

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)."""
    channels = x.shape[-1]
    # Down a column first, then the next column.
    x = einops.rearrange(_pad_to(x, 2), "b (i y) (j x) c -> b i j (x y c)", y=2, x=2)
    x = _layer_norm("norm", self.dtype)(x)
    return nn.Dense(
      2 * channels, use_bias=False, kernel_init=_init, dtype=self.dtype, name="reduce"
    )(x)


class Swin(nn.Module):
  """The four stages of a Swin Transformer; the defaults are Swin-T.

  Attributes:
    features: channels of the first stage; each further one has twice as many.
    depths: blocks of each stage.
    heads: of each stage's attention.
    window: pixels along a window's side.
    drop_path: rate of the last block; the others' grow linearly from 0.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters, statistics and softmax are float32.
  """

  features: int = 96
  depths: tuple[int, int, int, int] = (2, 2, 6, 2)
  heads: tuple[int, int, int, int] = (3, 6, 12, 24)
  window: int = 7
  drop_path: float = 0.3
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
    """Computes features.

    Args:
      images: (B, H, W, C) float32, normalised, of any size.
      train: whether residual branches are dropped; needs the rng "drop_path".

    Returns:
      `res2`, `res3`, `res4`, `res5`: (B, ceil(H / s), ceil(W / s), D) at strides s of 4, 8, 16, 32;
      D is `features` and 2, 4, 8 times as much.
    """
    rates = np.split(
      np.linspace(0.0, self.drop_path, sum(self.depths)), np.cumsum(self.depths)[:-1]
    )
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    x = PatchEmbed(self.features, self.dtype, name="patch_embed")(images)
    outputs = {}
    for stage, (heads, stage_rates) in enumerate(zip(self.heads, rates, strict=True)):
      if stage:
        x = PatchMerging(self.dtype, name=f"merge_{stage - 1}")(x)
      for index, rate in enumerate(stage_rates):
        x = block(
          heads,
          self.window,
          index % 2 == 1,
          float(rate),
          self.dtype,
          name=f"stage_{stage}_block_{index}",
        )(x, train)
      outputs[f"res{stage + 2}"] = _layer_norm(f"norm_{stage}", self.dtype)(x)
    return outputs


def _layer_norm(name: str, dtype: Dtype) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


def _pad_to(x: jax.Array, multiple: int) -> jax.Array:
  """Pads rows and columns with zeros, bottom and right."""
  rows, cols = (-size % multiple for size in x.shape[1:3])
  return jnp.pad(x, ((0, 0), (0, rows), (0, cols), (0, 0)))
