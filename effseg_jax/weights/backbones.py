"""The backbones' official names and ours, and the names under which ImageNet weights come.

Rows follow detectron2's names and order, which the released segmentation models have. PyTorch's
model zoo names a ResNet otherwise, and files of classifiers hold more than a backbone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from effseg_jax.models.backbones.resnet import DEPTHS, ResNet
from effseg_jax.models.backbones.swin import Swin
from effseg_jax.weights import table
from effseg_jax.weights.table import Part, Row

# How names begin in a file that holds a backbone alone.
PART = Part(
  r"backbone\.",
  r"\w+/backbone/",
  (
    *("stem.", "res2.", "res3.", "res4.", "res5."),
    *("patch_embed.", "layers.", "norm0.", "norm1.", "norm2.", "norm3."),
  ),
)

# What such files hold besides: the classifier, and buffers that are functions of the sizes.
_UNUSED = re.compile(
  r"(stem\.)?fc\.|head\.|norm\.|_conv_head\.|_bn1\.|_fc\."
  r"|.*\.(num_batches_tracked|relative_position_index|attn_mask)$"
)

_MODEL_ZOO = (
  (re.compile(r"^conv1\."), "stem.conv1."),
  (re.compile(r"^bn1\."), "stem.conv1.norm."),
  (re.compile(r"^layer(\d)\."), lambda match: f"res{int(match[1]) + 1}."),
  (re.compile(r"\.bn(\d)\."), r".conv\1.norm."),
  (re.compile(r"\.downsample\.0\."), ".shortcut."),
  (re.compile(r"\.downsample\.1\."), ".shortcut.norm."),
)


def renamed(backbone: ResNet | Swin, tensors: Mapping[str, Any]) -> dict[str, Any]:
  """A file's tensors with those of a backbone under detectron2's names.

  Args:
    backbone: that the file is for.
    tensors: of a whole model, or of a classifier: a ResNet under the names of PyTorch's model zoo
      or of detectron2, a Swin Transformer under those of its authors. A Swin classifier lacks the
      normalisations of the stages' outputs; they are added, as the identity.

  Returns:
    Name -> tensor, without classifiers, counters of batches and buffers.
  """
  if isinstance(backbone, ResNet) and any(name.startswith("layer1.") for name in tensors):
    tensors = {_from_model_zoo(name): x for name, x in tensors.items()}
  classifier = isinstance(backbone, Swin) and "head.weight" in tensors
  tensors = {name: x for name, x in tensors.items() if not _UNUSED.match(name)}
  if classifier:
    for stage in range(len(backbone.depths)):
      features = backbone.features * 2**stage
      tensors.setdefault(f"norm{stage}.weight", np.ones(features, np.float32))
      tensors.setdefault(f"norm{stage}.bias", np.zeros(features, np.float32))
  return tensors


def _from_model_zoo(name: str) -> str:
  """`layer1.0.bn2.weight` -> `res2.0.conv2.norm.weight`."""
  for pattern, replacement in _MODEL_ZOO:
    name = pattern.sub(replacement, name)
  return name


def rows(backbone: ResNet | Swin, name: str = "backbone", path: str = "backbone") -> Iterator[Row]:
  """The official tensors of a backbone.

  Args:
    backbone: gives the depth, and the kind of a ResNet's normalisation.
    name: prefix of the official names.
    path: of the backbone among our variables, without the collection.
  """
  if isinstance(backbone, ResNet):
    yield from _resnet(backbone, name, path)
  else:
    yield from _swin(backbone, name, f"params/{path}")


def _resnet(backbone: ResNet, name: str, path: str) -> Iterator[Row]:
  def conv(official: str, ours: str) -> Iterator[Row]:
    yield from table.conv(f"{name}.{official}", f"params/{path}/{ours}/conv")
    norm, norm_path = f"{name}.{official}.norm", f"{path}/{ours}/norm"
    if backbone.norm == "bn":
      yield from table.batch_norm(norm, norm_path)
      return
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    for leaf, own in leaves.items():
      yield Row(f"{norm}.{leaf}", f"batch_stats/{norm_path}/{own}")

  counts, bottleneck = DEPTHS[backbone.depth]
  yield from conv("stem.conv1", "stem")
  for stage, count in enumerate(counts, start=2):
    for index in range(count):
      block, ours = f"res{stage}.{index}", f"res{stage}_{index}"
      if index == 0 and (stage > 2 or bottleneck):
        yield from conv(f"{block}.shortcut", f"{ours}/shortcut")
      for layer in range(1, 4 if bottleneck else 3):
        yield from conv(f"{block}.conv{layer}", f"{ours}/conv{layer}")


def _swin(backbone: Swin, name: str, path: str) -> Iterator[Row]:
  yield from table.conv(f"{name}.patch_embed.proj", f"{path}/patch_embed", bias=True)
  yield from table.norm(f"{name}.patch_embed.norm", f"{path}/patch_embed/norm")
  index = _relative_position_index(backbone.window)
  for stage, depth in enumerate(backbone.depths):
    for block in range(depth):
      theirs, ours = f"{name}.layers.{stage}.blocks.{block}", f"{path}/stage_{stage}_block_{block}"
      attention = f"{ours}/attention"
      yield from table.norm(f"{theirs}.norm1", f"{ours}/norm1")
      yield Row(
        f"{theirs}.attn.relative_position_bias_table", f"{attention}/relative_position_bias"
      )
      yield Row(f"{theirs}.attn.relative_position_index", "", constant=index)
      yield from table.linear(f"{theirs}.attn.qkv", f"{attention}/qkv")
      yield from table.linear(f"{theirs}.attn.proj", f"{attention}/proj")
      yield from table.norm(f"{theirs}.norm2", f"{ours}/norm2")
      yield from table.linear(f"{theirs}.mlp.fc1", f"{ours}/fc1")
      yield from table.linear(f"{theirs}.mlp.fc2", f"{ours}/fc2")
    if stage < len(backbone.depths) - 1:
      merge = f"{name}.layers.{stage}.downsample"
      yield Row(f"{merge}.reduction.weight", f"{path}/merge_{stage}/reduce/kernel", "linear")
      yield from table.norm(f"{merge}.norm", f"{path}/merge_{stage}/norm")
  for stage in range(len(backbone.depths)):
    yield from table.norm(f"{name}.norm{stage}", f"{path}/norm_{stage}")


def _relative_position_index(window: int) -> np.ndarray:
  """The official buffer: entries of the table for each pair of a window's pixels, int64."""
  y, x = (axis.reshape(-1) for axis in np.mgrid[:window, :window])
  offset = [axis[:, None] - axis[None, :] + window - 1 for axis in (y, x)]
  return (offset[0] * (2 * window - 1) + offset[1]).astype(np.int64)
