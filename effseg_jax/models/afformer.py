"""AFFormer: Head-Free Lightweight Semantic Segmentation with Linear Transformer.

Dong, Wang, Wang, AAAI 2023 (arXiv 2301.04648). The defaults are the released model: the same
function of the same weights. `Form` has what the paper describes otherwise, and the filters that
work in the frequency domain.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError, require_one_of
from effseg_jax.models import build
from effseg_jax.models.layers import (
  BatchNorm,
  Conv,
  ConvNorm,
  DepthwiseConv,
  DepthwiseKernel,
  DropPath,
  GroupNorm,
  conv_init,
)
from effseg_jax.models.ssa_seg import TEACHERS, SSAHead
from effseg_jax.ops import backend, fourier
from effseg_jax.ops.conv import depthwise_conv_by_groups, windows
from effseg_jax.ops.pool import adaptive_average_matrix
from effseg_jax.ops.resize import bilinear_matrix, resize_bilinear

Dtype = Any

HEADS = 8
HIGHPASS_KERNELS = (3, 5, 7)
HIGHPASS_HEADS = (2, 3, 3)
LOWPASS_SIZES = (1, 2, 3, 6)

# Rows and columns of the reference grid of the learned ("vanilla") frequency filter.
VANILLA_GRID = (16, 16)


@dataclasses.dataclass(frozen=True)
class Form:
  """How the paper's operators are realised; the defaults are the released model.

  Attributes:
    filter_mode: of the high-pass and low-pass filters. "spatial", "fft" and "auto" are one
      function: convolution and pooling in space, everything on spectra, or the faster of both.
      "fft_circular": high-pass kernels without padding. "fft_ideal": besides, ideal low-pass masks.
      "vanilla": one learned complex factor per frequency and channel replaces both filters.
    lowpass_relu: whether the low-pass part is rectified; the paper does not say so.
    share_filters: whether the blocks of a stage share their high-pass kernels.
    cluster: "conv", or "window_softmax": prototypes are 3x3 means with adaptive weights (eq. 1).
    restore: "add": upsampled prototypes beside the pixel descriptor; "joint": the descriptor works
      on the sum of pixels and upsampled prototypes (figure 2).
  """

  filter_mode: str = "auto"
  lowpass_relu: bool = True
  share_filters: bool = True
  cluster: str = "conv"
  restore: str = "add"

  def __post_init__(self) -> None:
    """Raises `UserError` for a value that is none of those above."""
    require_one_of("filter_mode", self.filter_mode, FILTER_MODES)
    require_one_of("cluster", self.cluster, ("conv", "window_softmax"))
    require_one_of("restore", self.restore, ("add", "joint"))


FILTER_MODES = ("auto", "spatial", "fft", "fft_circular", "fft_ideal", "vanilla")
HEAD_KINDS = ("official", "linear", "image", "ssa")


class Cluster(nn.Module):
  """Patch embedding: clusters pixels into prototypes (equation 1 of the paper).

  The paper's local clustering is a convolution in the released code: depthwise 3x3, pointwise,
  normalisation, hardswish. With `window_softmax` the depthwise kernel gives way to adaptive
  weights.

  Attributes:
    stride: pixels per prototype along each axis.
    form: `cluster` is read.
    dtype: of the computation.
  """

  stride: int
  form: Form = Form()
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""
    if self.form.cluster == "window_softmax":
      x = WindowSoftmax(self.stride, self.dtype, name="window")(x)
    else:
      x = DepthwiseConv(stride=self.stride, dtype=self.dtype, name="depthwise")(x)
    return ConvNorm(x.shape[-1], dtype=self.dtype, name="pointwise")(x, train)


class WindowSoftmax(nn.Module):
  """Mean of each 3x3 window, weighted per head by the softmax of a learned score of its pixels.

  Attributes:
    stride: between windows.
    dtype: of the computation; the softmax is float32.
  """

  stride: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""
    scores = nn.Dense(HEADS, dtype=self.dtype, name="score")(x).astype(jnp.float32)
    inside = jnp.zeros((1, *x.shape[1:3], 1), jnp.float32)
    inside = jnp.stack(windows(inside, 3, self.stride, fill=-np.inf))
    weights = nn.softmax(jnp.stack(windows(scores, 3, self.stride)) + inside, axis=0)
    pixels = windows(x.astype(self.dtype), 3, self.stride)
    pixels = [einops.rearrange(tap, "b h w (n d) -> b h w n d", n=HEADS) for tap in pixels]
    mean = sum(
      weight[..., None].astype(self.dtype) * tap
      for weight, tap in zip(weights, pixels, strict=True)
    )
    return einops.rearrange(mean, "b h w n d -> b h w (n d)")


class PixelDescriptor(nn.Module):
  """Residual bottleneck on the pixels: 1x1 to half the channels, depthwise 3x3, 1x1 back.

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C)."""
    channels = x.shape[-1]
    y = ConvNorm(channels // 2, dtype=self.dtype, name="reduce")(x, train)
    y = DepthwiseConv(dtype=self.dtype, name="depthwise")(y)
    y = nn.hard_swish(BatchNorm(dtype=self.dtype, name="norm")(y, train))
    return x + ConvNorm(channels, activate=False, dtype=self.dtype, name="expand")(y, train)


class FrequencyFilters(nn.Module):
  """The dynamic high-pass and low-pass filters of the values, shared by the blocks of a stage.

  High-pass: depthwise convolutions of 3x3, 5x5 and 7x7 on 2, 3 and 3 of the 8 heads, multiplied by
  the query. Low-pass: the channels' quarters averaged on grids of 1, 2, 3 and 6 cells a side,
  resized back, rectified.

  Attributes:
    form: `filter_mode` and `lowpass_relu` are read.
    dtype: of the computation; transforms are float32.
  """

  form: Form = Form()
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, query: jax.Array, values: jax.Array) -> jax.Array:
    """`query * highpass(values) + lowpass(values)`, all (B, h, w, C)."""
    channels, mode = values.shape[-1], self.form.filter_mode
    if mode == "vanilla":
      shape = (VANILLA_GRID[0], VANILLA_GRID[1] // 2 + 1, channels)
      init = nn.initializers.normal(0.02)
      factors = [self.param(f"vanilla_{part}", init, shape) for part in ("real", "imaginary")]
      return fourier.learned_filter(values, *factors)

    high = self._high_pass(values)
    if mode == "fft_ideal":
      low = fourier.ideal_low_pass(values, LOWPASS_SIZES)
    else:
      low = pooled_low_pass(values)
    low = nn.relu(low) if self.form.lowpass_relu else low
    return query * high + low

  def _high_pass(self, values: jax.Array) -> jax.Array:
    mode, width = self.form.filter_mode, values.shape[-1] // HEADS
    sizes = list(zip(HIGHPASS_KERNELS, HIGHPASS_HEADS, strict=True))
    if mode == "auto" and backend.platform() == "tpu":
      # A third less to compile in a block than three convolutions of parts of the channels.
      parameters = [
        DepthwiseKernel(size, heads * width, self.dtype, name=f"highpass_{size}")()
        for size, heads in sizes
      ]
      kernels, biases = zip(*parameters, strict=True)
      return depthwise_conv_by_groups(values, kernels) + jnp.concatenate(biases)
    parts = jnp.split(values, np.cumsum(HIGHPASS_HEADS)[:-1] * width, axis=-1)
    formulation = "circular" if mode in ("fft_circular", "fft_ideal") else mode
    high = [
      DepthwiseConv(
        size, use_bias=True, formulation=formulation, dtype=self.dtype, name=f"highpass_{size}"
      )(part)
      for (size, _), part in zip(sizes, parts, strict=True)
    ]
    return jnp.concatenate(high, axis=-1)


def pooled_low_pass(values: jax.Array) -> jax.Array:
  """Averages each quarter of the channels over s x s cells and resizes it back, s = 1, 2, 3, 6.

  Both are linear maps along the axes: `U P x P^T U^T` with small constant matrices.
  """
  rows, cols = values.shape[1:3]
  if backend.platform() == "export":
    # As one matrix per quarter and axis: two products instead of sixteen.
    quarters = values.reshape(*values.shape[:3], len(LOWPASS_SIZES), -1)
    down, across = (
      jnp.asarray(
        np.stack([bilinear_matrix(n, s) @ adaptive_average_matrix(n, s) for s in LOWPASS_SIZES]),
        values.dtype,
      )
      for n in (rows, cols)
    )
    quarters = jnp.einsum("qyh,bhwqc->bywqc", down, quarters)
    return jnp.einsum("qxw,bywqc->byxqc", across, quarters).reshape(values.shape)
  parts = []
  for bins, part in zip(LOWPASS_SIZES, jnp.split(values, 4, axis=-1), strict=True):
    pool_rows, pool_cols = (
      jnp.asarray(adaptive_average_matrix(n, bins), values.dtype) for n in (rows, cols)
    )
    cells = jnp.einsum("sh,tw,bhwc->bstc", pool_rows, pool_cols, part)
    up_rows, up_cols = (jnp.asarray(bilinear_matrix(n, bins), values.dtype) for n in (rows, cols))
    parts.append(jnp.einsum("hs,wt,bstc->bhwc", up_rows, up_cols, cells))
  return jnp.concatenate(parts, axis=-1)


def frequency_similarity(
  query: jax.Array, key: jax.Array, value: jax.Array, spectral: bool = False
) -> jax.Array:
  """The frequency similarity kernel applied to the queries: `q (softmax(k)^T v) / sqrt(d)`.

  The softmax runs over the tokens; the kernel is d x d per head, so the cost is linear in N.

  Args:
    query: (B, h, w, C); C is split into 8 heads of d channels.
    key: like `query`.
    value: like `query`.
    spectral: sum over frequencies instead of tokens, which by Parseval's theorem is the same.

  Returns:
    (B, h, w, C).
  """
  split = "b h w (n d) -> b n (h w) d"
  rows, cols, channels = query.shape[1:]
  query, key, value = (einops.rearrange(x, split, n=HEADS) for x in (query, key, value))
  weights = nn.softmax(key.astype(jnp.float32), axis=2).astype(value.dtype)
  if spectral:
    kernel = fourier.frequency_similarity_kernel(weights, value, (rows, cols)).astype(value.dtype)
  else:
    kernel = jnp.einsum("bnkd,bnke->bnde", weights, value)
  mixed = jnp.einsum("bnkd,bnde->bnke", query, kernel) * (channels // HEADS) ** -0.5
  return einops.rearrange(mixed, "b n (h w) d -> b h w (n d)", h=rows, w=cols)


class AdaptiveFrequencyFilter(nn.Module):
  """Three frequency filters of one projection, added up (section "adaptive frequency filter").

  `proj(q softmax(k)^T v / sqrt(d) + q * highpass(v) + lowpass(v))`

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, filters: FrequencyFilters) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C)."""
    spectral = filters.form.filter_mode == "fft"
    channels = x.shape[-1]
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype, name=name
    )
    query, key, value = jnp.split(dense(3 * channels, "qkv")(x), 3, axis=-1)
    mixed = frequency_similarity(query, key, value, spectral) + filters(query, value)
    return dense(channels, "proj")(mixed)


class MLP(nn.Module):
  """Feed-forward layer with a depthwise convolution inside; GELU after the inner residual.

  Attributes:
    ratio: hidden channels per channel.
    dtype: of the computation.
  """

  ratio: int = 2
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C)."""
    channels = x.shape[-1]
    init = nn.initializers.normal(0.02)
    x = nn.Dense(self.ratio * channels, kernel_init=init, dtype=self.dtype, name="fc1")(x)
    x = x + DepthwiseConv(use_bias=True, dtype=self.dtype, name="depthwise")(x)
    x = nn.gelu(x, approximate=False)
    return nn.Dense(channels, kernel_init=init, dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
  """One transformer block on the prototypes.

  Attributes:
    drop_path: rate of both residual branches.
    form: of the filters, if they are the block's own.
    dtype: of the computation.
  """

  drop_path: float = 0.0
  form: Form = Form()
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, position: DepthwiseConv, filters: FrequencyFilters | None, train: bool
  ) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C); `position` and `filters` belong to the stage.

    Without `filters` the block has its own.
    """
    if filters is None:
      filters = FrequencyFilters(self.form, self.dtype, name="filters")
    norm = lambda name: nn.LayerNorm(  # noqa: E731
      epsilon=1e-6, use_fast_variance=False, dtype=self.dtype, name=name
    )
    x = x + position(x)
    y = AdaptiveFrequencyFilter(dtype=self.dtype, name="filter")(norm("norm1")(x), filters)
    x = x + DropPath(self.drop_path, name="drop_path1")(y, train)
    y = MLP(dtype=self.dtype, name="mlp")(norm("norm2")(x))
    return x + DropPath(self.drop_path, name="drop_path2")(y, train)


class Stage(nn.Module):
  """Prototypes from pixels, filtered, and restored beside the pixel descriptor.

  Attributes:
    features: output channels.
    strides: of the pixel grid and of the prototype grid after it.
    drop_paths: rate of each block; empty for the first stage, which has no prototypes.
    form: how clustering, filters and restoring are realised.
    dtype: of the computation.
  """

  features: int
  strides: tuple[int, int]
  drop_paths: tuple[float, ...]
  form: Form = Form()
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, H, W, C) -> (B, ceil(H / strides[0]), ceil(W / strides[0]), features)."""
    pixels = Cluster(self.strides[0], self.form, self.dtype, name="cluster_0")(x, train)
    prototypes = Cluster(self.strides[1], self.form, self.dtype, name="cluster_1")(pixels, train)
    descriptor = PixelDescriptor(self.dtype, name="descriptor")
    if not self.drop_paths:
      restored = descriptor(pixels + prototypes, train)
    else:
      position = DepthwiseConv(use_bias=True, dtype=self.dtype, name="position")
      filters = None
      if self.form.share_filters:
        filters = FrequencyFilters(self.form, self.dtype, name="filters")
      for index, rate in enumerate(self.drop_paths):
        block = Block(rate, self.form, self.dtype, name=f"block_{index}")
        prototypes = block(prototypes, position, filters, train)
      upsampled = resize_bilinear(prototypes, pixels.shape[1:3], align_corners=True)
      if self.form.restore == "joint":
        restored = descriptor(pixels + upsampled, train)
      else:
        restored = descriptor(pixels, train) + upsampled
    return ConvNorm(self.features, dtype=self.dtype, name="aggregate")(restored, train)


class Backbone(nn.Module):
  """The four stages.

  Attributes:
    widths: channels entering each stage.
    depths: transformer blocks of each stage.
    drop_path: rate of the last block; the others' grow linearly from 0.
    remat: compute each stage again in the backward pass instead of keeping its activations.
    form: how the stages are realised.
    dtype: of the computation.
  """

  widths: tuple[int, int, int, int]
  depths: tuple[int, int, int, int]
  drop_path: float = 0.0
  remat: bool = False
  form: Form = Form()
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
    """Images (B, H, W, 3) -> features at strides 4, 8, 8 and 8."""
    x = ConvNorm(self.widths[0] // 2, 3, 2, dtype=self.dtype, name="stem_0")(x, train)
    x = ConvNorm(self.widths[0], 3, 2, dtype=self.dtype, name="stem_1")(x, train)
    # The first stage has no blocks, but counts one in the official schedule of rates.
    counts = np.maximum(self.depths, 1)
    rates = np.split(np.linspace(0.0, self.drop_path, sum(counts)), np.cumsum(counts)[:-1])
    stage = nn.remat(Stage, static_argnums=(2,)) if self.remat else Stage
    outputs = []
    for index, strides in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
      x = stage(
        (*self.widths[1:], self.widths[-1])[index],
        strides,
        tuple(float(rate) for rate in rates[index][: self.depths[index]]),
        self.form,
        self.dtype,
        name=f"stage_{index}",
      )(x, train)
      outputs.append(x)
    return tuple(outputs)


class Head(nn.Module):
  """Squeeze, normalise, classify: the official head.

  The official head also has a layer that is never called, `align`. It is kept in the collection
  "unused", so that official weights survive a round trip.

  Attributes:
    num_classes: output channels.
    dropout: rate at which whole channels are dropped before the classifier.
    dtype: of the computation.
  """

  num_classes: int
  dropout: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, h, w, C) -> logits float32 (B, h, w, num_classes)."""
    if self.is_initializing():
      self.variable("unused", "align", self._align)
    x = Conv(256, dtype=self.dtype, name="squeeze")(x)
    x = GroupNorm(self.dtype, name="norm")(x)
    x = nn.relu(x)
    x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
    return classifier(self.num_classes, self.dtype)(x).astype(jnp.float32)

  def _align(self) -> dict[str, dict[str, jax.Array]]:
    kernel = conv_init(self.make_rng("params"), (1, 1, 256, 256))
    return {"conv": {"kernel": kernel}, "norm": {"scale": jnp.ones(256), "bias": jnp.zeros(256)}}


class LinearHead(nn.Module):
  """The paper's head-free form: one linear layer, for every position or for the whole image.

  Attributes:
    num_classes: output channels.
    whole_image: classify the mean over all positions, as for pretraining on ImageNet.
    dtype: of the computation.
  """

  num_classes: int
  whole_image: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """(B, h, w, C) -> logits float32 (B, h, w, num_classes) or (B, num_classes)."""
    del train
    if self.whole_image:
      x = jnp.mean(x, axis=(1, 2), keepdims=True)
    x = classifier(self.num_classes, self.dtype)(x).astype(jnp.float32)
    return x[:, 0, 0] if self.whole_image else x


def classifier(num_classes: int, dtype: Dtype) -> Conv:
  """The last layer of every head."""
  init = nn.initializers.normal(0.01)
  return Conv(num_classes, use_bias=True, kernel_init=init, dtype=dtype, name="classify")


class AFFormer(nn.Module):
  """AFFormer for semantic segmentation.

  Attributes:
    widths: channels entering each stage.
    depths: transformer blocks of each stage.
    num_classes: classes.
    in_channels: channels of the images.
    features_only: return the four stages' features instead of logits.
    head: "official"; "linear": one linear layer; "image": one for the whole image's mean feature;
      "ssa": the official one with the classifier of `models/ssa_seg.py`.
    drop_path: stochastic-depth rate of the last block.
    dropout: rate of dropped channels in the official head.
    remat: compute each stage again in the backward pass instead of keeping its activations.
    filter_mode: see `Form`, like the next four.
    lowpass_relu: see `Form`.
    share_filters: see `Form`.
    cluster: see `Form`.
    restore: see `Form`.
    ssa_teacher: of the head "ssa" in training, "shared" or "own".
    dtype: of the computation; parameters, statistics and logits are float32.
  """

  widths: tuple[int, int, int, int]
  depths: tuple[int, int, int, int]
  num_classes: int = 150
  in_channels: int = 3
  features_only: bool = False
  head: str = "official"
  drop_path: float = 0.0
  dropout: float = 0.1
  remat: bool = False
  filter_mode: str = "auto"
  lowpass_relu: bool = True
  share_filters: bool = True
  cluster: str = "conv"
  restore: str = "add"
  ssa_teacher: str = "shared"
  dtype: Dtype = jnp.float32

  def form(self) -> Form:
    """How the stages are realised."""
    return Form(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Form)})

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Any:
    """Segments images.

    Args:
      images: (B, H, W, in_channels) float32, normalised; H and W at least 32.
      train: whether batch statistics, dropout and stochastic depth are those of training.

    Returns:
      Logits float32 (B, ceil(H/8), ceil(W/8), num_classes), (B, num_classes) with the head "image",
      or the features of the four stages. In training with the head "ssa", all that its losses take.

    Raises:
      UserError: if an image is smaller than 32x32 or has other channels.
    """
    if images.ndim != 4 or images.shape[-1] != self.in_channels:
      raise UserError(
        f"images are {images.shape}; expected (batch, rows, columns, {self.in_channels})."
      )
    if min(images.shape[1:3]) < 32:
      raise UserError(f"images are {images.shape[1]}x{images.shape[2]}; 32x32 is the least.")
    backbone = Backbone(
      self.widths,
      self.depths,
      self.drop_path,
      self.remat,
      self.form(),
      self.dtype,
      name="backbone",
    )
    features = backbone(images, train)
    if self.features_only:
      return features
    if self.head == "ssa":
      head = SSAHead(self.num_classes, self.dropout, self.ssa_teacher, self.dtype, name="head")
    elif self.head == "official":
      head = Head(self.num_classes, self.dropout, self.dtype, name="head")
    else:
      head = LinearHead(self.num_classes, self.head == "image", self.dtype, name="head")
    return head(features[-1], train)


_VARIANTS = {
  "tiny": {"widths": (32, 64, 160, 216), "depths": (0, 2, 4, 2)},
  "small": {"widths": (32, 64, 176, 216), "depths": (0, 2, 4, 2)},
  "base": {"widths": (32, 96, 176, 216), "depths": (0, 2, 6, 2)},
}


def create(name: str, **fields: Any) -> AFFormer:
  """Creates `afformer_{tiny,small,base}`, or with `_fft` the model whose filters are spectral."""
  variant = _VARIANTS[name.removeprefix("afformer_").removesuffix("_fft")]
  if name.endswith("_fft"):
    variant = {**variant, "filter_mode": "fft_ideal"}
  model = build(AFFormer, name, variant, fields)
  model.form()  # checks its fields now, and not when the model is first used
  require_one_of("head", model.head, HEAD_KINDS)
  require_one_of("ssa_teacher", model.ssa_teacher, TEACHERS)
  return model
