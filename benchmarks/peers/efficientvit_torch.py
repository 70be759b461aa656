"""EfficientViT-Seg in plain PyTorch, with the official names: what ours is timed against.

Written from the paper and the released state dicts, with the operations that the released code has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Widths, depths, channels of an attention head, channels and bottlenecks of the head.
VARIANTS = {
  "efficientvit_b0": ((8, 16, 32, 64, 128), (1, 2, 2, 2, 2), 16, 32, 1),
  "efficientvit_b1": ((16, 32, 64, 128, 256), (1, 2, 3, 3, 4), 16, 64, 3),
  "efficientvit_b2": ((24, 48, 96, 192, 384), (1, 3, 4, 4, 6), 32, 96, 3),
  "efficientvit_b3": ((32, 64, 128, 256, 512), (1, 4, 6, 6, 9), 32, 128, 3),
}


class Layer(nn.Module):
  """Convolution, perhaps normalised, perhaps followed by hardswish."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    norm: bool = True,
    bias: bool = False,
    activate: bool = True,
  ):
    super().__init__()
    self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    self.norm = nn.BatchNorm2d(outputs) if norm else None
    self.act = nn.Hardswish() if activate else None

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride))."""
    x = self.conv(x)
    if self.norm is not None:
      x = self.norm(x)
    return x if self.act is None else self.act(x)


class DepthwiseSeparable(nn.Module):
  """The stem's block."""

  def __init__(self, width: int):
    super().__init__()
    self.depth_conv = Layer(width, width, 3, groups=width)
    self.point_conv = Layer(width, width, activate=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> the same."""
    return self.point_conv(self.depth_conv(x))


class MBConv(nn.Module):
  """Inverted bottleneck, all three convolutions normalised or the last alone."""

  def __init__(self, inputs: int, outputs: int, stride: int = 1, norms: bool = True):
    super().__init__()
    hidden = 4 * inputs
    few = {"norm": norms, "bias": not norms}
    self.inverted_conv = Layer(inputs, hidden, **few)
    self.depth_conv = Layer(hidden, hidden, 3, stride, groups=hidden, **few)
    self.point_conv = Layer(hidden, outputs, activate=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride))."""
    return self.point_conv(self.depth_conv(self.inverted_conv(x)))


class LinearAttention(nn.Module):
  """ReLU linear attention at two scales."""

  def __init__(self, width: int, dim: int):
    super().__init__()
    self.dim = dim
    total = 3 * width
    self.qkv = Layer(width, total, norm=False, activate=False)
    self.aggreg = nn.ModuleList(
      [
        nn.Sequential(
          nn.Conv2d(total, total, 5, padding=2, groups=total, bias=False),
          nn.Conv2d(total, total, 1, groups=total // dim, bias=False),
        )
      ]
    )
    self.proj = Layer(2 * width, width, activate=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> the same."""
    batch, _, rows, cols = x.shape
    qkv = self.qkv(x)
    qkv = torch.cat([qkv, self.aggreg[0](qkv)], dim=1).float()
    qkv = qkv.reshape(batch, -1, 3 * self.dim, rows * cols)
    q, k, v = qkv.split(self.dim, dim=2)
    q, k = F.relu(q), F.relu(k)
    v = F.pad(v, (0, 0, 0, 1), value=1.0)
    mixed = torch.matmul(torch.matmul(v, k.transpose(-1, -2)), q)
    mixed = mixed[:, :, :-1] / (mixed[:, :, -1:] + 1e-15)
    return self.proj(mixed.reshape(batch, -1, rows, cols).to(x.dtype))


class Residual(nn.Module):
  """`x + main(x)`."""

  def __init__(self, main: nn.Module):
    super().__init__()
    self.main = main

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> the same."""
    return x + self.main(x)


class Plain(nn.Module):
  """`main(x)`, under the name that residual blocks have."""

  def __init__(self, main: nn.Module):
    super().__init__()
    self.main = main

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Whatever `main` does."""
    return self.main(x)


class Block(nn.Module):
  """Attention and an inverted bottleneck."""

  def __init__(self, width: int, dim: int):
    super().__init__()
    self.context_module = Residual(LinearAttention(width, dim))
    self.local_module = Residual(MBConv(width, width, norms=False))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> the same."""
    return self.local_module(self.context_module(x))


class Ops(nn.Module):
  """Modules one after the other, under the official name."""

  def __init__(self, *modules: nn.Module):
    super().__init__()
    self.op_list = nn.ModuleList(modules)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Through all of them."""
    for module in self.op_list:
      x = module(x)
    return x


class Backbone(nn.Module):
  """Stem and four stages."""

  def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], dim: int):
    super().__init__()
    stem = [Residual(DepthwiseSeparable(widths[0])) for _ in range(depths[0])]
    self.input_stem = Ops(Layer(3, widths[0], 3, 2), *stem)
    stages = []
    for stage in range(1, 5):
      before, width, local = widths[stage - 1], widths[stage], stage < 3
      modules = [Plain(MBConv(before, width, 2, norms=local))]
      if local:
        modules += [Residual(MBConv(width, width)) for _ in range(depths[stage] - 1)]
      else:
        modules += [Block(width, dim) for _ in range(depths[stage])]
      stages.append(Ops(*modules))
    self.stages = nn.ModuleList(stages)

  def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
    """Images -> the last three stages' maps."""
    x, maps = self.input_stem(x), []
    for stage in self.stages:
      x = stage(x)
      maps.append(x)
    return maps[1:]


class Head(nn.Module):
  """Sum of three levels at stride 8, bottlenecks, classifier."""

  def __init__(
    self, widths: tuple[int, ...], features: int, depth: int, classes: int, expand: int | None
  ):
    super().__init__()
    layers = [Layer(width, features, activate=False) for width in reversed(widths[2:])]
    self.input_ops = nn.ModuleList([Ops(layers[0]), Ops(layers[1]), layers[2]])
    self.middle = Ops(*(Residual(MBConv(features, features)) for _ in range(depth)))
    hidden = [Layer(features, expand * features)] if expand else []
    width = features * (expand or 1)
    last = Layer(width, classes, norm=False, bias=True, activate=False)
    self.output_ops = nn.ModuleList([Ops(*hidden, last)])

  def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
    """Maps of strides 8, 16, 32 -> logits at stride 8."""
    deep, middle, fine = (op(x) for op, x in zip(self.input_ops, reversed(maps), strict=True))
    deep = F.interpolate(deep, scale_factor=4, mode="bicubic", align_corners=False)
    middle = F.interpolate(middle, scale_factor=2, mode="bicubic", align_corners=False)
    return self.output_ops[0](self.middle(deep + middle + fine))


class EfficientViTTorch(nn.Module):
  """Images (B, 3, H, W) -> logits (B, classes, H/8, W/8)."""

  def __init__(self, name: str = "efficientvit_b1", classes: int = 19, expand: int | None = 4):
    super().__init__()
    widths, depths, dim, features, depth = VARIANTS[name]
    self.backbone = Backbone(widths, depths, dim)
    self.head = Head(widths, features, depth, classes, expand)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """H and W multiples of 32."""
    return self.head(self.backbone(x))
