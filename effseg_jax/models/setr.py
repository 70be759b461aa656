"""SETR: Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers.

Zheng, Lu, Zhao et al., CVPR 2021 (arXiv 2012.15840). A plain ViT-L/16 and one of three decoders:
naive (one convolution), PUP (progressive upsampling) and MLA (multi-level feature aggregation). The
form is that of mmsegmentation, whose published weights have its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError, suggestion
from effseg_jax.models import build
from effseg_jax.models.backbones.vit import (
  MMSEGMENTATION,
  ViT,
  check_fields,
  check_out_layers,
  layer_norm,
)
from effseg_jax.models.layers import BatchNorm, Conv
from effseg_jax.ops.resize import resize_bilinear

Dtype = Any


class NormedConv(nn.Module):
  """Convolution without bias, batch normalisation and ReLU.

  Attributes:
    features: output channels.
    kernel_size: odd.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 3
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, features)."""
    x = Conv(self.features, self.kernel_size, dtype=self.dtype, name="conv")(x)
    return nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train))


def upsampled(x: jax.Array, factor: int) -> jax.Array:
  """(B, h, w, C) -> (B, h * factor, w * factor, C), bilinear, corners not aligned."""
  return resize_bilinear(x, (x.shape[1] * factor, x.shape[2] * factor))


def classifier(num_classes: int, dtype: Dtype) -> Conv:
  """The last layer of every head."""
  init = nn.initializers.normal(0.01)
  return Conv(num_classes, use_bias=True, kernel_init=init, dtype=dtype, name="classify")


class UpHead(nn.Module):
  """The decoders naive and PUP: convolutions, the map enlarged behind each (section 3.3).

  Attributes:
    num_classes: K.
    features: D, channels of the convolutions.
    convs: their number.
    kernel_size: of each.
    factor: by which each enlarges.
    dtype: of the computation; logits are float32.
  """

  num_classes: int
  features: int
  convs: int
  kernel_size: int
  factor: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, h, w, C) -> logits float32 (B, H, W, K), H = h * factor^convs."""
    x = layer_norm("norm", self.dtype)(x)
    for index in range(self.convs):
      conv = NormedConv(self.features, self.kernel_size, self.dtype, name=f"conv_{index}")
      x = upsampled(conv(x, train), self.factor)
    return classifier(self.num_classes, self.dtype)(x).astype(jnp.float32)


class AggregationNeck(nn.Module):
  """Multi-level aggregation: four outputs of the ViT, summed from the deepest to the earliest.

  Attributes:
    features: channels of the results.
    dtype: of the computation.
  """

  features: int = 256
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, outputs: Sequence[jax.Array], train: bool) -> list[jax.Array]:
    """Maps (B, h, w, C), the earliest first -> maps (B, h, w, features), the deepest first."""
    projected = []
    for index, x in enumerate(outputs):
      normalized = layer_norm(f"norm_{index}", self.dtype)(x)
      project = NormedConv(self.features, 1, self.dtype, name=f"project_{index}")
      projected.append(project(normalized, train))
    results, total = [], 0.0
    for index, x in enumerate(reversed(projected)):
      total = total + x
      extract = NormedConv(self.features, 3, self.dtype, name=f"extract_{index}")
      results.append(extract(total, train))
    return results


class AggregationHead(nn.Module):
  """Two convolutions of each aggregated map, enlarged four times and classified side by side.

  Attributes:
    num_classes: K.
    features: channels of each map.
    dtype: of the computation; logits are float32.
  """

  num_classes: int
  features: int = 128
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array], train: bool) -> jax.Array:
    """Four maps (B, h, w, C) -> logits float32 (B, 4 h, 4 w, K)."""
    enlarged = []
    for index, x in enumerate(maps):
      convs = [
        NormedConv(self.features, 3, self.dtype, name=f"conv_{index}_{layer}") for layer in range(2)
      ]
      enlarged.append(upsampled(convs[1](convs[0](x, train), train), 4))
    x = jnp.concatenate(enlarged, axis=-1)
    return classifier(self.num_classes, self.dtype)(x).astype(jnp.float32)


class LinearHead(nn.Module):
  """MLA's auxiliary head: a linear layer at every position.

  Attributes:
    num_classes: K.
    dtype: of the computation; logits are float32.
  """

  num_classes: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, h, w, C) -> logits float32 (B, h, w, K)."""
    del train
    return classifier(self.num_classes, self.dtype)(x).astype(jnp.float32)


class SETR(nn.Module):
  """SETR for semantic segmentation.

  Attributes:
    decoder: "naive", "pup" or "mla".
    embed_dim: C, channels of all tokens.
    depth: blocks.
    num_heads: of each block's attention.
    mlp_ratio: hidden channels of the feed-forward layers per channel.
    patch_size: pixels along a patch's side.
    image_size: sides of the images whose grid the position table has, or rows and columns; for
      other images it is resized bilinearly.
    out_layers: the four blocks, from 0 on, whose outputs are read.
    num_classes: K.
    in_channels: channels of the images.
    head_features: channels of the decoder naive or PUP.
    mla_features: channels of MLA's neck.
    mla_head_features: channels of each map in MLA's head.
    auxiliary: whether there are auxiliary heads for training.
    aux_convs: convolutions of each auxiliary head of naive and PUP.
    features_only: return the four outputs of the ViT.
    drop_path: stochastic-depth rate of the last block.
    dropout: rate in the ViT.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; parameters, statistics, softmax and logits are float32.
  """

  decoder: str
  embed_dim: int = 1024
  depth: int = 24
  num_heads: int = 16
  mlp_ratio: float = 4
  patch_size: int = 16
  image_size: int | tuple[int, int] = 512
  out_layers: tuple[int, ...] = (9, 14, 19, 23)
  num_classes: int = 150
  in_channels: int = 3
  head_features: int = 256
  mla_features: int = 256
  mla_head_features: int = 128
  auxiliary: bool = True
  aux_convs: int = 2
  features_only: bool = False
  drop_path: float = 0.0
  dropout: float = 0.0
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
      positions="bilinear",
      drop_path=self.drop_path,
      dropout=self.dropout,
      remat=self.remat,
      initializers=MMSEGMENTATION,
      dtype=self.dtype,
      name="backbone",
    )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False, with_aux: bool = False) -> Any:
    """Segments images.

    Args:
      images: (B, H, W, in_channels) float32, normalised; zeros fill up their last patches.
      train: whether batch statistics, dropout and stochastic depth are those of training.
      with_aux: whether the auxiliary heads are read; in training they always are.

    Returns:
      Logits float32 of the padded images: (B, 4 h, 4 w, K), h = ceil(H / 16), or of the decoder PUP
      (B, 16 h, 16 w, K). With auxiliary heads, a dictionary of `logits` and `aux`, the auxiliary
      logits, each at its own resolution. With `features_only`, four maps (B, h, w, C).

    Raises:
      UserError: if the images have another shape, or there are no auxiliary heads to be read.
    """
    if images.ndim != 4 or images.shape[-1] != self.in_channels:
      raise UserError(
        f"images are {images.shape}; expected (batch, rows, columns, {self.in_channels})."
      )
    if with_aux and not self.auxiliary:
      raise UserError("with_aux is True, and this model was created with auxiliary=False.")
    outputs = self.vit()(
      images, train, out_layers=self.out_layers, class_token=self.decoder != "mla"
    )
    if self.features_only:
      return outputs
    if self.decoder == "mla":
      outputs = AggregationNeck(self.mla_features, self.dtype, name="neck")(outputs, train)
      head = AggregationHead(self.num_classes, self.mla_head_features, self.dtype, name="head")
      logits, heads = head(outputs, train), outputs
    else:
      logits, heads = self._up_head("head", main=True)(outputs[-1], train), outputs[:-1]
    # Parameters exist from the start, whether or not the first call reads them.
    if not self.auxiliary or not (train or with_aux or self.is_initializing()):
      return logits
    aux = [self._auxiliary_head(i)(x, train) for i, x in enumerate(heads)]
    return {"logits": logits, "aux": aux} if train or with_aux else logits

  def _up_head(self, name: str, *, main: bool) -> UpHead:
    kernel_size, factor, convs = (1, 4, 1) if self.decoder == "naive" else (3, 2, 4)
    return UpHead(
      self.num_classes,
      self.head_features,
      convs if main else self.aux_convs,
      kernel_size,
      factor if main else 4,
      self.dtype,
      name=name,
    )

  def _auxiliary_head(self, index: int) -> nn.Module:
    name = f"auxiliary_{index}"
    if self.decoder == "mla":
      return LinearHead(self.num_classes, self.dtype, name=name)
    return self._up_head(name, main=False)


# Fields that a decoder does not read.
_FOREIGN = {
  "naive": ("mla_features", "mla_head_features"),
  "pup": ("mla_features", "mla_head_features"),
  "mla": ("head_features", "aux_convs"),
}


def create(name: str, **fields: Any) -> SETR:
  """Creates `setr_{naive,pup,mla}_l16`.

  Raises:
    UserError: for a field that the variant does not have, or sizes that do not go together.
  """
  decoder = name.split("_")[1]
  variant = {"decoder": decoder}
  if decoder == "mla":
    variant["out_layers"] = (5, 11, 17, 23)
  for key in (*_FOREIGN[decoder], "decoder"):
    if key in fields:
      known = [
        field
        for field in SETR.__dataclass_fields__
        if field not in (*_FOREIGN[decoder], "decoder", "parent", "name")
      ]
      raise UserError(
        f"{name} has no field {key!r}; its fields are {', '.join(known)}.{suggestion(key, known)}"
      )
  model = build(SETR, name, variant, fields)
  check_fields(name, model)
  check_out_layers(name, model.out_layers, model.depth, 4)
  return model
