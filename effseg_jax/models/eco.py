"""ECO-M2F: Efficient Transformer Encoders for Mask2Former-style Models.

Yao, Aich, Suh, Roy-Chowdhury, Shelton, Chandraker, 2024 (arXiv 2404.15244). Mask2Former's pixel
decoder with a gate that predicts from an image's coarsest features after which encoder layer it
may stop. The encoder is trained so that every exit works (step A), its quality after each exit is
measured on the training images (step B), and the gate learns to choose from that (step C).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.core import DenyList

from effseg_jax.errors import UserError
from effseg_jax.models.pixel_decoder import (
  EncoderLayer,
  Features,
  LevelInputs,
  MaskFeatures,
  flatten_map,
  reference_points,
  split_levels,
)

Dtype = Any

FIRST_EXIT = 2  # the first two layers have no gate


class EcoPixelDecoder(nn.Module):
  """Mask2Former's pixel decoder with early exits.

  An image leaves the encoder after 2 to `layers` layers, as its gate decides. A layer that no image
  of the batch needs is not computed, so a batch of one costs what its exit costs. (The released
  code takes one exit for the whole batch, and is right for batches of one alone.)

  Attributes:
    layers: of the encoder, the number of the last exit.
    fixed_exit: all images leave after this many layers, regardless of the gate: to measure the
      exits (step B), and to count their cost.
    exit_weights: relative frequency of each exit in training (step A); empty:
      all alike. The paper weighs the losses of its exits, by numbers that it does not print.
    features: C, of tokens, memories and mask features.
    heads: of the attention.
    points: sampled per token, head and level.
    mlp_features: hidden channels of the encoder's feed-forward layers.
    remat: compute each encoder layer again in the backward pass instead of keeping its activations.
    dtype: of the computation; sampling, the gate and norms' statistics are float32.
  """

  layers: int = 6
  fixed_exit: int | None = None
  exit_weights: tuple[float, ...] = ()
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
      train: whether one exit is drawn for all images (from the generator "dropout"), unless it is
        fixed: every exit is trained, and the gate is not.

    Returns:
      Mask features (B, H/4, W/4, C), and the memories (B, h, w, C) at strides 32, 16, 8. The
      collection "intermediates" holds, if mutable, `gate_inputs` float32 (B, C), `gate_logits`
      float32 (B, layers - 1) and `exits` int32 (B,).

    Raises:
      UserError: if `fixed_exit` is no exit, or `exit_weights` has not one number for each.
    """
    exits = range(FIRST_EXIT, self.layers + 1)
    if self.fixed_exit is not None and self.fixed_exit not in exits:
      raise UserError(
        f"fixed_exit is {self.fixed_exit}; expected {exits.start} to {exits.stop - 1}, or None."
      )
    if self.exit_weights and len(self.exit_weights) != len(exits):
      raise UserError(
        f"exit_weights has {len(self.exit_weights)} numbers; expected one for each of the"
        f" {len(exits)} exits."
      )
    maps, positions = LevelInputs(self.features, self.dtype, name="inputs")(features)
    sizes = tuple(x.shape[1:3] for x in maps)
    tokens = jnp.concatenate([flatten_map(x) for x in maps], axis=1)
    position = jnp.concatenate(positions)
    points = jnp.asarray(reference_points(sizes))

    coarsest = jnp.mean(flatten_map(maps[0]).astype(jnp.float32), axis=1)
    gate_logits = nn.Dense(len(exits), name="gate")(coarsest)
    chosen = FIRST_EXIT + jnp.argmax(gate_logits, axis=-1)
    if train and self.fixed_exit is None and not self.is_initializing():
      odds = jnp.asarray(self.exit_weights or (1.0,) * len(exits))
      odds = odds / jnp.sum(odds)
      drawn = jax.random.choice(self.make_rng("dropout"), len(exits), p=odds)
      chosen = jnp.full_like(chosen, FIRST_EXIT + drawn)
    self.sow("intermediates", "gate_inputs", coarsest)
    self.sow("intermediates", "gate_logits", gate_logits)
    self.sow("intermediates", "exits", chosen)

    layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
    for index in range(self.layers):
      encode = layer(
        sizes, self.heads, self.points, self.mlp_features, self.dtype, name=f"layer_{index}"
      )
      if index < (self.fixed_exit or FIRST_EXIT) or self.is_initializing():
        tokens = encode(tokens, position, points)
      elif self.fixed_exit is None:
        goes_on = (chosen > index)[:, None, None]
        tokens = nn.cond(
          jnp.any(goes_on),
          lambda encode, x, goes_on=goes_on: jnp.where(goes_on, encode(x, position, points), x),
          lambda encode, x: x,
          encode,
          tokens,
          variables=DenyList("intermediates"),  # the branches would differ in what they hold of it
        )
    memories = split_levels(tokens, sizes)
    mask_features = MaskFeatures(self.features, dtype=self.dtype, name="output")
    return mask_features(features["res2"], memories[-1]), memories


def best_exits(quality: jax.Array, beta: float) -> jax.Array:
  """The exits that the gate should choose: quality against cost.

  `argmax_k (q_k - beta k)`, the paper's target.

  Args:
    quality: float (..., K), panoptic quality of an image after each exit, from 0 to 1.
    beta: cost of a layer in units of quality: 0.0005 and 0.02 for COCO, 0.003 and 0.01 for
      Cityscapes.

  Returns:
    int32 (...): index of the exit, 0 for the first one; the earliest of equals.
  """
  quality = jnp.asarray(quality, jnp.float32)
  cost = beta * jnp.arange(1, quality.shape[-1] + 1, dtype=jnp.float32)
  return jnp.argmax(quality - cost, axis=-1).astype(jnp.int32)


def gate_loss(gate_logits: jax.Array, quality: jax.Array, beta: float) -> jax.Array:
  """Cross-entropy of the gate with the best exits, the loss of step C.

  Args:
    gate_logits: (B, K).
    quality: (B, K), see `best_exits`.
    beta: see `best_exits`.

  Returns:
    float32 (B,).
  """
  targets = best_exits(quality, beta)
  return optax.softmax_cross_entropy_with_integer_labels(gate_logits.astype(jnp.float32), targets)
