"""Layers with PyTorch's conventions, shared by all models."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any


class BatchNorm(nn.Module):
  """Batch normalisation with PyTorch's running statistics.

  The batch is normalised with its biased variance, while the running variance takes the unbiased
  one; statistics are float32. Under jit a sharded batch gives the statistics of the global batch.

  Attributes:
    momentum: share of the new statistics in the running ones.
    epsilon: added to the variance.
    dtype: of the result.
  """

  momentum: float = 0.1
  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Normalises (..., C) over all axes but the last."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
    if not train:
      inverse = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
      offset = bias - running_mean.value * inverse
      return x.astype(self.dtype) * inverse.astype(self.dtype) + offset.astype(self.dtype)

    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axes)
    var = jnp.mean(jnp.square(x - mean), axes)
    if not self.is_initializing():
      count = x.size // channels
      unbiased = var * (count / max(count - 1, 1))
      running_mean.value += self.momentum * (mean - running_mean.value)
      running_var.value += self.momentum * (unbiased - running_var.value)
    inverse = scale * jax.lax.rsqrt(var + self.epsilon)
    return ((x - mean) * inverse + bias).astype(self.dtype)


class DropPath(nn.Module):
  """Drops a residual branch for whole examples (stochastic depth, Huang et al. 2016).

  Attributes:
    rate: probability of dropping; what is kept is divided by `1 - rate`.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Drops examples of (B, ...); needs the rng "drop_path" when training."""
    if not train or self.rate == 0.0:
      return x
    keep = 1.0 - self.rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
    return jnp.where(kept, x / keep, jnp.zeros_like(x))
