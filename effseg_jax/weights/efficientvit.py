"""EfficientViT's official names and ours, in the official order.

The authors' files, and timm's for the backbone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effseg_jax.models.efficientvit import EfficientViT
from effseg_jax.weights import table
from effseg_jax.weights.table import Part, Row

PARTS = {"backbone": Part(r"backbone\.", r"\w+/backbone/", ("input_stem.", "stages."))}

_TIMM_STEM = "stem.in_conv.conv.weight"
_TIMM = (
  (re.compile(r"^stem\.in_conv\."), "backbone.input_stem.op_list.0."),
  (
    re.compile(r"^stem\.res(\d+)\."),
    lambda match: f"backbone.input_stem.op_list.{int(match[1]) + 1}.",
  ),
  (re.compile(r"^stages\.(\d+)\.blocks\."), r"backbone.stages.\1.op_list."),
)


def example_inputs(model: EfficientViT) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Arguments of a model, of any size: no parameter's shape depends on it."""
  return (jax.ShapeDtypeStruct((1, 64, 64, model.in_channels), jnp.float32),)


def renamed(model: EfficientViT, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """A file's tensors under the authors' names; timm's files of classifiers have others."""
  del model
  if _TIMM_STEM not in tensors:
    return tensors
  return {_from_timm(name): tensor for name, tensor in tensors.items()}


def _from_timm(name: str) -> str:
  """`stages.2.blocks.1` -> `backbone.stages.2.op_list.1`."""
  for pattern, official in _TIMM:
    name = pattern.sub(official, name)
  return name


def rows(model: EfficientViT, paths: Collection[str]) -> list[Row]:
  """The official state dict of a model.

  Args:
    model: gives depths and kind of head.
    paths: the model's own variables; the head's rows are left out where it has none.
  """
  listed = list(_backbone(model))
  if any("/head/" in path for path in paths):
    listed += _head(model)
  return listed


def _backbone(model: EfficientViT) -> Iterator[Row]:
  stem, *stages = model.depths
  name = "backbone.input_stem.op_list"
  yield from _layer(f"{name}.0", "backbone/stem")
  for index in range(stem):
    block = f"backbone/stem_block_{index}"
    yield from _layer(f"{name}.{index + 1}.main.depth_conv", f"{block}/depthwise")
    yield from _layer(f"{name}.{index + 1}.main.point_conv", f"{block}/pointwise")
  for stage, depth in enumerate(stages, start=1):
    for index in range(depth if stage < 3 else depth + 1):
      name = f"backbone.stages.{stage - 1}.op_list.{index}"
      path = f"backbone/stage_{stage}_block_{index}"
      if stage < 3 or index == 0:
        yield from _bottleneck(f"{name}.main", path, norms=stage < 3)
        continue
      attention, ours = f"{name}.context_module.main", f"{path}/attention"
      yield from table.conv(f"{attention}.qkv.conv", f"params/{ours}/qkv")
      yield from table.conv(f"{attention}.aggreg.0.0", f"params/{ours}/aggregate")
      yield from table.conv(f"{attention}.aggreg.0.1", f"params/{ours}/aggregate_mix")
      yield from _layer(f"{attention}.proj", f"{ours}/project")
      yield from _bottleneck(f"{name}.local_module.main", f"{path}/local", norms=False)


def _head(model: EfficientViT) -> Iterator[Row]:
  # The finest level is not resized, and its layer is not in a list.
  for index, name in enumerate(("0.op_list.0", "1.op_list.0", "2")):
    yield from _layer(f"head.input_ops.{name}", f"head/input_{index}")
  for index in range(model.head_depth):
    yield from _bottleneck(f"head.middle.op_list.{index}.main", f"head/block_{index}", norms=True)
  name, last = "head.output_ops.0.op_list", 0
  if model.head_expand:
    yield from _layer(f"{name}.0", "head/hidden")
    last = 1
  yield from table.conv(f"{name}.{last}.conv", "params/head/classify", bias=True)


def _bottleneck(name: str, path: str, norms: bool) -> Iterator[Row]:
  yield from _layer(f"{name}.inverted_conv", f"{path}/expand", norms)
  yield from _layer(f"{name}.depth_conv", f"{path}/depthwise", norms)
  yield from _layer(f"{name}.point_conv", f"{path}/project")


def _layer(name: str, path: str, norm: bool = True) -> Iterator[Row]:
  yield from table.conv(f"{name}.conv", f"params/{path}/conv", bias=not norm)
  if norm:
    yield from table.batch_norm(f"{name}.norm", f"{path}/norm")
