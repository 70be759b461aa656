"""AFFormer's official names and ours, in the official order.

Names and order are those of the released code's state dict (specification, sections 5 and 10). The
modules that a stage's blocks share are listed there once for every parent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effseg_jax.models.afformer import HIGHPASS_KERNELS, AFFormer
from effseg_jax.weights import table
from effseg_jax.weights.table import Part, Row

# The ImageNet weights are those of the backbone alone, and may lack the prefix.
PARTS = {
  "backbone": Part(
    r"backbone\.", r"\w+/backbone/", ("stem.", "patch_embed_stages.", "mhca_stages.")
  )
}


def example_inputs(model: AFFormer) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Arguments of a model, of any size: no parameter's shape depends on it."""
  return (jax.ShapeDtypeStruct((1, 64, 64, model.in_channels), jnp.float32),)


def renamed(model: AFFormer, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """A file's tensors under the official names, which all files have."""
  del model
  return tensors


def rows(model: AFFormer, paths: Collection[str]) -> list[Row]:
  """The official state dict of a model.

  Args:
    model: gives the number of blocks and the kind of head.
    paths: the model's own variables, `collection/module/.../leaf`; official tensors that a variant
      lacks (its filters or its head are others) are left out.

  Returns:
    The rows in the official order.
  """
  listed = list(_rows(model))
  if model.head != "official":  # its classifier has another input than the official `conv_seg`
    listed = [row for row in listed if not row.name.startswith("decode_head.")]
  modules = {row.name.rpartition(".")[0] for row in listed if row.path in paths}
  return [
    row
    for row in listed
    if row.path in paths or (not row.path and row.name.rpartition(".")[0] in modules)
  ]


def _rows(model: AFFormer) -> Iterator[Row]:
  for index in range(2):
    yield from table.conv_norm(f"backbone.stem.{index}", f"backbone/stem_{index}")
  for stage in range(4):
    for index in range(2):
      yield from _cluster(stage, index)
  for stage, depth in enumerate(model.depths):
    yield from _stage(stage, depth)
  yield from table.conv("decode_head.conv_seg", "params/head/classify", bias=True)
  yield from table.conv("decode_head.squeeze.conv", "params/head/squeeze")
  yield from table.norm("decode_head.squeeze.gn", "params/head/norm")
  yield Row("decode_head.align.conv.weight", "unused/head/align/conv/kernel", "conv", dead=True)
  yield from table.norm("decode_head.align.gn", "unused/head/align/norm", dead=True)


def _cluster(stage: int, index: int) -> Iterator[Row]:
  name = f"backbone.patch_embed_stages.{stage}.patch_embeds.{index}.patch_conv"
  path = f"backbone/stage_{stage}/cluster_{index}"
  yield from table.conv(f"{name}.dwconv", f"params/{path}/depthwise")
  yield from table.conv(f"{name}.pwconv", f"params/{path}/pointwise/conv")
  yield from table.batch_norm(f"{name}.bn", f"{path}/pointwise/norm")


def _stage(stage: int, depth: int) -> Iterator[Row]:
  name, path = f"backbone.mhca_stages.{stage}", f"backbone/stage_{stage}"
  yield from table.conv_norm(f"{name}.Restore.conv1", f"{path}/descriptor/reduce")
  yield from table.conv(f"{name}.Restore.dwconv", f"params/{path}/descriptor/depthwise")
  yield from table.batch_norm(f"{name}.Restore.norm", f"{path}/descriptor/norm")
  yield from table.conv_norm(f"{name}.Restore.conv2", f"{path}/descriptor/expand")
  yield from table.conv_norm(f"{name}.aggregate", f"{path}/aggregate")
  if not depth:
    return
  # The position encoding and the filters belong to the stage, and are listed again in each block.
  parent = f"{name}.mhca_blks.0"
  position = list(table.conv(f"{parent}.cpe.proj", f"params/{path}/position", bias=True))
  filters = [
    row
    for index, size in enumerate(HIGHPASS_KERNELS)
    for row in table.conv(
      f"{parent}.crpe.conv_list.{index}", f"params/{path}/filters/highpass_{size}", bias=True
    )
  ]
  yield from position
  yield from filters
  for layer in range(depth):
    block, ours = f"{parent}.MHCA_layers.{layer}", f"params/{path}/block_{layer}"
    yield from table.aliases([*position, *filters], block, parent)
    yield from table.linear(f"{block}.factoratt_crpe.qkv", f"{ours}/filter/qkv")
    yield from table.linear(f"{block}.factoratt_crpe.proj", f"{ours}/filter/proj")
    yield from table.aliases(filters, f"{block}.factoratt_crpe", parent)
    yield from table.linear(f"{block}.mlp.fc1", f"{ours}/mlp/fc1")
    yield from table.conv(f"{block}.mlp.dwconv.dwconv", f"{ours}/mlp/depthwise", bias=True)
    yield from table.linear(f"{block}.mlp.fc2", f"{ours}/mlp/fc2")
    yield from table.norm(f"{block}.norm1", f"{ours}/norm1")
    yield from table.norm(f"{block}.norm2", f"{ours}/norm2")
