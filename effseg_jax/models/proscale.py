"""PRO-SCALE: Progressive Token Length Scaling in Transformer Encoders for Segmentation.

Aich, Suh, Schulter, Chandraker, ICLR 2025 (arXiv 2404.14657). The pixel decoder of Mask2Former,
whose encoder begins with the coarsest tokens only and adds the finer ones stage by stage.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError, require_one_of
from effseg_jax.models.pixel_decoder import (
  EncoderLayer,
  Features,
  LevelInputs,
  MaskFeatures,
  flatten_map,
  reference_points,
  split_levels,
  xavier_init,
)
from effseg_jax.ops.resize import resize_bilinear

Dtype = Any

GATES = ("linear", "conv", "none")
LAYOUTS = ("released", "correct")


class TokenRecalibration(nn.Module):
  """Scales coarse tokens by gates that the finest level computes (TRC).

  The paper resizes the finest map to the coarse grid and lets each cell gate the token there:
  `token * sigmoid(T (w x + b))`. The released code reads its token buffers (B, N, C) as maps
  (B, C, H, W) without moving the axes, so the resize mixes positions with channels; released
  weights were trained with that. The two gates differ in the released layout only:

  * "linear": the resized buffer is read as tokens again, one gate per token;
  * "conv": it is read as a map; the gate of a cell scales the cell of the equally misread tokens.

  Attributes:
    gate: "linear" or "conv".
    layout: "released" or "correct".
    temperature: T, multiplies the logit of the gate.
  """

  gate: str = "linear"
  layout: str = "released"
  temperature: float = 0.1

  @nn.compact
  def __call__(self, coarse: jax.Array, finest: jax.Array) -> jax.Array:
    """Scales the tokens of a map.

    Args:
      coarse: (B, h, w, C).
      finest: (B, H, W, C), the guide.

    Returns:
      (B, h w, C), of the dtype of `coarse`; gates are computed in float32.
    """
    batch, rows, cols, channels = coarse.shape
    shape = (channels, 1) if self.gate == "linear" else (1, 1, channels, 1)
    kernel = self.param("kernel", xavier_init, shape, jnp.float32).reshape(channels)
    bias = self.param("bias", _bias_init, (1,), jnp.float32)
    finest = finest.astype(jnp.float32)
    tokens = flatten_map(coarse)
    if self.layout == "correct":
      guide = flatten_map(resize_bilinear(finest, (rows, cols)))
    else:
      misread = finest.reshape(batch * channels, *finest.shape[1:3], 1)
      guide = resize_bilinear(misread, (rows, cols))
      if self.gate == "conv":
        guide = guide.reshape(batch, channels, rows * cols)
        gates = nn.sigmoid(self.temperature * (jnp.einsum("bkn,k->bn", guide, kernel) + bias))
        misread = tokens.reshape(batch, channels, rows * cols)
        return (misread * gates[:, None].astype(coarse.dtype)).reshape(tokens.shape)
      guide = guide.reshape(batch, rows * cols, channels)
    gates = nn.sigmoid(self.temperature * (guide @ kernel + bias))
    return tokens * gates[..., None].astype(coarse.dtype)


def _bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
  """PyTorch's default for 256 inputs: uniform between -1/16 and 1/16."""
  return jax.random.uniform(key, shape, dtype, -1 / 16, 1 / 16)


class ProScalePixelDecoder(nn.Module):
  """PRO-SCALE's pixel decoder; the defaults are the released models.

  Attributes:
    layers: p1, p2, p3: encoder layers on the tokens of stride 32, of 32 and 16, and of all three. A
      stage without layers only adds the next level.
    trc_gate: of `TokenRecalibration`: "linear", "conv", or "none": tokens stay as they are.
    trc_layout: "released" or "correct".
    trc_temperature: multiplies the gates' logits.
    residual: add the recalibrated tokens after every layer of the first two stages.
    light_pixel_embedding: 3x3 max pooling in place of the 3x3 convolution at stride 4 (LPE).
    features: C, of tokens, memories and mask features.
    heads: of the attention.
    points: sampled per token, head and level.
    mlp_features: hidden channels of the encoder's feed-forward layers.
    remat: compute each encoder layer again in the backward pass instead of keeping its activations.
    dtype: of the computation; sampling, gates and norms' statistics are float32.
  """

  layers: tuple[int, int, int] = (3, 3, 3)
  trc_gate: str = "linear"
  trc_layout: str = "released"
  trc_temperature: float = 0.1
  residual: bool = False
  light_pixel_embedding: bool = True
  features: int = 256
  heads: int = 8
  points: int = 4
  mlp_features: int = 1024
  remat: bool = False
  dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    """Raises `UserError` for a value that is none of those above."""
    super().__post_init__()
    for field, known in (("trc_gate", GATES), ("trc_layout", LAYOUTS)):
      require_one_of(field, getattr(self, field), known)
    if len(self.layers) != 3 or min(self.layers) < 0:
      raise UserError(f"layers are {self.layers}; expected three numbers, 0 or more.")

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
    if self.trc_gate == "none":
      inputs = [flatten_map(x) for x in maps]
    else:
      recalibrate = TokenRecalibration(
        self.trc_gate, self.trc_layout, self.trc_temperature, name="recalibration"
      )
      inputs = [*(recalibrate(x, maps[-1]) for x in maps[:-1]), flatten_map(maps[-1])]

    layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
    tokens, index = inputs[0], 0
    for stage, depth in enumerate(self.layers, start=1):
      if stage > 1:
        tokens = jnp.concatenate([tokens, inputs[stage - 1]], axis=1)
      held = sizes[:stage]
      points = jnp.asarray(reference_points(held))
      position = jnp.concatenate(positions[:stage])
      skip = jnp.concatenate(inputs[:stage], axis=1) if self.residual and stage < 3 else None
      for _ in range(depth):
        tokens = layer(
          held, self.heads, self.points, self.mlp_features, self.dtype, name=f"layer_{index}"
        )(tokens, position, points)
        tokens = tokens if skip is None else tokens + skip
        index += 1
    memories = split_levels(tokens, sizes)
    mask_features = MaskFeatures(
      self.features, self.light_pixel_embedding, self.dtype, name="output"
    )
    return mask_features(features["res2"], memories[-1]), memories
