"""EoMT's official names and ours, Hugging Face's, and those of DINOv2, from which it starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.models.backbones.vit import grid_of
from effseg_jax.models.eomt import EoMT
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD
from effseg_jax.weights import table, vit
from effseg_jax.weights.table import Part, Row

_BACKBONE = "network.encoder.backbone"

# "body" is everything but the layer whose size the number of classes decides.
PARTS = {
  "backbone": Part(rf"{re.escape(_BACKBONE)}\.", r"\w+/backbone/"),
  "body": Part(r"network\.(?!class_head\.)", r"\w+/backbone/|\w+/queries$|\w+/head/(?!classify/)"),
}

_NO_OBJECT_WEIGHT = 0.1  # of the official loss, which keeps it in a buffer

_BUFFERS = re.compile(
  r"(network\.)?attn_mask_probs$|network\.encoder\.pixel_(mean|std)$|criterion\.empty_weight$"
  r"|mask_token$|embeddings\.mask_token$"
)

# DINOv3's own names, and Hugging Face's of the EoMT that is built on it.
_DINOV3 = re.compile(
  r"(.*\.)?(rope_embed\.|storage_tokens$|mlp\.(up|down)_proj\.|embeddings\.patch_embeddings\.weight)"
)

_HUGGINGFACE = (
  (r"embeddings\.cls_token$", f"{_BACKBONE}.cls_token"),
  (r"embeddings\.register_tokens$", f"{_BACKBONE}.reg_token"),
  (r"embeddings\.position_embeddings\.weight$", f"{_BACKBONE}.pos_embed"),
  (r"embeddings\.patch_embeddings\.projection\.", f"{_BACKBONE}.patch_embed.proj."),
  (r"layernorm\.", f"{_BACKBONE}.norm."),
  (r"layers\.(\d+)\.attention\.out_proj\.", rf"{_BACKBONE}.blocks.\1.attn.proj."),
  (r"layers\.(\d+)\.attention\.([qkv])_proj\.", rf"{_BACKBONE}.blocks.\1.attn.qkv.\2."),
  (r"layers\.(\d+)\.layer_scale(\d)\.lambda1$", rf"{_BACKBONE}.blocks.\1.ls\2.gamma"),
  (r"layers\.(\d+)\.(norm\d|mlp\.fc\d)\.", rf"{_BACKBONE}.blocks.\1.\2."),
  (r"query\.", "network.q."),
  (r"class_predictor\.", "network.class_head."),
  (r"mask_head\.fc1\.", "network.mask_head.0."),
  (r"mask_head\.fc2\.", "network.mask_head.2."),
  (r"mask_head\.fc3\.", "network.mask_head.4."),
  (r"upscale_block\.block\.(\d)\.layernorm2d\.", r"network.upscale.\1.norm."),
  (r"upscale_block\.block\.(\d)\.", r"network.upscale.\1."),
)
_THIRD = re.compile(r"(.*\.attn\.qkv)\.([qkv])\.(weight|bias)$")


def example_inputs(model: EoMT) -> tuple[jax.ShapeDtypeStruct, ...]:
  """One image of the model's size."""
  rows, cols = (n * model.patch_size for n in grid_of(model.image_size, model.patch_size))
  return (jax.ShapeDtypeStruct((1, rows, cols, model.in_channels), jnp.float32),)


def renamed(model: EoMT, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """A file's tensors under the names of the official code.

  Args:
    model: that the file is for.
    tensors: of the official code (a hub file or a Lightning checkpoint), of Hugging Face's EoMT,
      of DINOv2 (its own file, or timm's) or of another plain ViT.

  Returns:
    Name -> tensor, without buffers.

  Raises:
    UserError: for DINOv3's weights.
  """
  del model
  tensors = {name.replace("._orig_mod", ""): x for name, x in tensors.items()}
  if any(_DINOV3.match(name) for name in tensors):
    raise UserError(
      "these weights are DINOv3's or made from them: another architecture (rotary positions), under"
      " a licence of its own, that is not supported; use those of DINOv2 (dinov2_vit*14_reg4)."
    )
  if any(name.startswith("embeddings.") for name in tensors):
    tensors = _from_huggingface(tensors)
  elif not any(name.startswith("network.") for name in tensors):
    tensors = _from_backbone(tensors)
  return {name: x for name, x in tensors.items() if not _BUFFERS.match(name)}


def resized(model: EoMT, tensors: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
  """Official tensors fitted to the model's image and patch size, and a line for what changed."""
  names = (f"{_BACKBONE}.pos_embed", f"{_BACKBONE}.patch_embed.proj.weight")
  return vit.resize_backbone(model.vit(), tensors, *names, "antialias")


def rows(model: EoMT, paths: Collection[str]) -> list[Row]:
  """The official state dict of a model; with `features_only` it is the backbone's alone."""
  del paths
  backbone = vit.timm_rows(model.vit(), _BACKBONE)
  if model.features_only:
    return list(backbone)
  no_object = np.ones(model.num_classes + 1, np.float32)
  no_object[-1] = _NO_OBJECT_WEIGHT
  mean, std = (
    (np.asarray(x, np.float32) / 255.0).reshape(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD)
  )
  return [
    Row("network.attn_mask_probs", "", constant=np.zeros(model.query_blocks, np.float32)),
    Row("network.encoder.pixel_mean", "", constant=mean),
    Row("network.encoder.pixel_std", "", constant=std),
    *backbone,
    *_heads(model),
    Row("criterion.empty_weight", "", constant=no_object),
  ]


def _heads(model: EoMT) -> Iterator[Row]:
  path = "params/head"
  yield Row("network.q.weight", "params/queries")
  meaning = "one row for each class and one for no object"
  classify = f"{path}/classify"
  yield Row("network.class_head.weight", f"{classify}/kernel", "linear", meaning=meaning)
  yield Row("network.class_head.bias", f"{classify}/bias", meaning=meaning)
  for index in range(3):
    yield from table.linear(f"network.mask_head.{2 * index}", f"{path}/embed_{index}")
  for index in range(model.scale_blocks):
    theirs, ours = f"network.upscale.{index}", f"{path}/scale_{index}"
    yield Row(f"{theirs}.conv1.weight", f"{ours}/conv1/kernel", "transposed_conv")
    yield Row(f"{theirs}.conv1.bias", f"{ours}/conv1/bias")
    yield from table.conv(f"{theirs}.conv2", f"{ours}/conv2")
    yield from table.norm(f"{theirs}.norm", f"{ours}/norm")


def _from_huggingface(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Puts projections together that Hugging Face keeps apart; what is unknown keeps its name."""
  found: dict[str, Any] = {}
  thirds: dict[str, dict[str, Any]] = {}
  for name, tensor in tensors.items():
    official = _official_name(name)
    third = _THIRD.match(official)
    if third:
      thirds.setdefault(f"{third[1]}.{third[3]}", {})[third[2]] = tensor
    elif official.endswith(".pos_embed") and tensor.ndim == 2:
      found[official] = np.asarray(tensor)[None]
    else:
      found[official] = tensor
  for name, parts in thirds.items():
    if len(parts) == len("qkv"):
      found[name] = np.concatenate([np.asarray(parts[part]) for part in "qkv"])
  return found


def _official_name(name: str) -> str:
  """The official name of a tensor; thirds of packed projections keep their q, k or v."""
  for pattern, official in _HUGGINGFACE:
    found, count = re.subn("^" + pattern, official, name)
    if count:
      return found
  return name


def _from_backbone(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """A ViT of the `.npz`, DINOv2's or timm's names: positions of the class token are added to it.

  The function stays the same: EoMT's class token has no position, and gets the sum of both.
  """
  if vit.is_jax(tensors):
    tensors = vit.from_jax(tensors)
  tensors = {name.removeprefix("backbone."): x for name, x in tensors.items()}
  tensors = {("reg_token" if name == "register_tokens" else name): x for name, x in tensors.items()}
  if "cls_token" in tensors and "pos_embed" in tensors:
    class_token, positions = (np.asarray(tensors[name]) for name in ("cls_token", "pos_embed"))
    side = round((positions.shape[1] - 1) ** 0.5)
    # timm's file of DINOv2 has done this already: its table is a square without the token.
    if positions.ndim == 3 and positions.shape[1] == side**2 + 1:
      tensors["cls_token"] = class_token + positions[:, :1]
      tensors["pos_embed"] = positions[:, 1:]
  beginnings = (*vit.BEGINNINGS, "reg_token")
  return {
    f"{_BACKBONE}.{name}" if name.startswith(beginnings) else name: x for name, x in tensors.items()
  }
