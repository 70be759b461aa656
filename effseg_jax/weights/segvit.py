"""SegViT's official names and ours, in the official order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.models.segvit import SegViT
from effseg_jax.weights import table, vit
from effseg_jax.weights.table import Row

PARTS = {"backbone": vit.BACKBONE}

_NO_OBJECT_WEIGHT = 0.1  # of the official loss, which keeps it in a buffer
_BUFFER = "loss_decode.criterion.empty_weight"


def example_inputs(model: SegViT) -> tuple[jax.ShapeDtypeStruct, ...]:
  """One image of the model's size, which the shrunk one needs."""
  rows, cols = (n * model.patch_size for n in model.vit().grid)
  return (jax.ShapeDtypeStruct((1, rows, cols, model.in_channels), jnp.float32),)


def renamed(model: SegViT, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """A file's tensors under the official names, see `vit.mmsegmentation_names`; no buffers."""
  del model
  return {
    name: x for name, x in vit.mmsegmentation_names(tensors).items() if not name.endswith(_BUFFER)
  }


def resized(model: SegViT, tensors: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
  """Official tensors with positions fitted to the model's image size, and a line that says so."""
  names = ("backbone.pos_embed", "backbone.patch_embed.projection.weight")
  return vit.resize_backbone(model.vit(), tensors, *names, "bicubic")


def rows(model: SegViT, paths: Collection[str]) -> list[Row]:
  """The official state dict of a model; with `features_only` it is the backbone's alone."""
  listed = [*vit.mmsegmentation_rows(model.vit()), *_heads(model)]
  # The ViT ends with the last block that is read.
  return [row for row in listed if not row.path or row.path in paths]


def _heads(model: SegViT) -> Iterator[Row]:
  if model.features_only:
    return
  name, shrunk = "decode_head", model.shrink_at is not None
  yield _empty_weight(model, name)
  for stage in range(1, len(model.out_layers) + 1):
    yield from table.linear(f"{name}.input_proj_{stage}", f"params/project_{stage}")
    yield from table.norm(f"{name}.proj_norm_{stage}", f"params/project_norm_{stage}")
    part = "upsampler" if shrunk else "decoder"
    yield from _stage(model, f"{name}.decoder_{stage}", f"{part}/stage_{stage}", masks=not shrunk)
  if shrunk:
    meaning = "one query for each patch of image_size"
    yield Row(f"{name}.q.weight", "params/upsampler/queries", meaning=meaning)
    name = "decode_head.atm"
    yield _empty_weight(model, name)
    yield from _stage(model, f"{name}.decoder_1", "decoder/stage_1", masks=True)
  meaning = "one query for each class"
  yield Row(f"{name}.q.weight", "params/decoder/queries", meaning=meaning)
  meaning = "one row for each class and one for no object"
  classify = "params/decoder/classify"
  yield Row(f"{name}.class_embed.weight", f"{classify}/kernel", "linear", meaning=meaning)
  yield Row(f"{name}.class_embed.bias", f"{classify}/bias", meaning=meaning)


def _stage(model: SegViT, name: str, path: str, *, masks: bool) -> Iterator[Row]:
  for index in range(model.decoder_layers):
    theirs, ours = f"{name}.layers.{index}", f"params/{path}_layer_{index}"
    yield from _packed(f"{theirs}.self_attn", f"{ours}/self_attention")
    if not masks:
      yield from _packed(f"{theirs}.multihead_attn", f"{ours}/cross_attention")
    yield from table.linear(f"{theirs}.linear1", f"{ours}/linear1")
    yield from table.linear(f"{theirs}.linear2", f"{ours}/linear2")
    for number in (1, 2, 3):
      yield from table.norm(f"{theirs}.norm{number}", f"{ours}/norm{number}")
    if masks:
      for part, own in (("q", "query"), ("k", "key"), ("v", "value"), ("proj", "out")):
        yield from table.linear(f"{theirs}.multihead_attn.{part}", f"{ours}/cross_attention/{own}")


def _packed(name: str, path: str) -> Iterator[Row]:
  yield Row(f"{name}.in_proj_weight", f"{path}/qkv_kernel", "packed")
  yield Row(f"{name}.in_proj_bias", f"{path}/qkv_bias", "packed_bias")
  yield from table.linear(f"{name}.out_proj", f"{path}/out")


def _empty_weight(model: SegViT, name: str) -> Row:
  weights = np.ones(model.num_classes + 1, np.float32)
  weights[-1] = _NO_OBJECT_WEIGHT
  return Row(f"{name}.{_BUFFER}", "", constant=weights)
