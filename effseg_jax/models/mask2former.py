"""Mask2Former: Masked-attention Mask Transformer for Universal Image Segmentation.

Cheng, Misra, Schwing, Kirillov, Girdhar, CVPR 2022 (arXiv 2112.01527). A backbone, a pixel decoder,
and here the transformer decoder that turns queries into pairs of a class and a mask. PRO-SCALE and
ECO-M2F are the same model with another pixel decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError, suggestion
from effseg_jax.models.backbones.resnet import ResNet
from effseg_jax.models.backbones.swin import Swin
from effseg_jax.models.eco import EcoPixelDecoder
from effseg_jax.models.pixel_decoder import Mask2FormerPixelDecoder, flatten_map, xavier_init
from effseg_jax.models.proscale import ProScalePixelDecoder
from effseg_jax.ops.position import sine_position

Dtype = Any
Prediction = dict[str, jax.Array]

STRIDE = 32  # of the coarsest feature: images are padded to a multiple of it
LEVELS = 3

_embedding_init = nn.initializers.normal(1.0)
# PyTorch's default for a linear layer: uniform within +-1 / sqrt(inputs), its bias too.
_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Attention(nn.Module):
  """Multi-head attention; the projections of its inputs are one kernel, as PyTorch packs them.

  Attributes:
    heads: N.
    dtype: of the computation; logits and softmax are float32.
  """

  heads: int = 8
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    blocked: jax.Array | None = None,
  ) -> jax.Array:
    """Attends.

    Args:
      queries: (B, Q, C).
      keys: (B, S, C).
      values: (B, S, C).
      blocked: bool (B, Q, S), true where a query must not look; no row may be all true.

    Returns:
      (B, Q, C).
    """
    channels = queries.shape[-1]
    kernel = self.param("in_kernel", xavier_init, (channels, 3 * channels), jnp.float32)
    bias = self.param("in_bias", nn.initializers.zeros, (3 * channels,), jnp.float32)
    kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)

    def project(x: jax.Array, part: int) -> jax.Array:
      own = slice(part * channels, (part + 1) * channels)
      x = x.astype(self.dtype) @ kernel[:, own] + bias[own]
      return einops.rearrange(x, "b s (n d) -> b n s d", n=self.heads)

    query = project(queries, 0) * (channels // self.heads) ** -0.5
    key, value = project(keys, 1), project(values, 2)
    logits = jnp.einsum("bnqd,bnsd->bnqs", query, key, preferred_element_type=jnp.float32)
    if blocked is not None:
      logits = jnp.where(blocked[:, None], -jnp.inf, logits)
    weights = nn.softmax(logits, axis=-1).astype(self.dtype)
    mixed = jnp.einsum("bnqs,bnsd->bnqd", weights, value)
    mixed = einops.rearrange(mixed, "b n q d -> b q (n d)")
    return nn.Dense(channels, kernel_init=xavier_init, dtype=self.dtype, name="out")(mixed)


class DecoderLayer(nn.Module):
  """Masked attention to one level, self-attention of the queries, and a feed-forward layer.

  A residual and a normalisation follow each (section 3.2.1 and equation 2 of the paper).

  Attributes:
    heads: of both attentions.
    mlp_features: hidden channels of the feed-forward layer.
    dtype: of the computation; softmax and statistics are float32.
  """

  heads: int = 8
  mlp_features: int = 2048
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    queries: jax.Array,
    position: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    blocked: jax.Array,
  ) -> jax.Array:
    """Works on the queries.

    Args:
      queries: (B, Q, C).
      position: (Q, C), added to the queries wherever attention compares them.
      keys: (B, S, C), pixels of a level with their position codes.
      values: (B, S, C), the same without codes.
      blocked: bool (B, Q, S), pixels outside the query's mask.

    Returns:
      (B, Q, C).
    """
    norm = lambda name: _layer_norm(name, self.dtype)  # noqa: E731
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features,
      kernel_init=xavier_init,
      bias_init=nn.initializers.zeros,
      dtype=self.dtype,
      name=name,
    )
    position = position.astype(self.dtype)
    attend = Attention(self.heads, self.dtype, name="cross_attention")
    queries = norm("cross_norm")(queries + attend(queries + position, keys, values, blocked))
    attend = Attention(self.heads, self.dtype, name="self_attention")
    placed = queries + position
    queries = norm("self_norm")(queries + attend(placed, placed, queries))
    hidden = nn.relu(dense(self.mlp_features, "linear1")(queries))
    return norm("mlp_norm")(queries + dense(queries.shape[-1], "linear2")(hidden))


class PredictionHead(nn.Module):
  """Classes and mask embeddings of the queries; one for all layers.

  Attributes:
    num_classes: K, without the class "no object".
    dtype: of the computation.
  """

  num_classes: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, Q, C) -> class logits float32 (B, Q, K + 1) and mask embeddings (B, Q, C)."""
    channels = queries.shape[-1]

    def bias_init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
      limit = channels**-0.5
      return jax.random.uniform(key, shape, dtype, -limit, limit)

    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=_linear_init, bias_init=bias_init, dtype=self.dtype, name=name
    )
    x = _layer_norm("norm", self.dtype)(queries)
    logits = dense(self.num_classes + 1, "classify")(x).astype(jnp.float32)
    for index in range(2):
      x = nn.relu(dense(channels, f"embed_{index}")(x))
    return logits, dense(channels, "embed_2")(x)


class MaskedAttentionDecoder(nn.Module):
  """The transformer decoder: learned queries look at one level after the other, coarse to fine.

  Every layer's queries are read as classes and masks; a layer looks where the masks before it are
  (sections 3.2.1 and 3.2.2 of the paper).

  Attributes:
    num_classes: K, without the class "no object".
    num_queries: Q.
    layers: masked attention goes through the three levels again and again.
    features: C.
    heads: of the attention.
    mlp_features: hidden channels of the feed-forward layers.
    remat: compute each layer again in the backward pass instead of keeping its activations.
    dtype: of the computation; softmax, statistics and logits are float32.
  """

  num_classes: int = 133
  num_queries: int = 100
  layers: int = 9
  features: int = 256
  heads: int = 8
  mlp_features: int = 2048
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, mask_features: jax.Array, memories: Sequence[jax.Array]) -> list[Prediction]:
    """Decodes.

    Args:
      mask_features: (B, H, W, C), at stride 4.
      memories: three maps (B, h, w, C), at strides 32, 16 and 8; H and W are multiples of theirs.

    Returns:
      A prediction of the queries as they are learned, and one after each layer: `class_logits`
      float32 (B, Q, K + 1), the last being "no object", and `mask_logits` float32 (B, Q, H, W).
    """
    batch = mask_features.shape[0]
    shape = (self.num_queries, self.features)
    queries = self.param("query_features", _embedding_init, shape, jnp.float32)
    position = self.param("query_positions", _embedding_init, shape, jnp.float32)
    queries = jnp.broadcast_to(queries.astype(self.dtype), (batch, *shape))
    level_embed = self.param("level_embed", _embedding_init, (LEVELS, self.features), jnp.float32)
    mask_features = mask_features.astype(self.dtype)

    keys, values, resized = [], [], []
    for level, memory in enumerate(memories):
      rows, cols = memory.shape[1:3]
      value = flatten_map(memory).astype(self.dtype) + level_embed[level].astype(self.dtype)
      codes = sine_position(rows, cols, self.features).reshape(-1, self.features)
      keys.append(value + codes.astype(self.dtype))
      values.append(value)
      resized.append(flatten_map(resize_at_centres(mask_features, (rows, cols))))

    head = PredictionHead(self.num_classes, self.dtype, name="head")
    layer = nn.remat(DecoderLayer) if self.remat else DecoderLayer
    predictions = []
    for index in range(self.layers + 1):
      class_logits, embedding = head(queries)
      mask_logits = jnp.einsum(
        "bqc,bhwc->bqhw", embedding, mask_features, preferred_element_type=jnp.float32
      )
      predictions.append({"class_logits": class_logits, "mask_logits": mask_logits})
      if index == self.layers:
        return predictions
      level = index % LEVELS
      blocked = outside_mask(embedding, resized[level])
      queries = layer(self.heads, self.mlp_features, self.dtype, name=f"layer_{index}")(
        queries, position, keys[level], values[level], blocked
      )
    return predictions


def outside_mask(embedding: jax.Array, features: jax.Array) -> jax.Array:
  """Where queries must not look: their mask logits there are below 0, half a probability.

  The official code resizes the mask logits; resizing is linear, so here the features are resized,
  once for all layers. Where only the last prediction is used, the compiler then drops the
  other layers' full-size masks. A query whose mask is empty may look everywhere.

  Args:
    embedding: (B, Q, C), the queries' mask embeddings.
    features: (B, S, C), mask features at the level's pixels.

  Returns:
    bool (B, Q, S); no gradient flows through it.
  """
  embedding, features = jax.lax.stop_gradient((embedding, features))
  logits = jnp.einsum("bqc,bsc->bqs", embedding, features, preferred_element_type=jnp.float32)
  blocked = logits < 0
  return blocked & ~jnp.all(blocked, axis=-1, keepdims=True)


def resize_at_centres(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Bilinear resize (not antialiased) to a grid that an even factor makes coarser.

  The centre of a coarse cell lies in the middle of four fine ones: it is their mean.

  Args:
    x: (B, H, W, C).
    size: (h, w), with H / h and W / w even.

  Returns:
    (B, h, w, C).
  """
  factors = [fine // coarse for fine, coarse in zip(x.shape[1:3], size, strict=True)]
  if any(f % 2 or f * n != fine for f, n, fine in zip(factors, size, x.shape[1:3], strict=True)):
    raise ValueError(f"a grid of {x.shape[1:3]} is not an even multiple of {size}")
  (above, left), (down, right) = ((f // 2 - 1 for f in factors), factors)
  rows = [x[:, above + i :: down].astype(jnp.float32) for i in range(2)]
  columns = [row[:, :, left + j :: right] for row in rows for j in range(2)]
  return (sum(columns) * 0.25).astype(x.dtype)


class Mask2Former(nn.Module):
  """A universal segmenter: panoptic, instance and semantic segmentation by one set of masks.

  Attributes:
    backbone: images (B, H, W, 3) -> `res2` to `res5`.
    pixel_decoder: these -> mask features at stride 4, and memories at strides 32, 16, 8.
    decoder: both -> predictions.
  """

  backbone: nn.Module
  pixel_decoder: nn.Module
  decoder: MaskedAttentionDecoder

  @property
  def num_classes(self) -> int:
    """Classes, without "no object"."""
    return self.decoder.num_classes

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> dict[str, Any]:
    """Segments images.

    Args:
      images: (B, H, W, 3) float32, normalised; padded inside to multiples of 32 with zeros, which
        are the mean colour.
      train: whether batch statistics and stochastic depth are those of training.

    Returns:
      `class_logits` float32 (B, Q, K + 1), the last class being "no object"; `mask_logits` float32
      (B, Q, ceil(H / 4), ceil(W / 4)); `aux`: the predictions before these, first to last.

    Raises:
      UserError: if the images have another shape.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
      raise UserError(f"images are {images.shape}; expected (batch, rows, columns, 3).")
    sizes = images.shape[1:3]
    padding = [(0, -size % STRIDE) for size in sizes]
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    features = self.backbone(images, train)
    mask_features, memories = self.pixel_decoder(features, train)
    predictions = self.decoder(mask_features, memories)
    rows, cols = (-(-size // 4) for size in sizes)
    for prediction in predictions:
      prediction["mask_logits"] = prediction["mask_logits"][:, :, :rows, :cols]
    return {**predictions[-1], "aux": predictions[:-1]}


_BACKBONES = {"r50": ResNet, "swin_tiny": Swin}
_PIXEL_DECODERS = {
  "mask2former": Mask2FormerPixelDecoder,
  "proscale": ProScalePixelDecoder,
  "eco_m2f": EcoPixelDecoder,
}

# Field of a model -> fields of its parts that it sets. What a part lacks is no field of the model.
_SHARED_FIELDS = {
  "num_classes": ("decoder.num_classes",),
  "num_queries": ("decoder.num_queries",),
  "features": ("pixel_decoder.features", "decoder.features"),
  "heads": ("pixel_decoder.heads", "decoder.heads"),
  "encoder_mlp_features": ("pixel_decoder.mlp_features",),
  "decoder_mlp_features": ("decoder.mlp_features",),
  "decoder_layers": ("decoder.layers",),
  "remat": ("backbone.remat", "pixel_decoder.remat", "decoder.remat"),
  "dtype": ("backbone.dtype", "pixel_decoder.dtype", "decoder.dtype"),
}
_BACKBONE_FIELDS = {
  "r50": {"depth": ("backbone.depth",), "norm": ("backbone.norm",)},
  "swin_tiny": {
    "backbone_features": ("backbone.features",),
    "backbone_depths": ("backbone.depths",),
    "backbone_heads": ("backbone.heads",),
    "window": ("backbone.window",),
    "drop_path": ("backbone.drop_path",),
  },
}
_PIXEL_DECODER_FIELDS = {
  "mask2former": {"encoder_layers": ("pixel_decoder.layers",)},
  "proscale": {
    "proscale_layers": ("pixel_decoder.layers",),
    "trc_gate": ("pixel_decoder.trc_gate",),
    "trc_layout": ("pixel_decoder.trc_layout",),
    "trc_temperature": ("pixel_decoder.trc_temperature",),
    "residual": ("pixel_decoder.residual",),
    "light_pixel_embedding": ("pixel_decoder.light_pixel_embedding",),
  },
  "eco_m2f": {
    "encoder_layers": ("pixel_decoder.layers",),
    "fixed_exit": ("pixel_decoder.fixed_exit",),
    "exit_weights": ("pixel_decoder.exit_weights",),
  },
}


def create(name: str, **fields: Any) -> Mask2Former:
  """Creates `{mask2former,proscale,eco_m2f}_{r50,swin_tiny}`.

  Args:
    name: the pixel decoder and the backbone.
    **fields: over those of the named variant: `num_classes`, `num_queries`, `features`, `heads`,
      `encoder_mlp_features`, `decoder_mlp_features`, `decoder_layers`, `remat`, `dtype`;
      `depth`, `norm` of a ResNet; `backbone_features`, `backbone_depths`, `backbone_heads`,
      `window`, `drop_path` of a Swin Transformer; `encoder_layers` of Mask2Former and ECO-M2F;
      `proscale_layers`, `trc_gate`, `trc_layout`, `trc_temperature`, `residual`,
      `light_pixel_embedding` of PRO-SCALE; `fixed_exit`, `exit_weights` of ECO-M2F. Their
      meaning is that of the part's own field.

  Raises:
    UserError: for a field that this variant does not have.
  """
  pixel_decoder = next(kind for kind in _PIXEL_DECODERS if name.startswith(f"{kind}_"))
  backbone = name.removeprefix(f"{pixel_decoder}_")
  known = {**_SHARED_FIELDS, **_BACKBONE_FIELDS[backbone], **_PIXEL_DECODER_FIELDS[pixel_decoder]}
  parts: dict[str, dict[str, Any]] = {"backbone": {}, "pixel_decoder": {}, "decoder": {}}
  for key, value in fields.items():
    if key not in known:
      raise UserError(
        f"{name} has no field {key!r}; its fields are {', '.join(known)}.{suggestion(key, known)}"
      )
    for target in known[key]:
      part, _, field = target.partition(".")
      # Modules must be hashable, and a field read from JSON may be a list.
      parts[part][field] = tuple(value) if isinstance(value, list) else value
  return Mask2Former(
    backbone=_BACKBONES[backbone](**parts["backbone"]),
    pixel_decoder=_PIXEL_DECODERS[pixel_decoder](**parts["pixel_decoder"]),
    decoder=MaskedAttentionDecoder(**parts["decoder"]),
  )


def _layer_norm(name: str, dtype: Dtype) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)
