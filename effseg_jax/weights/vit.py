"""The plain ViT's names: mmsegmentation's and timm's rows, and all files that are read as these.

Files come from mmsegmentation, from timm, from DINOv2 (whose names are nearly timm's), and from the
ViT's authors (`.npz`, under the names of their JAX code). Positions and patch kernels of another
size are resized where `load_weights` is asked to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.models.backbones.vit import ViT
from effseg_jax.ops.resize import antialiased_bicubic_matrix, bicubic_matrix, bilinear_matrix
from effseg_jax.weights import table
from effseg_jax.weights.table import Part, Row

# How names begin in a file of the backbone alone, whichever of the libraries wrote it.
BEGINNINGS = ("cls_token", "pos_embed", "patch_embed.", "layers.", "blocks.", "norm.")

BACKBONE = Part(r"backbone\.", r"\w+/backbone/", BEGINNINGS)

# What classifiers hold besides, and mmsegmentation's final normalisation.
_UNUSED = re.compile(
  r"(backbone\.)?(ln1\.|norm\.|head\.|head_dist\.|fc_norm\.|pre_logits\.|mask_token$)"
)

_JAX_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)")
_JAX_LEAVES = {"scale": "weight", "kernel": "weight", "bias": "bias"}
_JAX_MODULES = {
  "LayerNorm_0": "norm1",
  "LayerNorm_2": "norm2",
  "MlpBlock_3/Dense_0": "mlp.fc1",
  "MlpBlock_3/Dense_1": "mlp.fc2",
  "MultiHeadDotProductAttention_1/out": "attn.proj",
}
_JAX_ATTENTION = "MultiHeadDotProductAttention_1"

_TO_MMSEGMENTATION = (
  (re.compile(r"^backbone\.patch_embed\.proj\."), "backbone.patch_embed.projection."),
  (re.compile(r"^backbone\.blocks\.(\d+)\.norm(\d)\."), r"backbone.layers.\1.ln\2."),
  (
    re.compile(r"^backbone\.blocks\.(\d+)\.attn\.qkv\."),
    r"backbone.layers.\1.attn.attn.in_proj_",
  ),
  (
    re.compile(r"^backbone\.blocks\.(\d+)\.attn\.proj\."),
    r"backbone.layers.\1.attn.attn.out_proj.",
  ),
  (re.compile(r"^backbone\.blocks\.(\d+)\.mlp\.fc1\."), r"backbone.layers.\1.ffn.layers.0.0."),
  (re.compile(r"^backbone\.blocks\.(\d+)\.mlp\.fc2\."), r"backbone.layers.\1.ffn.layers.1."),
)


# --- Rows ----------------------------------------------------------------------------------------


def mmsegmentation_rows(
  vit: ViT, name: str = "backbone", path: str = "params/backbone"
) -> Iterator[Row]:
  """The tensors of mmsegmentation's ViT, in its order."""
  yield Row(f"{name}.cls_token", f"{path}/cls_token")
  yield Row(f"{name}.pos_embed", f"{path}/pos_embed", meaning=_positions(vit))
  yield from _patches(vit, f"{name}.patch_embed.projection", f"{path}/patch_embed")
  for index in range(vit.depth):
    theirs, ours = f"{name}.layers.{index}", f"{path}/block_{index}"
    yield from table.norm(f"{theirs}.ln1", f"{ours}/norm1")
    yield Row(f"{theirs}.attn.attn.in_proj_weight", f"{ours}/attention/qkv_kernel", "packed")
    yield Row(f"{theirs}.attn.attn.in_proj_bias", f"{ours}/attention/qkv_bias", "packed_bias")
    yield from table.linear(f"{theirs}.attn.attn.out_proj", f"{ours}/attention/out")
    yield from table.norm(f"{theirs}.ln2", f"{ours}/norm2")
    yield from table.linear(f"{theirs}.ffn.layers.0.0", f"{ours}/fc1")
    yield from table.linear(f"{theirs}.ffn.layers.1", f"{ours}/fc2")


def timm_rows(vit: ViT, name: str, path: str = "params/backbone") -> Iterator[Row]:
  """The tensors of timm's ViT with registers and layer scales, in its order."""
  yield Row(f"{name}.cls_token", f"{path}/cls_token")
  if vit.num_registers:
    yield Row(f"{name}.reg_token", f"{path}/reg_token")
  yield Row(f"{name}.pos_embed", f"{path}/pos_embed", meaning=_positions(vit))
  yield from _patches(vit, f"{name}.patch_embed.proj", f"{path}/patch_embed")
  for index in range(vit.depth):
    theirs, ours = f"{name}.blocks.{index}", f"{path}/block_{index}"
    yield from table.norm(f"{theirs}.norm1", f"{ours}/norm1")
    yield Row(f"{theirs}.attn.qkv.weight", f"{ours}/attention/qkv_kernel", "packed")
    yield Row(f"{theirs}.attn.qkv.bias", f"{ours}/attention/qkv_bias", "packed_bias")
    yield from table.linear(f"{theirs}.attn.proj", f"{ours}/attention/out")
    yield Row(f"{theirs}.ls1.gamma", f"{ours}/scale1")
    yield from table.norm(f"{theirs}.norm2", f"{ours}/norm2")
    yield from table.linear(f"{theirs}.mlp.fc1", f"{ours}/fc1")
    yield from table.linear(f"{theirs}.mlp.fc2", f"{ours}/fc2")
    yield Row(f"{theirs}.ls2.gamma", f"{ours}/scale2")
  yield from table.norm(f"{name}.norm", f"{path}/norm")


def _patches(vit: ViT, name: str, path: str) -> Iterator[Row]:
  meaning = f"patches of {vit.patch_size}x{vit.patch_size} pixels"
  yield Row(f"{name}.weight", f"{path}/kernel", "conv", meaning=meaning)
  yield Row(f"{name}.bias", f"{path}/bias")


def _positions(vit: ViT) -> str:
  rows, cols = vit.grid
  return (
    f"positions of {rows}x{cols} patches, those of image_size {rows * vit.patch_size}x"
    f"{cols * vit.patch_size}; resize=True fits others"
  )


# --- Names ---------------------------------------------------------------------------------------


def is_jax(tensors: Mapping[str, Any]) -> bool:
  """Whether a file has the names of the ViT authors' own code."""
  return any(name.startswith("Transformer/encoderblock_") for name in tensors)


def from_jax(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors under the ViT authors' names -> the same under timm's, in PyTorch's layout.

  Classifiers, the representation layer before them and the final normalisation are left out.
  """
  found = {
    "cls_token": tensors["cls"],
    "pos_embed": tensors["Transformer/posembed_input/pos_embedding"],
    "patch_embed.proj.weight": np.transpose(tensors["embedding/kernel"], (3, 2, 0, 1)),
    "patch_embed.proj.bias": tensors["embedding/bias"],
  }
  for name, tensor in tensors.items():
    match = _JAX_BLOCK.fullmatch(name)
    if not match:
      continue
    block, (module, _, leaf) = f"blocks.{match[1]}", match[2].rpartition("/")
    if module in _JAX_MODULES:
      # Heads and their channels, (heads, d), are neighbours: one axis.
      array = tensor.reshape(-1, tensor.shape[-1]).T if leaf == "kernel" else tensor
      found[f"{block}.{_JAX_MODULES[module]}.{_JAX_LEAVES[leaf]}"] = array
    elif module == f"{_JAX_ATTENTION}/query":
      parts = [tensors[name.replace("/query/", f"/{part}/")] for part in ("query", "key", "value")]
      columns = leaf == "kernel"
      parts = [x.reshape(len(x), -1).T if columns else x.reshape(-1) for x in parts]
      found[f"{block}.attn.qkv.{_JAX_LEAVES[leaf]}"] = np.concatenate(parts)
  return found


def mmsegmentation_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """A file's tensors with those of the backbone under mmsegmentation's names, with its prefix.

  Args:
    tensors: of a whole segmenter of mmsegmentation, or of a backbone of any of the libraries.
  """
  if is_jax(tensors):
    tensors = from_jax(tensors)
  found = {}
  for name, tensor in tensors.items():
    if _UNUSED.match(name):
      continue
    official = f"backbone.{name}" if name.startswith(BEGINNINGS) else name
    for pattern, replacement in _TO_MMSEGMENTATION:
      official = pattern.sub(replacement, official)
    found[official] = tensor
  return found


# --- Sizes ---------------------------------------------------------------------------------------


def resize_backbone(
  vit: ViT, tensors: Mapping[str, Any], positions: str, patches: str, method: str
) -> tuple[dict[str, Any], list[str]]:
  """Fits positions, and patch kernels where the method allows it, to a ViT's sizes.

  Args:
    vit: that takes them.
    tensors: under official names.
    positions: the official name of the position table (1, N, C).
    patches: the official name of the patch kernel (C, D, p, p).
    method: "bilinear" or "bicubic", as PyTorch resizes without antialiasing; "antialias": bicubic
      with it, and patch kernels by the pseudo-inverse of the same resize (FlexiViT, Beyer et al.
      2023, section 3.3).

  Returns:
    The tensors, and a line for each that was resized.

  Raises:
    UserError: if the positions in the file are those of no square grid.
  """
  matrix = {
    "bilinear": bilinear_matrix,
    "bicubic": bicubic_matrix,
    "antialias": antialiased_bicubic_matrix,
  }[method]
  tensors, lines = dict(tensors), []
  if positions in tensors:
    tensor = np.asarray(tensors[positions], np.float32)
    prefix = int(vit.class_position)
    rows, cols = vit.grid
    if tensor.ndim == 3 and tensor.shape[1] != rows * cols + prefix:
      side = math.isqrt(tensor.shape[1] - prefix)
      if side**2 != tensor.shape[1] - prefix:
        raise UserError(
          f"{positions} has {tensor.shape[1]} positions; expected a square of patches"
          f"{' and the class token' if prefix else ''}, or {rows}x{cols} patches."
        )
      old = tensor[0, prefix:].reshape(side, side, -1).astype(np.float64)
      new = np.einsum("yr,xc,rcd->yxd", matrix(rows, side), matrix(cols, side), old, optimize=True)
      new = new.reshape(1, rows * cols, -1).astype(np.float32)
      tensors[positions] = np.concatenate([tensor[:, :prefix], new], axis=1)
      lines.append(f"positions of {side}x{side} patches were resized to {rows}x{cols}")
  if patches in tensors and method == "antialias":
    tensor = np.asarray(tensors[patches], np.float32)
    size = tensor.shape[-1]
    if tensor.ndim == 4 and size != vit.patch_size:
      inverse = np.linalg.pinv(matrix(vit.patch_size, size))
      new = np.einsum(
        "ocij,iy,jx->ocyx", tensor.astype(np.float64), inverse, inverse, optimize=True
      )
      tensors[patches] = new.astype(np.float32)
      lines.append(
        f"patch kernels of {size}x{size} pixels were resized to {vit.patch_size}x{vit.patch_size}"
      )
  return tensors, lines
