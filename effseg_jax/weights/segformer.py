"""SegFormer's official names and ours, in the official order.

Four families of names are read: the authors', those of Hugging Face's hub (which transformers 4 has
in memory, and 5 writes), those of transformers 5 in memory, and MMSegmentation's. Our variables
follow the authors'; what is written has the hub's names, or MMSegmentation's where the head is
theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.models.backbones.pvt import PVTv2
from effseg_jax.models.segformer import SegFormer
from effseg_jax.weights import pvt, table
from effseg_jax.weights.table import Part, Row

PARTS = {"backbone": Part(r"backbone\.", r"\w+/backbone/", pvt.BEGINNINGS)}

# A module's names: the authors', the hub's, transformers 5's, MMSegmentation's. {s} is the stage
# from 0, {S} from 1, {b} the block. Attention's projections are not here: see `_ATTENTION`.
_STAGE = (
  (
    "patch_embed{S}.proj",
    "encoder.patch_embeddings.{s}.proj",
    "stages.{s}.patch_embeddings.proj",
    "layers.{s}.0.projection",
  ),
  (
    "patch_embed{S}.norm",
    "encoder.patch_embeddings.{s}.layer_norm",
    "stages.{s}.patch_embeddings.layer_norm",
    "layers.{s}.0.norm",
  ),
  ("norm{S}", "encoder.layer_norm.{s}", "stages.{s}.layer_norm", "layers.{s}.2"),
)
_BLOCK = ("block{S}.{b}", "encoder.block.{s}.{b}", "stages.{s}.blocks.{b}", "layers.{s}.1.{b}")
_IN_BLOCK = (
  ("norm1", "layer_norm_1", "layernorm_before", "norm1"),
  ("attn.proj", "attention.output.dense", "attention.o_proj", "attn.attn.out_proj"),
  (
    "attn.sr",
    "attention.self.sr",
    "attention.sequence_reduction.sequence_reduction",
    "attn.sr",
  ),
  (
    "attn.norm",
    "attention.self.layer_norm",
    "attention.sequence_reduction.layer_norm",
    "attn.norm",
  ),
  ("norm2", "layer_norm_2", "layernorm_after", "norm2"),
  ("mlp.fc1", "mlp.dense1", "mlp.fc1", "ffn.layers.0"),
  ("mlp.dwconv.dwconv", "mlp.dwconv.dwconv", "mlp.dwconv.dwconv", "ffn.layers.1"),
  ("mlp.fc2", "mlp.dense2", "mlp.fc2", "ffn.layers.4"),
)
# Projections of attention: name, and how many thirds of [query; key; value] its rows are.
_ATTENTION = (
  (("attn.q", 1), ("attn.kv", 2)),
  (("attention.self.query", 1), ("attention.self.key", 1), ("attention.self.value", 1)),
  (("attention.q_proj", 1), ("attention.k_proj", 1), ("attention.v_proj", 1)),
  (("attn.attn.in_proj_", 3),),
)
_PREFIXES = ("backbone.", "segformer.", "segformer.", "backbone.")
_AUTHORS, _HUB, _TRANSFORMERS_5, _MMSEG = range(4)

_HEAD = (
  *(
    (f"linear_c{s + 1}.proj", f"linear_c.{s}.proj", f"linear_projections.{s}.proj")
    for s in range(4)
  ),
  ("linear_fuse.conv", "linear_fuse", "linear_fuse"),
  ("linear_fuse.bn", "batch_norm", "batch_norm"),
  ("linear_pred", "classifier", "classifier"),
)
_IMAGE_HEAD = ("head", "classifier", "classifier", "head")
# The authors' class inherits a classifier that it never calls.
_DEAD = ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias")


def example_inputs(model: SegFormer) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Arguments of a model, of any size it takes: no parameter's shape depends on it."""
  return (jax.ShapeDtypeStruct((1, 64, 64, model.in_channels), jnp.float32),)


def rows(model: SegFormer, paths: Collection[str]) -> list[Row]:
  """The state dict of a model under the authors' names (the head of MMSegmentation under theirs).

  Args:
    model: gives depths and kind of head.
    paths: the model's own variables; rows of a head that it lacks are left out.
  """
  encoder = PVTv2(model.widths, model.depths, reductions=model.reductions)
  listed = list(pvt.rows(encoder))
  if any("/head/" in path for path in paths):
    heads = {"official": _official_head, "mmseg": _mmseg_head, "image": _image_head}
    listed += heads[model.head]()
  return listed


def _official_head() -> Iterator[Row]:
  for stage in range(4):
    name = f"decode_head.linear_c{stage + 1}.proj"
    yield from table.linear(name, f"params/head/linear_{stage}")
  yield from table.conv("decode_head.linear_fuse.conv", "params/head/fuse")
  yield from table.batch_norm("decode_head.linear_fuse.bn", "head/norm")
  yield from table.conv("decode_head.linear_pred", "params/head/classify", bias=True)


def _mmseg_head() -> Iterator[Row]:
  yield from table.conv("decode_head.conv_seg", "params/head/classify", bias=True)
  for stage in range(4):
    yield from table.conv_norm(f"decode_head.convs.{stage}", f"head/level_{stage}")
  yield from table.conv("decode_head.fusion_conv.conv", "params/head/fuse")
  yield from table.batch_norm("decode_head.fusion_conv.bn", "head/norm")


def _image_head() -> Iterator[Row]:
  yield from table.linear("head", "params/head/classify")


# --- Other families of names ---------------------------------------------------------------------


def renamed(model: SegFormer, tensors: Mapping[str, Any]) -> dict[str, Any]:
  """A file's tensors under the authors' names; those without one keep their own.

  Args:
    model: that the file is for.
    tensors: of any of the four families, with or without the encoder's prefix.
  """
  family = _family_of(tensors)
  if family == _AUTHORS:
    dead = _DEAD if model.head == "official" else ()
    return {name: x for name, x in tensors.items() if name not in dead}
  tensors = _with_prefix(family, tensors)
  found = {}
  for authors, theirs in _modules(model, family):
    for leaf in _LEAVES:
      if f"{theirs}.{leaf}" in tensors:
        found[f"{authors}.{leaf}"] = _without_window(tensors.pop(f"{theirs}.{leaf}"), authors)
  for block, their_block in _blocks(model, family):
    for leaf in ("weight", "bias"):
      names = [_leaf_of(f"{their_block}.{name}", leaf) for name, _ in _ATTENTION[family]]
      if not all(name in tensors for name in names):
        continue  # named as missing, and the pieces that are there as unexpected
      packed = np.concatenate([np.asarray(tensors.pop(name)) for name in names])
      query = len(packed) // 3
      found[f"{block}.attn.q.{leaf}"] = packed[:query]
      found[f"{block}.attn.kv.{leaf}"] = packed[query:]
  return {**found, **tensors}


def exported(model: SegFormer, tensors: Mapping[str, Any]) -> dict[str, Any]:
  """The tensors of `rows`, as the hub or MMSegmentation names them, in their order."""
  family = _MMSEG if model.head == "mmseg" else _HUB
  names, blocks = dict(_modules(model, family)), dict(_blocks(model, family))
  found = {}
  for name, tensor in tensors.items():
    module, _, leaf = name.rpartition(".")
    block, _, projection = module.rpartition(".attn.")
    if projection == "q" and leaf == "weight":
      found.update(_projections(tensors, block, blocks[block], family))
    elif projection not in ("q", "kv"):
      window = family == _MMSEG and leaf == "weight" and module.endswith((".fc1", ".fc2"))
      found[f"{names.get(module, module)}.{leaf}"] = tensor[..., None, None] if window else tensor
  return found


def _projections(
  tensors: Mapping[str, Any], block: str, their_block: str, family: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Names and tensors of a block's projections, packed as a family packs them."""
  packed = {
    leaf: np.concatenate([tensors[f"{block}.attn.{part}.{leaf}"] for part in ("q", "kv")])
    for leaf in ("weight", "bias")
  }
  third, begin = len(packed["bias"]) // 3, 0
  for name, thirds in _ATTENTION[family]:
    end = begin + thirds * third
    for leaf, array in packed.items():
      yield _leaf_of(f"{their_block}.{name}", leaf), array[begin:end]
    begin = end


_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _leaf_of(module: str, leaf: str) -> str:
  """`in_proj_` has its leaf in its own name."""
  return f"{module}{leaf}" if module.endswith("_") else f"{module}.{leaf}"


def _without_window(tensor: Any, name: str) -> Any:
  """MMSegmentation's linear layers of the MLP are 1x1 convolutions."""
  if name.endswith((".fc1", ".fc2")) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
    return tensor[:, :, 0, 0]
  return tensor


def _modules(model: SegFormer, family: int) -> Iterator[tuple[str, str]]:
  """Pairs of the authors' and a family's name, of all modules but attention's projections."""
  prefixes = _PREFIXES[_AUTHORS], _PREFIXES[family]
  for stage in range(len(model.depths)):
    for names in _STAGE:
      pair = names[_AUTHORS], names[family]
      yield tuple(
        prefix + name.format(s=stage, S=stage + 1)
        for prefix, name in zip(prefixes, pair, strict=True)
      )
  for (block, theirs), names in itertools.product(_blocks(model, family), _IN_BLOCK):
    yield f"{block}.{names[_AUTHORS]}", f"{theirs}.{names[family]}"
  if model.head == "image":
    yield _IMAGE_HEAD[_AUTHORS], _IMAGE_HEAD[family]
  elif family != _MMSEG:
    for names in _HEAD:
      yield f"decode_head.{names[_AUTHORS]}", f"decode_head.{names[family]}"


def _blocks(model: SegFormer, family: int) -> Iterator[tuple[str, str]]:
  """Pairs of the authors' and a family's name of each block."""
  for stage, depth in enumerate(model.depths):
    for block in range(depth):
      yield tuple(
        _PREFIXES[kind] + _BLOCK[kind].format(s=stage, S=stage + 1, b=block)
        for kind in (_AUTHORS, family)
      )


def _family_of(tensors: Mapping[str, Any]) -> int:
  """Which family's name the first stage's embedding has."""
  for family in (_HUB, _TRANSFORMERS_5, _MMSEG):
    name = _STAGE[0][family].format(s=0) + ".weight"
    if name in tensors or _PREFIXES[family] + name in tensors:
      return family
  return _AUTHORS


def _with_prefix(family: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Puts the encoder's prefix where a file of the encoder alone lacks it."""
  prefix, beginnings = _PREFIXES[family], ("encoder.", "stages.", "layers.")
  return {prefix + name if name.startswith(beginnings) else name: x for name, x in tensors.items()}
