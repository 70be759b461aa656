"""The official names of Mask2Former, PRO-SCALE and ECO-M2F, and ours, in the official order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.models.mask2former import Mask2Former, MaskedAttentionDecoder
from effseg_jax.weights import backbones, mask2former_huggingface, pixel_decoder, table
from effseg_jax.weights.table import Part, Row

# "body" is everything but the layer whose size the number of classes decides.
PARTS = {
  "backbone": backbones.PART,
  "body": Part(
    r"backbone\.|sem_seg_head\.pixel_decoder\.|sem_seg_head\.predictor\.(?!class_embed\.)",
    r"\w+/backbone/|\w+/pixel_decoder/|\w+/decoder/(?!head/classify/)",
  ),
}

_NO_OBJECT_WEIGHT = 0.1  # of the official loss, which keeps it in a buffer


def example_inputs(model: Mask2Former) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Arguments of a model, of any size: no parameter's shape depends on it."""
  del model
  return (jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),)


def renamed(model: Mask2Former, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """A file's tensors under the names of the official models.

  Args:
    model: that the file is for.
    tensors: of an official model, older ones included, of Hugging Face's Mask2Former, or of a
      classifier on ImageNet.

  Returns:
    Name -> tensor, without buffers.
  """
  if mask2former_huggingface.is_huggingface(tensors):
    tensors = mask2former_huggingface.renamed(tensors)
  tensors = backbones.renamed(model.backbone, tensors)
  return {
    name.replace(".static_query.", ".query_feat."): x
    for name, x in tensors.items()
    if name != "criterion.empty_weight"
  }


def rows(model: Mask2Former, paths: Collection[str]) -> list[Row]:
  """The official state dict of a model; `paths`, of its own variables, all have their row."""
  del paths
  no_object = np.ones(model.num_classes + 1, np.float32)
  no_object[-1] = _NO_OBJECT_WEIGHT
  return [
    *backbones.rows(model.backbone),
    *pixel_decoder.rows(model.pixel_decoder),
    *_predictor(model.decoder, "sem_seg_head.predictor", "params/decoder"),
    Row("criterion.empty_weight", "", constant=no_object),
  ]


def _predictor(decoder: MaskedAttentionDecoder, name: str, path: str) -> Iterator[Row]:
  kinds = (
    ("self_attention", "self_attn", "self"),
    ("cross_attention", "multihead_attn", "cross"),
  )
  for kind, module, norm in kinds:
    for index in range(decoder.layers):
      layer, ours = f"{name}.transformer_{kind}_layers.{index}", f"{path}/layer_{index}"
      yield Row(f"{layer}.{module}.in_proj_weight", f"{ours}/{kind}/in_kernel", "linear")
      yield Row(f"{layer}.{module}.in_proj_bias", f"{ours}/{kind}/in_bias")
      yield from table.linear(f"{layer}.{module}.out_proj", f"{ours}/{kind}/out")
      yield from table.norm(f"{layer}.norm", f"{ours}/{norm}_norm")
  for index in range(decoder.layers):
    layer, ours = f"{name}.transformer_ffn_layers.{index}", f"{path}/layer_{index}"
    yield from table.linear(f"{layer}.linear1", f"{ours}/linear1")
    yield from table.linear(f"{layer}.linear2", f"{ours}/linear2")
    yield from table.norm(f"{layer}.norm", f"{ours}/mlp_norm")
  yield from table.norm(f"{name}.decoder_norm", f"{path}/head/norm")
  yield Row(f"{name}.query_feat.weight", f"{path}/query_features")
  yield Row(f"{name}.query_embed.weight", f"{path}/query_positions")
  yield Row(f"{name}.level_embed.weight", f"{path}/level_embed")
  meaning = "one row for each class and one for no object"
  classify = f"{path}/head/classify"
  yield Row(f"{name}.class_embed.weight", f"{classify}/kernel", "linear", meaning=meaning)
  yield Row(f"{name}.class_embed.bias", f"{classify}/bias", meaning=meaning)
  for index in range(3):
    yield from table.linear(f"{name}.mask_embed.layers.{index}", f"{path}/head/embed_{index}")
