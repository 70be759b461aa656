"""SETR's names in mmsegmentation and ours, in its order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effseg_jax.models.setr import SETR
from effseg_jax.weights import table, vit
from effseg_jax.weights.table import Row

PARTS = {"backbone": vit.BACKBONE}

_MAPS = 4  # that are read off the ViT


def example_inputs(model: SETR) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Arguments of a model, of any size: no parameter's shape depends on it."""
  return (jax.ShapeDtypeStruct((1, 64, 64, model.in_channels), jnp.float32),)


def renamed(model: SETR, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """A file's tensors under mmsegmentation's names, see `vit.mmsegmentation_names`.

  Auxiliary heads are left out where the model has none.
  """
  tensors = vit.mmsegmentation_names(tensors)
  if model.auxiliary:
    return tensors
  return {name: x for name, x in tensors.items() if not name.startswith("auxiliary_head.")}


def resized(model: SETR, tensors: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
  """Official tensors with positions fitted to the model's image size, and a line that says so."""
  names = ("backbone.pos_embed", "backbone.patch_embed.projection.weight")
  return vit.resize_backbone(model.vit(), tensors, *names, "bilinear")


def rows(model: SETR, paths: Collection[str]) -> list[Row]:
  """The official state dict of a model; with `features_only` it is the backbone's alone."""
  listed = [*vit.mmsegmentation_rows(model.vit()), *_heads(model)]
  # The ViT ends with the last block that is read.
  return [row for row in listed if not row.path or row.path in paths]


def _heads(model: SETR) -> Iterator[Row]:
  if model.features_only:
    return
  if model.decoder == "mla":
    yield from _aggregation()
  else:
    yield from _up_head("decode_head", "head", 1 if model.decoder == "naive" else 4)
  if not model.auxiliary:
    return
  for index in range(_MAPS if model.decoder == "mla" else _MAPS - 1):
    theirs, ours = f"auxiliary_head.{index}", f"auxiliary_{index}"
    if model.decoder == "mla":
      yield from _classifier(theirs, ours)
    else:
      yield from _up_head(theirs, ours, model.aux_convs)


def _aggregation() -> Iterator[Row]:
  for index in range(_MAPS):
    yield from table.norm(f"neck.norm.{index}", f"params/neck/norm_{index}")
  for theirs, ours in (("channel_proj", "project"), ("feat_extract", "extract")):
    for index in range(_MAPS):
      yield from table.conv_norm(f"neck.mla.{theirs}.{index}", f"neck/{ours}_{index}")
  yield from _classifier("decode_head", "head")
  for index in range(_MAPS):
    for layer in range(2):
      yield from table.conv_norm(
        f"decode_head.up_convs.{index}.{layer}", f"head/conv_{index}_{layer}"
      )


def _up_head(name: str, path: str, convs: int) -> Iterator[Row]:
  yield from _classifier(name, path)
  yield from table.norm(f"{name}.norm", f"params/{path}/norm")
  for index in range(convs):
    yield from table.conv_norm(f"{name}.up_convs.{index}.0", f"{path}/conv_{index}")


def _classifier(name: str, path: str) -> Iterator[Row]:
  meaning = "one row for each class"
  yield Row(f"{name}.conv_seg.weight", f"params/{path}/classify/kernel", "conv", meaning=meaning)
  yield Row(f"{name}.conv_seg.bias", f"params/{path}/classify/bias", meaning=meaning)
