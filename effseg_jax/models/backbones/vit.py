"""The plain Vision Transformer (Dosovitskiy et al., ICLR 2021) that SETR, SegViT and EoMT share.

All blocks work on one grid of patches, at one width. Users differ in how positions are stored and
resized, in the tokens that stand before the patches, and in what is read at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.models.layers import DropPath, torch_bias_init
from effseg_jax.ops.attention import attention
from effseg_jax.ops.resize import bicubic_matrix, bilinear_matrix

Dtype = Any

EPSILON = 1e-6  # of every normalisation of a ViT

_RESIZES = {"bilinear": bilinear_matrix, "bicubic": bicubic_matrix}
_normal = nn.initializers.normal


class Initializers(NamedTuple):
  """Where libraries that train ViTs initialise differently; linear layers are normal(0.02).

  Attributes:
    patch: of the patch kernel.
    patch_bias: of its bias, given the kernel's fan-in.
    prefix: of class and register tokens.
    qkv: of the packed projection.
    mlp_bias: of the feed-forward layers' biases.
  """

  patch: Any
  patch_bias: Any
  prefix: Any
  qkv: Any
  mlp_bias: Any


def xavier_packed_init(
  key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32
) -> jax.Array:
  """Xavier's uniform, for a (C, 3, C) kernel seen as one matrix of C x 3 C."""
  limit = np.sqrt(6.0 / (shape[0] + shape[1] * shape[2]))
  return jax.random.uniform(key, shape, dtype, -limit, limit)


MMSEGMENTATION = Initializers(
  nn.initializers.he_normal((0, 1, 2)),
  lambda fan_in: nn.initializers.zeros,
  _normal(0.02),
  xavier_packed_init,
  _normal(1e-6),
)
TIMM = Initializers(
  nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", (0, 1, 2)),
  torch_bias_init,
  _normal(1e-6),
  _normal(0.02),
  nn.initializers.zeros,
)


def grid_of(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
  """Rows and columns of patches of an image whose sides are one or two numbers."""
  rows, cols = (image_size, image_size) if isinstance(image_size, int) else image_size
  return rows // patch_size, cols // patch_size


def resize_positions(
  table: Any, size: tuple[int, int], grid: tuple[int, int], method: str = "bilinear"
) -> Any:
  """Resizes position embeddings as PyTorch does, without antialiasing.

  Args:
    table: (1, rows * cols, C), row by row.
    size: its rows and columns.
    grid: rows and columns of the result.
    method: "bilinear" or "bicubic".

  Returns:
    (1, rows * cols, C).
  """
  if tuple(size) == tuple(grid):
    return table
  down, along = (
    jnp.asarray(_RESIZES[method](n, m), table.dtype) for n, m in zip(grid, size, strict=True)
  )
  table = table.reshape(1, *size, -1)
  precision = jax.lax.Precision.HIGHEST
  table = jnp.einsum("yr,xc,brcd->byxd", down, along, table, precision=precision)
  return table.reshape(1, grid[0] * grid[1], -1)


class PatchEmbed(nn.Module):
  """Linear embedding of patches that do not overlap.

  Attributes:
    features: output channels.
    patch_size: pixels along a patch's side.
    initializers: of the parameters.
    dtype: of the computation.
  """

  features: int
  patch_size: int = 16
  initializers: Initializers = TIMM
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """(B, h * p, w * p, D) -> (B, h, w, features)."""
    size = self.patch_size
    shape = (size, size, images.shape[-1], self.features)
    kernel = self.param("kernel", self.initializers.patch, shape, jnp.float32)
    bias_init = self.initializers.patch_bias(np.prod(shape[:-1]))
    bias = self.param("bias", bias_init, (self.features,), jnp.float32)
    x = einops.rearrange(
      images.astype(self.dtype), "b (i y) (j x) c -> b i j (y x c)", y=size, x=size
    )
    return x @ kernel.reshape(-1, self.features).astype(self.dtype) + bias.astype(self.dtype)


class SelfAttention(nn.Module):
  """Multi-head attention of tokens to tokens; queries, keys and values are one projection.

  Attributes:
    heads: of the attention.
    dropout: rate after the output layer.
    weight_dropout: rate of the attention's weights.
    qkv_init: initialiser of the packed kernel.
    dtype: of the computation; the softmax is float32.
  """

  heads: int
  dropout: float = 0.0
  weight_dropout: float = 0.0
  qkv_init: Any = TIMM.qkv
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool,
    memory: jax.Array | None = None,
    blocked: jax.Array | None = None,
  ) -> jax.Array:
    """Attends.

    Args:
      x: (B, N, C).
      train: whether dropout is that of training.
      memory: (B, S, C), the source of keys and values; by default x.
      blocked: bool (B, N, S), true where a token must not look.

    Returns:
      (B, N, C).
    """
    channels = x.shape[-1]
    # Queries, keys and values on an axis of their own: heads can then be sharded over devices.
    kernel = self.param("qkv_kernel", self.qkv_init, (channels, 3, channels), jnp.float32)
    bias = self.param("qkv_bias", nn.initializers.zeros, (3, channels), jnp.float32)
    kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
    if memory is None:
      query, key, value = jnp.moveaxis(jnp.einsum("bnc,csd->bnsd", x, kernel) + bias, 2, 0)
    else:
      query = x @ kernel[:, 0] + bias[0]
      packed = jnp.einsum("bnc,csd->bnsd", memory, kernel[:, 1:]) + bias[1:]
      key, value = jnp.moveaxis(packed, 2, 0)
    dropped = None
    if train and self.weight_dropout:
      dropped = self.weight_dropout, self.make_rng("dropout")
    mixed = attention(query, key, value, self.heads, blocked=blocked, dropout=dropped)
    mixed = nn.Dense(channels, kernel_init=_normal(0.02), dtype=self.dtype, name="out")(mixed)
    return nn.Dropout(self.dropout, deterministic=not train)(mixed)


class Block(nn.Module):
  """Attention and a feed-forward layer, each normalised first and added to what it was given.

  Attributes:
    heads: of the attention.
    mlp_ratio: hidden channels of the feed-forward layer per channel.
    layer_scale_init: initial factors of both branches' channels; None: there are none.
    drop_path: rate of the feed-forward branch (mmsegmentation's ViT drops no other).
    dropout: rate after the attention's output layer and both feed-forward layers.
    initializers: of the parameters.
    dtype: of the computation; statistics and softmax are float32.
  """

  heads: int
  mlp_ratio: float = 4
  layer_scale_init: float | None = None
  drop_path: float = 0.0
  dropout: float = 0.0
  initializers: Initializers = TIMM
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool,
    memory: jax.Array | None = None,
    blocked: jax.Array | None = None,
  ) -> jax.Array:
    """(B, N, C) -> (B, N, C); arguments as in `SelfAttention`, before they are normalised."""
    norm1, norm2 = (layer_norm(name, self.dtype) for name in ("norm1", "norm2"))
    attend = SelfAttention(
      self.heads,
      self.dropout,
      qkv_init=self.initializers.qkv,
      dtype=self.dtype,
      name="attention",
    )
    y = attend(norm1(x), train, None if memory is None else norm1(memory), blocked)
    x = x + self._scaled("scale1", y)
    y = self._dense("fc1", round(self.mlp_ratio * x.shape[-1]))(norm2(x))
    y = self._dropped(nn.gelu(y, approximate=False), train)
    y = self._scaled("scale2", self._dropped(self._dense("fc2", x.shape[-1])(y), train))
    return x + DropPath(self.drop_path, name="drop_path")(y, train)

  def _scaled(self, name: str, x: jax.Array) -> jax.Array:
    if self.layer_scale_init is None:
      return x
    init = nn.initializers.constant(self.layer_scale_init)
    return x * self.param(name, init, (x.shape[-1],), jnp.float32).astype(self.dtype)

  def _dense(self, name: str, features: int) -> nn.Dense:
    return nn.Dense(
      features,
      kernel_init=_normal(0.02),
      bias_init=self.initializers.mlp_bias,
      dtype=self.dtype,
      name=name,
    )

  def _dropped(self, x: jax.Array, train: bool) -> jax.Array:
    return nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x


class ViT(nn.Module):
  """A plain Vision Transformer, as the steps that its users put together.

  Attributes:
    embed_dim: C, channels of all tokens.
    depth: blocks.
    num_heads: of each block's attention.
    mlp_ratio: hidden channels of the feed-forward layers per channel.
    patch_size: pixels along a patch's side.
    image_size: sides of the images whose grid the position table has, or rows and columns.
    positions: how the table fits other grids: "bilinear", "bicubic", or "fixed": not at all.
    class_position: whether the class token has a position, the first of the table.
    num_registers: register tokens beside the class token (Darcet et al. 2024).
    layer_scale_init: see `Block`.
    final_norm: whether a normalisation follows the last block, see `normalized`.
    drop_path: rate of the last block; the others' grow linearly from 0.
    dropout: rate, see `Block`; also after adding positions.
    remat: compute each block again in the backward pass instead of keeping its activations.
    initializers: of the parameters.
    dtype: of the computation; parameters, statistics and softmax are float32.
  """

  embed_dim: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_ratio: float = 4
  patch_size: int = 16
  image_size: int | tuple[int, int] = 512
  positions: str = "bilinear"
  class_position: bool = True
  num_registers: int = 0
  layer_scale_init: float | None = None
  final_norm: bool = False
  drop_path: float = 0.0
  dropout: float = 0.0
  remat: bool = False
  initializers: Initializers = TIMM
  dtype: Dtype = jnp.float32

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of the position table."""
    return grid_of(self.image_size, self.patch_size)

  @property
  def num_prefix(self) -> int:
    """Tokens before the patches."""
    return 1 + self.num_registers

  def setup(self) -> None:
    """Declares the parts; parameters that no step uses exist all the same."""
    width, tokens = self.embed_dim, self.grid[0] * self.grid[1] + self.class_position
    self.patch_embed = PatchEmbed(width, self.patch_size, self.initializers, self.dtype)
    self.cls_token = self.param("cls_token", self.initializers.prefix, (1, 1, width), jnp.float32)
    if self.num_registers:
      shape = (1, self.num_registers, width)
      self.reg_token = self.param("reg_token", self.initializers.prefix, shape, jnp.float32)
    self.pos_embed = self.param("pos_embed", _normal(0.02), (1, tokens, width), jnp.float32)
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    self.block = [
      block(
        self.num_heads,
        self.mlp_ratio,
        self.layer_scale_init,
        float(rate),
        self.dropout,
        self.initializers,
        self.dtype,
      )
      for rate in np.linspace(0.0, self.drop_path, self.depth)
    ]
    if self.final_norm:
      self.norm = layer_norm(None, self.dtype)
    self.drop = nn.Dropout(self.dropout)

  def __call__(
    self,
    images: jax.Array,
    train: bool = False,
    *,
    out_layers: Sequence[int],
    class_token: bool = True,
    shrink_at: int | None = None,
  ) -> tuple[jax.Array, ...]:
    """Maps of the patches after some blocks, not normalised.

    Args:
      images: (B, H, W, D) float32, normalised.
      train: whether dropout and stochastic depth are those of training.
      out_layers: numbers of the blocks, from 0 on, rising.
      class_token: whether the class token goes through the blocks; it is in no output.
      shrink_at: number of the block that lets even rows and columns alone pass (SegViT's Shrunk):
        they attend to all patches, and later blocks process only them. None: there is none.

    Returns:
      (B, h, w, C) each; behind `shrink_at` with ceil(h / 2) rows and ceil(w / 2) columns.
    """
    tokens, grid = self.embed(images, train)
    prefix = self.num_prefix if class_token else 0
    tokens = tokens[:, self.num_prefix - prefix :]
    outputs = []
    for index in range(max(out_layers) + 1):
      memory = None
      if index == shrink_at:
        memory = tokens
        kept = as_map(tokens[:, prefix:], grid)[:, ::2, ::2]
        grid = kept.shape[1:3]
        kept = kept.reshape(kept.shape[0], -1, self.embed_dim)
        tokens = jnp.concatenate([tokens[:, :prefix], kept], axis=1)
      tokens = self.apply_block(index, tokens, train, memory)
      if index in out_layers:
        outputs.append(as_map(tokens[:, prefix:], grid))
    return tuple(outputs)

  def embed(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, tuple[int, int]]:
    """The tokens that enter the first block.

    Args:
      images: (B, H, W, D) float32, normalised; zeros fill up their last patches.
      train: whether dropout is that of training.

    Returns:
      The class token, registers and patches (B, 1 + R + h w, C), and the grid (h, w) of the latter.

    Raises:
      UserError: if the position table is fixed and the image has another size.
    """
    rows, cols = self.grid
    if self.positions == "fixed" and images.shape[1:3] != (
      rows * self.patch_size,
      cols * self.patch_size,
    ):
      raise UserError(
        f"images are {images.shape[1]}x{images.shape[2]}; this model takes image_size ="
        f" {rows * self.patch_size}x{cols * self.patch_size} alone: resize and pad to it, or create"
        " the model with another image_size."
      )
    padding = [(0, -side % self.patch_size) for side in images.shape[1:3]]
    patches = self.patch_embed(jnp.pad(images, ((0, 0), *padding, (0, 0))))
    grid = patches.shape[1:3]
    tokens = patches.reshape(patches.shape[0], -1, self.embed_dim)
    table = self.pos_embed[:, self.class_position :]
    if self.positions != "fixed":
      table = resize_positions(table, self.grid, grid, self.positions)
    prefix = self.cls_token
    if self.class_position:
      prefix = prefix + self.pos_embed[:, :1]
    if self.num_registers:
      prefix = jnp.concatenate([prefix, self.reg_token], axis=1)
    prefix = jnp.broadcast_to(prefix, (tokens.shape[0], *prefix.shape[1:]))
    tokens = jnp.concatenate([prefix.astype(self.dtype), tokens + table.astype(self.dtype)], axis=1)
    return self.drop(tokens, deterministic=not train), grid

  def apply_block(
    self,
    index: int,
    tokens: jax.Array,
    train: bool = False,
    memory: jax.Array | None = None,
    blocked: jax.Array | None = None,
  ) -> jax.Array:
    """Block number `index`, of any number of tokens (B, N, C) -> (B, N, C); see `Block`."""
    return self.block[index](tokens, train, memory, blocked)

  def normalized(self, tokens: jax.Array) -> jax.Array:
    """The final normalisation, (B, N, C) -> (B, N, C)."""
    return self.norm(tokens)


def layer_norm(name: str | None, dtype: Dtype, epsilon: float = EPSILON) -> nn.LayerNorm:
  """A normalisation of the channels; variance in two passes, statistics float32."""
  return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def as_map(tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """(B, h w, C) -> (B, h, w, C)."""
  return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


def check_fields(name: str, model: Any) -> None:
  """Raises `UserError` where a ViT's sizes do not go together.

  Args:
    name: of the model.
    model: with the fields of a `ViT`.
  """
  size, patch = model.image_size, model.patch_size
  sides = (size, size) if isinstance(size, int) else size
  if len(sides) != 2 or any(side <= 0 or side % patch for side in sides):
    raise UserError(
      f"{name}: image_size is {size}; expected a multiple of the patches' {patch} pixels, or rows"
      " and columns that are."
    )
  if model.embed_dim % model.num_heads:
    raise UserError(
      f"{name}: embed_dim is {model.embed_dim}; expected a multiple of num_heads,"
      f" {model.num_heads}."
    )


def check_out_layers(name: str, out_layers: Sequence[int], depth: int, count: int) -> None:
  """Raises `UserError` unless the blocks to be read exist, rising and in the right number."""
  rising = all(a < b for a, b in itertools.pairwise(out_layers))
  if len(out_layers) != count or not rising or out_layers[0] < 0 or out_layers[-1] >= depth:
    raise UserError(
      f"{name}: out_layers is {tuple(out_layers)}; expected {count} rising numbers of blocks, from"
      f" 0 to {depth - 1}."
    )
