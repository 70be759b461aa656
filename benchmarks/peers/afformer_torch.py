"""AFFormer in PyTorch, as the official implementation computes it: the peer that we are timed by.

The modules carry the official names, so that an official (or exported) state dict loads with
`strict=True`. Written for the benchmark and for round-trip tests; nothing in effseg_jax needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8
HIGHPASS = ((3, 2), (5, 3), (7, 3))  # kernel size, heads
LOWPASS = (1, 2, 3, 6)
VARIANTS = {
  "afformer_tiny": ((32, 64, 160, 216), (2, 4, 2)),
  "afformer_small": ((32, 64, 176, 216), (2, 4, 2)),
  "afformer_base": ((32, 96, 176, 216), (2, 6, 2)),
}


def depthwise(channels: int, size: int = 3, stride: int = 1, bias: bool = False) -> nn.Conv2d:
  """A depthwise convolution."""
  return nn.Conv2d(channels, channels, size, stride, size // 2, groups=channels, bias=bias)


class ConvNorm(nn.Module):
  """Convolution, batch normalisation and, if asked, hardswish."""

  def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, activate=True):
    super().__init__()
    self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    self.bn = nn.BatchNorm2d(outputs)
    self.activate = activate

  def forward(self, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D, H', W')."""
    x = self.bn(self.conv(x))
    return F.hardswish(x) if self.activate else x


class PatchConv(nn.Module):
  """Depthwise 3x3, pointwise, normalisation, hardswish."""

  def __init__(self, channels: int, stride: int):
    super().__init__()
    self.dwconv = depthwise(channels, stride=stride)
    self.pwconv = nn.Conv2d(channels, channels, 1, bias=False)
    self.bn = nn.BatchNorm2d(channels)

  def forward(self, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H / stride, W / stride)."""
    return F.hardswish(self.bn(self.pwconv(self.dwconv(x))))


class Named(nn.Module):
  """Holds modules under the official names."""

  def __init__(self, **modules: nn.Module):
    super().__init__()
    for name, module in modules.items():
      self.add_module(name, module)


class Restore(nn.Module):
  """The pixel descriptor."""

  def __init__(self, channels: int):
    super().__init__()
    self.conv1 = ConvNorm(channels, channels // 2)
    self.dwconv = depthwise(channels // 2)
    self.norm = nn.BatchNorm2d(channels // 2)
    self.conv2 = ConvNorm(channels // 2, channels, activate=False)

  def forward(self, x: Tensor) -> Tensor:
    """(B, C, H, W) -> the same."""
    return x + self.conv2(F.hardswish(self.norm(self.dwconv(self.conv1(x)))))


class Filters(nn.Module):
  """The high-pass convolutions and the pooled low-pass filter of the values."""

  def __init__(self, channels: int):
    super().__init__()
    width = channels // HEADS
    self.splits = [heads * width for _, heads in HIGHPASS]
    self.conv_list = nn.ModuleList(
      depthwise(heads * width, size, bias=True) for size, heads in HIGHPASS
    )

  def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, h, w) -> high-pass and low-pass, both of that shape."""
    parts = torch.split(values, self.splits, dim=1)
    high = torch.cat([conv(part) for conv, part in zip(self.conv_list, parts, strict=True)], 1)
    low = [
      F.interpolate(F.adaptive_avg_pool2d(part, bins), values.shape[2:], mode="bilinear")
      for bins, part in zip(LOWPASS, values.chunk(4, dim=1), strict=True)
    ]
    return high, F.relu(torch.cat(low, 1))


class Attention(nn.Module):
  """The adaptive frequency filter on tokens."""

  def __init__(self, channels: int, crpe: Filters):
    super().__init__()
    self.qkv = nn.Linear(channels, 3 * channels)
    self.proj = nn.Linear(channels, channels)
    self.crpe = crpe

  def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C) -> the same."""
    batch, count, channels = x.shape
    width = channels // HEADS
    qkv = self.qkv(x).reshape(batch, count, 3, HEADS, width).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    similarity = key.softmax(dim=2).transpose(2, 3) @ value
    mixed = width**-0.5 * (query @ similarity)
    image = value.transpose(2, 3).reshape(batch, channels, *size)
    high, low = (y.reshape(batch, HEADS, width, count).transpose(2, 3) for y in self.crpe(image))
    mixed = mixed + query * high + low
    return self.proj(mixed.transpose(1, 2).reshape(batch, count, channels))


class MLP(nn.Module):
  """Feed-forward layer with a depthwise convolution inside."""

  def __init__(self, channels: int):
    super().__init__()
    self.fc1 = nn.Linear(channels, 2 * channels)
    self.dwconv = Named(dwconv=depthwise(2 * channels, bias=True))
    self.fc2 = nn.Linear(2 * channels, channels)

  def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C) -> the same."""
    x = self.fc1(x)
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)
    return self.fc2(F.gelu(x + self.dwconv.dwconv(image).flatten(2).transpose(1, 2)))


class Block(nn.Module):
  """One transformer block."""

  def __init__(self, channels: int, cpe: nn.Module, crpe: Filters):
    super().__init__()
    self.cpe, self.crpe = cpe, crpe
    self.factoratt_crpe = Attention(channels, crpe)
    self.mlp = MLP(channels)
    self.norm1 = nn.LayerNorm(channels, eps=1e-6)
    self.norm2 = nn.LayerNorm(channels, eps=1e-6)

  def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C) -> the same."""
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)
    x = x + self.cpe.proj(image).flatten(2).transpose(1, 2)
    x = x + self.factoratt_crpe(self.norm1(x), size)
    return x + self.mlp(self.norm2(x), size)


class Encoder(nn.Module):
  """The blocks of a stage, with the kernels they share."""

  def __init__(self, channels: int, depth: int):
    super().__init__()
    self.cpe = Named(proj=depthwise(channels, bias=True))
    self.crpe = Filters(channels)
    self.MHCA_layers = nn.ModuleList(Block(channels, self.cpe, self.crpe) for _ in range(depth))

  def forward(self, x: Tensor) -> Tensor:
    """(B, C, h, w) -> the same."""
    size = x.shape[2:]
    tokens = x.flatten(2).transpose(1, 2)
    for block in self.MHCA_layers:
      tokens = block(tokens, size)
    return tokens.transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
  """Restores pixels beside the prototypes."""

  def __init__(self, channels: int, outputs: int, depth: int):
    super().__init__()
    self.Restore = Restore(channels)
    self.aggregate = ConvNorm(channels, outputs)
    if depth:
      self.mhca_blks = nn.ModuleList([Encoder(channels, depth)])
    self.depth = depth

  def forward(self, pixels: Tensor, prototypes: Tensor) -> Tensor:
    """Pixels (B, C, H, W) and prototypes (B, C, h, w) -> (B, D, H, W)."""
    if not self.depth:
      return self.aggregate(self.Restore(pixels + prototypes))
    prototypes = self.mhca_blks[0](prototypes)
    if prototypes.shape != pixels.shape:
      prototypes = F.interpolate(prototypes, pixels.shape[2:], mode="bilinear", align_corners=True)
    return self.aggregate(self.Restore(pixels) + prototypes)


class Backbone(nn.Module):
  """Four stages after the stem."""

  def __init__(self, widths: Sequence[int], depths: Sequence[int]):
    super().__init__()
    self.stem = nn.Sequential(
      ConvNorm(3, widths[0] // 2, 3, 2), ConvNorm(widths[0] // 2, widths[0], 3, 2)
    )
    self.patch_embed_stages = nn.ModuleList()
    self.mhca_stages = nn.ModuleList()
    outputs = (*widths[1:], widths[-1])
    strides = ((1, 1), (2, 1), (1, 2), (1, 4))
    for width, output, depth, pair in zip(widths, outputs, (0, *depths), strides, strict=True):
      embeds = nn.ModuleList(Named(patch_conv=PatchConv(width, stride)) for stride in pair)
      self.patch_embed_stages.append(Named(patch_embeds=embeds))
      self.mhca_stages.append(Stage(width, output, depth))

  def forward(self, x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 216, H / 8, W / 8)."""
    x = self.stem(x)
    for embeds, stage in zip(self.patch_embed_stages, self.mhca_stages, strict=True):
      first, second = embeds.patch_embeds
      pixels = first.patch_conv(x)
      x = stage(pixels, second.patch_conv(pixels))
    return x


class Head(nn.Module):
  """Squeeze, normalise, classify; `align` is never called, as in the official head."""

  def __init__(self, inputs: int, num_classes: int):
    super().__init__()
    self.conv_seg = nn.Conv2d(256, num_classes, 1)
    self.squeeze = Named(conv=nn.Conv2d(inputs, 256, 1, bias=False), gn=nn.GroupNorm(32, 256))
    self.align = Named(conv=nn.Conv2d(256, 256, 1, bias=False), gn=nn.GroupNorm(32, 256))
    self.dropout = nn.Dropout2d(0.1)

  def forward(self, x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, K, h, w)."""
    x = F.relu(self.squeeze.gn(self.squeeze.conv(x)))
    return self.conv_seg(self.dropout(x))


class AFFormerTorch(nn.Module):
  """Images (B, 3, H, W) -> logits (B, K, H / 8, W / 8)."""

  def __init__(self, name: str = "afformer_tiny", num_classes: int = 150):
    super().__init__()
    widths, depths = VARIANTS[name]
    self.backbone = Backbone(widths, depths)
    self.decode_head = Head(widths[-1], num_classes)

  def forward(self, x: Tensor) -> Tensor:
    """See the class."""
    return self.decode_head(self.backbone(x))
