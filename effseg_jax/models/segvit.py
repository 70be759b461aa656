"""SegViT: Semantic Segmentation with Plain Vision Transformers.

Zhang, Tian, Tang et al., NeurIPS 2022 (arXiv 2210.05844), and SegViTv2, IJCV 2023 (arXiv
2306.06289). Class queries look at outputs of a plain ViT; how similar they are to the patches *is*
the classes' masks (attention to mask). "Shrunk" lets a quarter of the patches through most of the
blocks. The second paper's Shrunk++ is left out: it was never published.
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
from effseg_jax.models.backbones.vit import (
  MMSEGMENTATION,
  SelfAttention,
  ViT,
  check_fields,
  check_out_layers,
  grid_of,
  layer_norm,
  xavier_packed_init,
)

Dtype = Any
Prediction = dict[str, jax.Array]

_EPSILON = 1e-5  # of the decoder's normalisations
_linear_init = nn.initializers.normal(0.02)
_query_init = nn.initializers.normal(1.0)


class MaskAttention(nn.Module):
  """Cross-attention that also returns what its softmax is made of (section 3.2).

  Attributes:
    heads: of the attention.
    dropout: rate of the attention's weights.
    dtype: of the computation; similarities and softmax are float32.
  """

  heads: int
  dropout: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, queries: jax.Array, memory: jax.Array, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """Attends.

    Args:
      queries: (B, K, d).
      memory: (B, N, d).
      train: whether weights are dropped.

    Returns:
      (B, K, d), and the similarities, their mean over the heads, float32 (B, K, N).
    """
    features = queries.shape[-1]
    dense = lambda name: nn.Dense(  # noqa: E731
      features, kernel_init=_linear_init, dtype=self.dtype, name=name
    )
    split = lambda x: einops.rearrange(x, "b n (h d) -> b h n d", h=self.heads)  # noqa: E731
    query = split(dense("query")(queries)) * (features // self.heads) ** -0.5
    key, value = split(dense("key")(memory)), split(dense("value")(memory))
    similarity = jnp.einsum("bhkd,bhnd->bhkn", query, key, preferred_element_type=jnp.float32)
    weights = nn.softmax(similarity, axis=-1).astype(self.dtype)
    weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
    mixed = einops.rearrange(jnp.einsum("bhkn,bhnd->bhkd", weights, value), "b h k d -> b k (h d)")
    return dense("out")(mixed), jnp.mean(similarity, axis=1)


class DecoderLayer(nn.Module):
  """Self-attention of the queries, attention to a memory, and a feed-forward layer; post-norm.

  Attributes:
    heads: of both attentions.
    to_masks: whether the second attention is a `MaskAttention`, otherwise a plain one.
    dropout: rate of both attentions' weights, of the hidden channels and of all branches.
    dtype: of the computation; statistics and softmax are float32.
  """

  heads: int
  to_masks: bool = True
  dropout: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, queries: jax.Array, memory: jax.Array, train: bool
  ) -> tuple[jax.Array, jax.Array | None]:
    """Works on the queries.

    Args:
      queries: (B, K, d).
      memory: (B, N, d).
      train: whether dropout is that of training.

    Returns:
      (B, K, d), and the similarities float32 (B, K, N), or None.
    """
    drop = nn.Dropout(self.dropout, deterministic=not train)
    norm = lambda name: layer_norm(name, self.dtype, _EPSILON)  # noqa: E731
    packed = lambda name: SelfAttention(  # noqa: E731
      self.heads, self.dropout, self.dropout, xavier_packed_init, self.dtype, name=name
    )
    queries = norm("norm1")(queries + packed("self_attention")(queries, train))
    similarity = None
    if self.to_masks:
      attend = MaskAttention(self.heads, self.dropout, self.dtype, name="cross_attention")
      found, similarity = attend(queries, memory, train)
      found = drop(found)
    else:
      found = packed("cross_attention")(queries, train, memory)
    queries = norm("norm2")(queries + found)
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=_linear_init, dtype=self.dtype, name=name
    )
    features = queries.shape[-1]
    hidden = drop(nn.relu(dense(4 * features, "linear1")(queries)))
    return norm("norm3")(queries + drop(dense(features, "linear2")(hidden))), similarity


class MaskDecoder(nn.Module):
  """Class queries that go through memories and become classes and masks: "attention to mask".

  Attributes:
    num_classes: K, also the number of queries.
    features: d.
    heads: of the attention.
    layers: per memory.
    every_layer: whether every layer is read by itself; otherwise the last one of each memory is,
      and masks add up over the memories.
    dropout: see `DecoderLayer`.
    dtype: of the computation; logits are float32.
  """

  num_classes: int
  features: int
  heads: int
  layers: int = 3
  every_layer: bool = False
  dropout: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, memories: Sequence[jax.Array], grid: tuple[int, int], train: bool
  ) -> list[Prediction]:
    """Decodes.

    Args:
      memories: (B, h w, d) each, in the order in which they are read.
      grid: (h, w).
      train: whether dropout is that of training.

    Returns:
      Predictions, first to last: `class_logits` float32 (B, K, K + 1), the last being "no object",
      and `mask_logits` float32 (B, K, h, w).
    """
    shape = (self.num_classes, self.features)
    queries = self.param("queries", _query_init, shape, jnp.float32).astype(self.dtype)
    queries = jnp.broadcast_to(queries, (memories[0].shape[0], *shape))
    classify = nn.Dense(
      self.num_classes + 1, kernel_init=_linear_init, dtype=self.dtype, name="classify"
    )
    predictions, total = [], 0.0
    for stage, memory in enumerate(memories, start=1):
      for index in range(self.layers):
        layer = DecoderLayer(
          self.heads,
          dropout=self.dropout,
          dtype=self.dtype,
          name=f"stage_{stage}_layer_{index}",
        )
        queries, masks = layer(queries, memory, train)
        if not self.every_layer and index < self.layers - 1:
          continue
        total = masks if self.every_layer else total + masks
        predictions.append(
          {
            "class_logits": classify(queries).astype(jnp.float32),
            "mask_logits": total.reshape(*total.shape[:2], *grid),
          }
        )
    return predictions


class GridUpsampler(nn.Module):
  """One learned query per patch collects features from two memories: Shrunk's full grid.

  Attributes:
    grid: rows and columns of the queries.
    features: d.
    heads: of the attention.
    layers: per memory.
    dropout: see `DecoderLayer`.
    dtype: of the computation.
  """

  grid: tuple[int, int]
  features: int
  heads: int
  layers: int = 3
  dropout: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, memories: Sequence[jax.Array], train: bool) -> jax.Array:
    """Memories (B, N, d), the earliest first -> (B, rows * columns, d)."""
    shape = (self.grid[0] * self.grid[1], self.features)
    queries = self.param("queries", _query_init, shape, jnp.float32).astype(self.dtype)
    queries = jnp.broadcast_to(queries, (memories[0].shape[0], *shape))
    for stage, memory in enumerate(memories, start=1):
      for index in range(self.layers):
        name = f"stage_{stage}_layer_{index}"
        layer = DecoderLayer(self.heads, False, self.dropout, self.dtype, name=name)
        queries, _ = layer(queries, memory, train)
    return queries


class SegViT(nn.Module):
  """SegViT for semantic segmentation.

  Attributes:
    embed_dim: C, channels of the ViT's tokens.
    depth: blocks.
    num_heads: of each block's attention.
    out_layers: blocks, from 0 on, whose outputs are read; two with `shrink_at`.
    decoder_features: d, channels of the queries.
    decoder_heads: of the decoder's attention.
    decoder_layers: of the decoder per output.
    mlp_ratio: hidden channels of the ViT's feed-forward layers per channel.
    patch_size: pixels along a patch's side.
    image_size: sides of the images whose grid the position table has, or rows and columns; for
      other images it is resized bicubically. With `shrink_at` there are no other images.
    shrink_at: number of the block that lets a quarter of the patches pass; None: there is none.
    num_classes: K.
    in_channels: channels of the images.
    features_only: return the ViT's outputs.
    drop_path: stochastic-depth rate of the last block.
    dropout: rate in the decoder.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters, statistics, softmax and logits are float32.
  """

  embed_dim: int
  depth: int
  num_heads: int
  out_layers: tuple[int, ...]
  decoder_features: int
  decoder_heads: int
  decoder_layers: int = 3
  mlp_ratio: float = 4
  patch_size: int = 16
  image_size: int | tuple[int, int] = 640
  shrink_at: int | None = None
  num_classes: int = 150
  in_channels: int = 3
  features_only: bool = False
  drop_path: float = 0.0
  dropout: float = 0.1
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.nowrap
  def vit(self) -> ViT:
    """The backbone."""
    return ViT(
      self.embed_dim,
      self.depth,
      self.num_heads,
      self.mlp_ratio,
      self.patch_size,
      self.image_size,
      positions="bicubic",
      drop_path=self.drop_path,
      remat=self.remat,
      initializers=MMSEGMENTATION,
      dtype=self.dtype,
      name="backbone",
    )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Segments images.

    Args:
      images: (B, H, W, in_channels) float32, normalised; zeros fill up their last patches.
      train: whether dropout and stochastic depth are those of training.

    Returns:
      `class_logits` float32 (B, K, K + 1), the last class being "no object"; `mask_logits` float32
      (B, K, ceil(H / 16), ceil(W / 16)), query c being that of class c; `aux`: the predictions
      before these, first to last. With `features_only`, the ViT's maps (B, h, w, C).

    Raises:
      UserError: if the images have another shape, or a shrunk model another size.
    """
    if images.ndim != 4 or images.shape[-1] != self.in_channels:
      raise UserError(
        f"images are {images.shape}; expected (batch, rows, columns, {self.in_channels})."
      )
    rows, cols = (n * self.patch_size for n in grid_of(self.image_size, self.patch_size))
    if self.shrink_at is not None and not self.features_only and images.shape[1:3] != (rows, cols):
      raise UserError(
        f"images are {images.shape[1]}x{images.shape[2]}; the shrunk model takes image_size ="
        f" {rows}x{cols} alone: evaluate in windows of that size, or create it with another one."
      )
    outputs = self.vit()(
      images, train, out_layers=self.out_layers, class_token=False, shrink_at=self.shrink_at
    )
    if self.features_only:
      return outputs
    # The plain decoder begins with the deepest output, the shrunk one's upsampling with the first.
    ordered = outputs if self.shrink_at is not None else outputs[::-1]
    memories = [self._memory(stage, x) for stage, x in enumerate(ordered, start=1)]
    sizes = (self.decoder_features, self.decoder_heads, self.decoder_layers)
    grid = outputs[0].shape[1:3]
    if self.shrink_at is not None:
      upsample = GridUpsampler(grid, *sizes, self.dropout, self.dtype, name="upsampler")
      memories = [upsample(memories, train)]
    decoder = MaskDecoder(
      self.num_classes,
      *sizes,
      self.shrink_at is not None,
      self.dropout,
      self.dtype,
      name="decoder",
    )
    predictions = decoder(memories, grid, train)
    return {**predictions[-1], "aux": predictions[:-1]}

  def _memory(self, stage: int, x: jax.Array) -> jax.Array:
    """An output (B, h, w, C) as the decoder reads it, (B, h w, d)."""
    project = nn.Dense(
      self.decoder_features, kernel_init=_linear_init, dtype=self.dtype, name=f"project_{stage}"
    )
    x = project(x.reshape(x.shape[0], -1, x.shape[-1]))
    return layer_norm(f"project_norm_{stage}", self.dtype, _EPSILON)(x)


_LARGE = {
  "embed_dim": 1024,
  "depth": 24,
  "num_heads": 16,
  "decoder_features": 512,
  "decoder_heads": 16,
  "image_size": 640,
  "drop_path": 0.3,
}
_VARIANTS = {
  "segvit_b16": {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "decoder_features": 384,
    "decoder_heads": 12,
    "image_size": 512,
    "drop_path": 0.1,
    "out_layers": (5, 7, 11),
  },
  "segvit_l16": {**_LARGE, "out_layers": (7, 15, 23)},
  "segvit_shrunk_l16": {**_LARGE, "out_layers": (7, 23), "shrink_at": 8},
}


def create(name: str, **fields: Any) -> SegViT:
  """Creates `segvit_b16`, `segvit_l16` or `segvit_shrunk_l16`.

  Raises:
    UserError: for a field that the model does not have, or sizes that do not go together.
  """
  model = build(SegViT, name, _VARIANTS[name], fields)
  check_fields(name, model)
  shrunk = model.shrink_at is not None
  check_out_layers(name, model.out_layers, model.depth, 2 if shrunk else 3)
  if shrunk and not model.out_layers[0] < model.shrink_at <= model.out_layers[1]:
    raise UserError(
      f"{name}: shrink_at is {model.shrink_at}; expected a block behind the first of out_layers"
      f" {model.out_layers}, and not behind the second."
    )
  if model.decoder_features % model.decoder_heads:
    raise UserError(
      f"{name}: decoder_features is {model.decoder_features}; expected a multiple of decoder_heads,"
      f" {model.decoder_heads}."
    )
  return model
