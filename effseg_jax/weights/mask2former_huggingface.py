"""Hugging Face's names of a Mask2Former with a Swin backbone -> the official ones.

The files of the hub have the names of transformers 4; version 5 has others in memory, and writes
them, too. Both are read. Projections that Hugging Face keeps apart are put together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_PIXEL_LEVEL = r"^model\.pixel_level_module\."
_SWIN = _PIXEL_LEVEL + r"encoder\.(?:swin\.)?"  # with `swin.` in version 5
_PIXEL_DECODER = _PIXEL_LEVEL + r"decoder\."
_TRANSFORMER = r"^model\.transformer_module\."

# Applied one after the other, first what a name begins with, then what follows.
_PARTS = (
  (_SWIN + r"embeddings\.patch_embeddings\.projection", "backbone.patch_embed.proj"),
  (_SWIN + r"embeddings\.norm", "backbone.patch_embed.norm"),
  (_SWIN + r"hidden_states_norms\.stage(\d)", lambda match: f"backbone.norm{int(match[1]) - 1}"),
  (_SWIN + r"encoder\.layers", "backbone.layers"),
  (_PIXEL_DECODER + r"(level_embed|encoder\.)", r"sem_seg_head.pixel_decoder.transformer.\1"),
  (_PIXEL_DECODER + "input_projections", "sem_seg_head.pixel_decoder.input_proj"),
  (_PIXEL_DECODER + "mask_projection", "sem_seg_head.pixel_decoder.mask_features"),
  (_PIXEL_DECODER + r"(adapter_1|layer_1)\.0", r"sem_seg_head.pixel_decoder.\1"),
  (_PIXEL_DECODER + r"(adapter_1|layer_1)\.1", r"sem_seg_head.pixel_decoder.\1.norm"),
  (r"^class_predictor", "sem_seg_head.predictor.class_embed"),
  (_TRANSFORMER + "queries_embedder", "sem_seg_head.predictor.query_embed"),
  (_TRANSFORMER + "queries_features", "sem_seg_head.predictor.query_feat"),
  (_TRANSFORMER + "level_embed", "sem_seg_head.predictor.level_embed"),
  (_TRANSFORMER + r"decoder\.layernorm", "sem_seg_head.predictor.decoder_norm"),
  (
    _TRANSFORMER + r"decoder\.mask_predictor\.mask_embedder\.(\d)\.0",
    r"sem_seg_head.predictor.mask_embed.layers.\1",
  ),
)
_SWIN_BLOCK = (
  (r"attention\.(?:self\.query|q_proj)\.", "attn.qkv.0."),
  (r"attention\.(?:self\.key|k_proj)\.", "attn.qkv.1."),
  (r"attention\.(?:self\.value|v_proj)\.", "attn.qkv.2."),
  (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
  (
    r"attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
    "attn.relative_position_bias_table",
  ),
  (r"layernorm_before\.", "norm1."),
  (r"layernorm_after\.", "norm2."),
  (r"(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
  (r"(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
)
_ENCODER_LAYER = (
  (r"self_attn_layer_norm\.", "norm1."),
  (r"final_layer_norm\.", "norm2."),
  (r"(?:mlp\.)?fc(\d)\.", r"linear\1."),
)
_DECODER_LAYER = (
  (r"self_attn\.q_proj\.(\w+)", r"transformer_self_attention_layers.N.self_attn.in_proj_\1.0"),
  (r"self_attn\.k_proj\.(\w+)", r"transformer_self_attention_layers.N.self_attn.in_proj_\1.1"),
  (r"self_attn\.v_proj\.(\w+)", r"transformer_self_attention_layers.N.self_attn.in_proj_\1.2"),
  (r"self_attn\.", "transformer_self_attention_layers.N.self_attn."),
  (r"self_attn_layer_norm\.", "transformer_self_attention_layers.N.norm."),
  (r"cross_attn\.", "transformer_cross_attention_layers.N.multihead_attn."),
  (r"cross_attn_layer_norm\.", "transformer_cross_attention_layers.N.norm."),
  (r"(?:mlp\.)?fc(\d)\.", r"transformer_ffn_layers.N.linear\1."),
  (r"final_layer_norm\.", "transformer_ffn_layers.N.norm."),
)

# A third of a packed projection: the place of the number in its name tells which.
_THIRD = re.compile(r"(.*\.(?:qkv|in_proj_\w+))\.([012])((?:\.\w+)?)$")


def is_huggingface(tensors: Mapping[str, Any]) -> bool:
  """Whether a file's names are Hugging Face's."""
  return any(name.startswith("model.pixel_level_module.") for name in tensors)


def renamed(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """The tensors under their official names; those without one keep their own.

  The last normalisation of Hugging Face's Swin is left out: segmentation does not use it.
  """
  found: dict[str, Any] = {}
  thirds: dict[str, dict[str, Any]] = {}
  for name, tensor in tensors.items():
    if re.match(_SWIN + r"layernorm\.", name):
      continue
    official = official_name(name)
    third = _THIRD.match(official)
    if third:
      thirds.setdefault(third[1] + third[3], {})[third[2]] = tensor
    else:
      found[official] = tensor
  for name, parts in thirds.items():
    if len(parts) == len("qkv"):
      found[name] = np.concatenate([np.asarray(parts[part]) for part in "012"])
  return found


def official_name(name: str) -> str:
  """The official name of a tensor; thirds of packed projections end with their number."""
  layer = re.match(_TRANSFORMER + r"decoder\.layers\.(\d+)\.(.*)", name)
  if layer:
    rest = _first_match(_DECODER_LAYER, layer[2])
    return (
      name if rest is None else f"sem_seg_head.predictor.{rest}".replace(".N.", f".{layer[1]}.")
    )
  for pattern, official in _PARTS:
    name, count = re.subn(pattern, official, name)
    if count:
      break
  for beginning, table in (
    (r"backbone\.layers\.\d\.blocks\.\d+\.", _SWIN_BLOCK),
    (r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.\d+\.", _ENCODER_LAYER),
  ):
    match = re.match(beginning, name)
    if match:
      rest = name[match.end() :]
      return match[0] + (_first_match(table, rest) or rest)
  return name


def _first_match(table: tuple[tuple[str, str], ...], name: str) -> str | None:
  """The name with its beginning replaced, or None if no pattern is there."""
  for pattern, official in table:
    found, count = re.subn("^" + pattern, official, name)
    if count:
      return found
  return None
