"""Layers with PyTorch's conventions, shared by all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops import backend, fourier
from effseg_jax.ops.conv import conv, depthwise_conv, tensorflow_centre

Dtype = Any

GROUPS = 32  # of all group normalisations

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def depthwise_init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
  """Normal with the official variance `2 / (k k)`: fan-out over the groups, one channel each."""
  return jax.random.normal(key, shape, dtype) * np.sqrt(2.0 / (shape[0] * shape[1]))


# PyTorch's default for a linear layer, and for its bias: uniform within +-1 / sqrt(inputs).
torch_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Any:
  """The initialiser of a bias that PyTorch leaves at its default."""

  def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

  return init


class Conv(nn.Module):
  """Convolution; 1x1 as a matrix product.

  Attributes:
    features: output channels.
    kernel_size: odd.
    stride: along both axes.
    use_bias: whether a bias is added.
    kernel_init: initialiser of the kernel.
    tensorflow_padding: pad as TensorFlow does and not as PyTorch does; they differ with a stride.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  use_bias: bool = False
  kernel_init: Any = conv_init
  tensorflow_padding: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
    x = x.astype(self.dtype)
    if self.kernel_size == 1 and self.stride == 1:
      x = x @ kernel[0, 0]
    else:
      x = conv(x, kernel, self.stride, _first_window(self, x))
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
      x = x + bias.astype(self.dtype)
    return x


class DepthwiseConv(nn.Module):
  """Depthwise convolution.

  Attributes:
    kernel_size: odd.
    stride: along both axes.
    use_bias: whether a bias is added.
    kernel_init: initialiser of the kernel.
    formulation: of the convolution, see `ops.conv.depthwise_conv`; or "circular": borders wrap.
    tensorflow_padding: see `Conv`.
    kernel_init: initialiser of the kernel.
    dtype: of the computation.
  """

  kernel_size: int = 3
  stride: int = 1
  use_bias: bool = False
  kernel_init: Any = depthwise_init
  formulation: str = "auto"
  tensorflow_padding: bool = False
  kernel_init: Any = depthwise_init
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""
    channels = x.shape[-1]
    shape = (self.kernel_size, self.kernel_size, 1, channels)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
    x = x.astype(self.dtype)
    if self.formulation == "circular":
      x = fourier.depthwise_conv_circular(x, kernel)
    else:
      x = depthwise_conv(x, kernel, self.stride, self.formulation, _first_window(self, x))
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
      x = x + bias.astype(self.dtype)
    return x


def _first_window(layer: Conv | DepthwiseConv, x: jax.Array) -> tuple[int, int]:
  """The pixel on which a layer's first window is centred."""
  if not layer.tensorflow_padding:
    return 0, 0
  return tensorflow_centre(x.shape[1:3], layer.kernel_size, layer.stride)


class DepthwiseKernel(nn.Module):
  """The parameters of a `DepthwiseConv` with bias, for whoever convolves with several at once.

  Attributes:
    kernel_size: odd.
    channels: of the input.
    dtype: of the computation.
  """

  kernel_size: int
  channels: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    """Kernel (k, k, 1, C) and bias (C,)."""
    shape = (self.kernel_size, self.kernel_size, 1, self.channels)
    kernel = self.param("kernel", depthwise_init, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
    return kernel.astype(self.dtype), bias.astype(self.dtype)


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


class GroupNorm(nn.Module):
  """Normalisation of 32 groups of channels, eps 1e-5; variance in two passes.

  `nn.GroupNorm` is four times slower on the CPU: here sums per channel come first.

  Attributes:
    dtype: of the result; statistics are float32.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises (B, H, W, C), C a multiple of 32."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    x = x.astype(jnp.float32)
    return backend.as_operator("group_norm", _group_norm, x, scale, bias).astype(self.dtype)


def _group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
  """`GroupNorm` of float32 (B, H, W, C) with its parameters (C,)."""

  def group_mean(x: jax.Array) -> jax.Array:
    means = jnp.mean(x, axis=(1, 2), keepdims=True)
    means = jnp.mean(means.reshape(*means.shape[:3], GROUPS, -1), axis=-1)
    return jnp.repeat(means, x.shape[-1] // GROUPS, axis=-1)

  mean = group_mean(x)
  inverse = scale * jax.lax.rsqrt(group_mean(jnp.square(x - mean)) + 1e-5)
  return x * inverse + (bias - mean * inverse)


class ConvNorm(nn.Module):
  """Convolution without bias, batch normalisation, and (by default) hardswish.

  Attributes:
    features: output channels.
    kernel_size: odd.
    stride: along both axes.
    activate: whether hardswish follows.
    dtype: of the computation.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  activate: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), features)."""
    x = Conv(self.features, self.kernel_size, self.stride, dtype=self.dtype, name="conv")(x)
    x = BatchNorm(dtype=self.dtype, name="norm")(x, train)
    return nn.hard_swish(x) if self.activate else x


class DropPath(nn.Module):
  """Drops a residual branch for whole examples (stochastic depth, Huang et al. 2016).

  Attributes:
    rate: probability of dropping; kept values are divided by `1 - rate`.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Drops examples of (B, ...); needs the rng "drop_path" when training."""
    if not train or self.rate == 0.0:
      return x
    if backend.platform() == "tpu":
      # Otherwise every consumer of the sum recomputes the end of the branch, and the branch's
      # gradients the scaled cotangent: a block of Swin then moves a fifth more bytes, and takes
      # three times as long to compile.
      x = jax.lax.optimization_barrier(x)
    keep = 1.0 - self.rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
    return jnp.where(kept, x / keep, jnp.zeros_like(x))
