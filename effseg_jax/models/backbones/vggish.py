"""Audio backbones: log-mel patches of a second in, one embedding each out.

VGGish: CNN Architectures for Large-Scale Audio Classification (Hershey et al., ICASSP 2017), in the
form whose weights PyTorch users know (torchvggish). Beside it a small encoder that is trained with
the rest of a model.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError
from effseg_jax.models import build
from effseg_jax.models.layers import Conv, ConvNorm

Dtype = Any

PATCH = (96, 64)  # frames and mel bands of a patch

# Features of the convolutions; a pool follows each tuple.
_WIDTHS = ((64,), (128,), (256, 256), (512, 512))
_HIDDEN, EMBEDDING = 4096, 128


class VGGish(nn.Module):
  """VGGish without the 8-bit postprocessing, 72,141,184 parameters.

  Attributes:
    dtype: of the computation; parameters are float32.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, log_mel: jax.Array, train: bool = False) -> jax.Array:
    """Embeds patches.

    Args:
      log_mel: (N, 96, 64) from `effseg_jax.input_pipeline.audio.log_mel`.
      train: makes no difference: nothing in the network is random or keeps statistics.

    Returns:
      float32 (N, 128), not negative: the last layer is rectified, too.

    Raises:
      UserError: for patches of another shape.
    """
    del train
    _check_patches(log_mel)
    x = log_mel[..., None].astype(self.dtype)
    index = 0
    for widths in _WIDTHS:
      for features in widths:
        conv = Conv(features, 3, use_bias=True, dtype=self.dtype, name=f"conv_{index}")
        x = nn.relu(conv(x))
        index += 1
      x = _halved(x)
    # Rows, columns, channels: the official code transposes its own layout to this one.
    x = x.reshape(x.shape[0], -1)
    for index, features in enumerate((_HIDDEN, _HIDDEN, EMBEDDING)):
      x = nn.relu(nn.Dense(features, dtype=self.dtype, name=f"dense_{index}")(x))
    return x.astype(jnp.float32)


class SmallAudioEncoder(nn.Module):
  """Five strided convolutions, the mean over time, one linear layer.

  The bands stay apart until the linear layer, because pitch and timbre distinguish sounds, while
  their time within the second does not.

  Attributes:
    widths: features of the convolutions, each of which halves both axes.
    dtype: of the computation; parameters and statistics are float32.
  """

  widths: tuple[int, ...] = (32, 64, 96, 128, 192)
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, log_mel: jax.Array, train: bool = False) -> jax.Array:
    """Embeds patches.

    Args:
      log_mel: (N, 96, 64) from `effseg_jax.input_pipeline.audio.log_mel`.
      train: whether batch normalisation uses the batch's own statistics.

    Returns:
      float32 (N, 128).

    Raises:
      UserError: for patches of another shape.
    """
    _check_patches(log_mel)
    x = log_mel[..., None]
    for index, features in enumerate(self.widths):
      x = ConvNorm(features, 3, 2, dtype=self.dtype, name=f"conv_{index}")(x, train)
    x = jnp.mean(x, axis=1).reshape(x.shape[0], -1)
    return nn.Dense(EMBEDDING, dtype=self.dtype, name="dense")(x).astype(jnp.float32)


def create(name: str, **fields: Any) -> VGGish:
  """Creates `vggish`."""
  return build(VGGish, name, {}, fields)


def _halved(x: jax.Array) -> jax.Array:
  """Maxima over windows of 2x2: (N, H, W, C) -> (N, H / 2, W / 2, C).

  Without a reduction: XLA on the CPU fuses one with the convolutions and products around it into a
  kernel that is ten times slower than they are.
  """
  rows = jnp.maximum(x[:, ::2], x[:, 1::2])
  return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def _check_patches(log_mel: jax.Array) -> None:
  if log_mel.ndim != 3 or log_mel.shape[1:] != PATCH:
    raise UserError(
      f"log_mel is {log_mel.shape}; expected (patches, {PATCH[0]}, {PATCH[1]}) from"
      " input_pipeline.audio.log_mel."
    )
