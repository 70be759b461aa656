"""EoMT (Encoder-only Mask Transformer): Your ViT is Secretly an Image Segmentation Model.

Kerssies, Cavagnero, Hermans et al., CVPR 2025 (arXiv 2503.19108). A plain ViT whose last blocks
also see learned queries, which are read as classes and masks at the end: there is no pixel decoder
and no cross-attention. In training the queries look inside their own masks, and do so less and less
often: mask annealing.
"""

from __future__ import annotations

import math
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError
from effseg_jax.models import build
from effseg_jax.models.backbones.vit import ViT, as_map, check_fields, layer_norm
from effseg_jax.models.layers import DepthwiseConv, torch_bias_init, torch_linear_init
from effseg_jax.models.mask2former import resize_at_centres

Dtype = Any
Prediction = dict[str, jax.Array]

_uniform = nn.initializers.variance_scaling  # with 1 / 3: within +-1 / sqrt(inputs)


class DoublingConv(nn.Module):
  """A transposed convolution of 2x2 with stride 2: every pixel becomes four, by one product.

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, h, w, C) -> (B, 2 h, 2 w, C)."""
    channels = x.shape[-1]
    init = _uniform(1 / 3, "fan_in", "uniform", in_axis=(0, 1, 3), out_axis=2)
    kernel = self.param("kernel", init, (2, 2, channels, channels), jnp.float32)
    bias = self.param("bias", torch_bias_init(4 * channels), (channels,), jnp.float32)
    x = jnp.einsum("bhwc,ijcd->bhwijd", x.astype(self.dtype), kernel.astype(self.dtype))
    x = einops.rearrange(x, "b h w i j d -> b (h i) (w j) d")
    return x + bias.astype(self.dtype)


class ScaleBlock(nn.Module):
  """Doubles a map: transposed convolution, GELU, depthwise convolution, normalisation.

  Attributes:
    dtype: of the computation; statistics are float32.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, h, w, C) -> (B, 2 h, 2 w, C)."""
    x = nn.gelu(DoublingConv(self.dtype, name="conv1")(x), approximate=False)
    init = _uniform(1 / 3, "fan_in", "uniform", in_axis=(0, 1, 2))
    x = DepthwiseConv(kernel_init=init, dtype=self.dtype, name="conv2")(x)
    return layer_norm("norm", self.dtype)(x)


class Head(nn.Module):
  """Reads normalised tokens as classes and masks; one for all predictions (figure 2 of the paper).

  Attributes:
    num_classes: K, without the class "no object".
    scale_blocks: by how many doublings mask features are finer than patches.
    dtype: of the computation.
  """

  num_classes: int
  scale_blocks: int = 2
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, queries: jax.Array, patches: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Predicts.

    Args:
      queries: (B, Q, C).
      patches: (B, h, w, C).

    Returns:
      Class logits float32 (B, Q, K + 1), the last being "no object"; mask embeddings (B, Q, C) and
      mask features (B, H, W, C), whose products are the mask logits.
    """
    channels = queries.shape[-1]

    def dense(features: int, name: str) -> nn.Dense:
      return nn.Dense(
        features,
        kernel_init=torch_linear_init,
        bias_init=torch_bias_init(channels),
        dtype=self.dtype,
        name=name,
      )

    logits = dense(self.num_classes + 1, "classify")(queries).astype(jnp.float32)
    embedding = queries
    for index in range(2):
      embedding = nn.gelu(dense(channels, f"embed_{index}")(embedding), approximate=False)
    embedding = dense(channels, "embed_2")(embedding)
    for index in range(self.scale_blocks):
      patches = ScaleBlock(self.dtype, name=f"scale_{index}")(patches)
    return logits, embedding, patches


class EoMT(nn.Module):
  """A universal segmenter: panoptic, instance and semantic segmentation by one set of masks.

  Attributes:
    embed_dim: C, channels of all tokens.
    depth: blocks.
    num_heads: of each block's attention.
    mlp_ratio: hidden channels of the feed-forward layers per channel.
    patch_size: pixels along a patch's side.
    image_size: sides of the images, or rows and columns: multiples of the patch size.
    num_queries: Q.
    query_blocks: number of the last blocks that also process the queries (L2 in the paper).
    num_registers: register tokens beside the class token.
    layer_scale_init: initial factors of every branch; 1.0 is better for training from scratch.
    num_classes: K, without the class "no object".
    in_channels: channels of the images.
    features_only: return the normalised patches behind the last block, without queries.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters, statistics, softmax and logits are float32.
  """

  embed_dim: int
  depth: int
  num_heads: int
  query_blocks: int
  mlp_ratio: float = 4
  patch_size: int = 16
  image_size: int | tuple[int, int] = 640
  num_queries: int = 200
  num_registers: int = 4
  layer_scale_init: float = 1e-5
  num_classes: int = 133
  in_channels: int = 3
  features_only: bool = False
  remat: bool = False
  dtype: Dtype = jnp.float32

  @property
  def scale_blocks(self) -> int:
    """How often mask features double the grid of patches."""
    return max(1, int(math.log2(self.patch_size)) - 2)

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
      positions="fixed",
      class_position=False,
      num_registers=self.num_registers,
      layer_scale_init=self.layer_scale_init,
      final_norm=True,
      remat=self.remat,
      dtype=self.dtype,
      name="backbone",
    )

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False, mask_probs: jax.Array | None = None
  ) -> Any:
    """Segments images.

    Args:
      images: (B, H, W, in_channels) float32, normalised, of `image_size`.
      train: whether there are predictions before each of the last blocks, as in training.
      mask_probs: float (L2,) or (L2, B, Q), the probability with which a query looks inside its
        mask alone, in each of the last blocks. Where it is neither 0 nor 1, draws come from the
        rng "mask". By default 1 in training. Given at evaluation, masks and predictions are those
        of training.

    Returns:
      `class_logits` float32 (B, Q, K + 1), the last class being "no object"; `mask_logits` float32
      (B, Q, H / 4, W / 4); `aux`: the predictions before these, first to last, none at evaluation.
      With `features_only`, (B, H / 16, W / 16, C).

    Raises:
      UserError: if the images have another shape.
    """
    if images.ndim != 4 or images.shape[-1] != self.in_channels:
      raise UserError(
        f"images are {images.shape}; expected (batch, rows, columns, {self.in_channels})."
      )
    backbone = self.vit()
    tokens, grid = backbone.embed(images, train)
    prefix = backbone.num_prefix
    first = self.depth - self.query_blocks
    if self.features_only:
      for index in range(self.depth):
        tokens = backbone.apply_block(index, tokens, train)
      return as_map(backbone.normalized(tokens)[:, prefix:], grid)

    for index in range(first):
      tokens = backbone.apply_block(index, tokens, train)
    batch, shape = tokens.shape[0], (self.num_queries, self.embed_dim)
    queries = self.param("queries", nn.initializers.normal(1.0), shape, jnp.float32)
    queries = jnp.broadcast_to(queries.astype(self.dtype), (batch, *shape))
    tokens = jnp.concatenate([queries, tokens], axis=1)
    head = Head(self.num_classes, self.scale_blocks, self.dtype, name="head")

    def predict(tokens: jax.Array) -> tuple[Prediction, jax.Array, jax.Array]:
      tokens = backbone.normalized(tokens)
      patches = as_map(tokens[:, self.num_queries + prefix :], grid)
      class_logits, embedding, features = head(tokens[:, : self.num_queries], patches)
      mask_logits = jnp.einsum(
        "bqc,bhwc->bqhw", embedding, features, preferred_element_type=jnp.float32
      )
      return {"class_logits": class_logits, "mask_logits": mask_logits}, embedding, features

    if train and mask_probs is None:
      mask_probs = jnp.ones((self.query_blocks,), jnp.float32)
    if mask_probs is not None:
      draws = (self.query_blocks, batch, self.num_queries)
      masked = draw_masked(self.make_rng("mask"), mask_probs, draws)
    predictions = []
    for index in range(first, self.depth):
      blocked = None
      if mask_probs is not None:
        prediction, embedding, features = predict(tokens)
        predictions.append(prediction)
        outside = outside_mask(embedding, resize_at_centres(features, grid))
        outside &= masked[index - first][:, :, None]
        others = tokens.shape[1] - self.num_queries
        blocked = jnp.pad(outside, ((0, 0), (0, others), (tokens.shape[1] - outside.shape[2], 0)))
      tokens = backbone.apply_block(index, tokens, train, None, blocked)
    return {**predict(tokens)[0], "aux": predictions}


def draw_masked(rng: jax.Array, probs: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """Which queries are masked in each block (mask annealing, section 3.3 of the paper).

  Args:
    rng: key of the draws, one for each query.
    probs: float (L2,) or (L2, B, Q); 0 and 1 are certain.
    shape: (L2, B, Q).

  Returns:
    bool (L2, B, Q).
  """
  probs = jnp.asarray(probs, jnp.float32)
  if probs.ndim == 1:
    probs = probs[:, None, None]
  return jax.random.uniform(rng, shape) < jnp.broadcast_to(probs, shape)


def outside_mask(embedding: jax.Array, features: jax.Array) -> jax.Array:
  """Where masked queries must not look: their mask logits there are 0 or less.

  Unlike in Mask2Former a query whose mask is empty attends to no patch. The logits that are
  resized to the patches there are products with resized features here, as resizing is linear.

  Args:
    embedding: (B, Q, C), the queries' mask embeddings.
    features: (B, h, w, C), mask features at the patches.

  Returns:
    bool (B, Q, h w); no gradient flows through it.
  """
  embedding, features = jax.lax.stop_gradient((embedding, features))
  logits = jnp.einsum("bqc,bhwc->bqhw", embedding, features, preferred_element_type=jnp.float32)
  return (logits <= 0).reshape(*embedding.shape[:2], -1)


_VARIANTS = {
  "s": {"embed_dim": 384, "depth": 12, "num_heads": 6, "query_blocks": 3},
  "b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "query_blocks": 3},
  "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "query_blocks": 4},
}


def create(name: str, **fields: Any) -> EoMT:
  """Creates `eomt_vit_{s,b,l}`.

  Raises:
    UserError: for a field that the model does not have, or sizes that do not go together.
  """
  model = build(EoMT, name, _VARIANTS[name.removeprefix("eomt_vit_")], fields)
  check_fields(name, model)
  if not 0 < model.query_blocks <= model.depth:
    raise UserError(
      f"{name}: query_blocks is {model.query_blocks}; expected 1 to {model.depth}, the depth."
    )
  return model
