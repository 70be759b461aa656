"""Official weights -> a model's variables, and back. Anything that does not fit is an error.

The released training code loads with `strict=False`, and a file of the wrong shapes has cost
people their results without a word (issues 13, 15 and 16 of the AFFormer repository). Here one
error names every tensor that is missing, unexpected, of the wrong shape, or at odds with its twin.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from effseg_jax.errors import UserError, suggestion
from effseg_jax.ops.backend import target_platform
from effseg_jax.weights import table
from effseg_jax.weights.bundle import read_bundle
from effseg_jax.weights.reader import is_safetensors, read_state_dict, tensors_by_name
from effseg_jax.weights.table import Part, Row

Shapes = Mapping[str, tuple[int, ...]]

# Class of a model -> module with `PARTS`, `example_inputs(model)`, `rows(model, paths)`, and
# `renamed(model, tensors)`: a file's tensors under the official names, whatever names it has. It
# may have `resized(model, tensors)`, which fits tensors whose sizes depend on the image's and says
# so, and `exported(model, tensors)`: the rows' tensors as a file should name and pack them.
_NAMES = {
  "effseg_jax.models.afformer.AFFormer": "effseg_jax.weights.afformer",
  "effseg_jax.models.avesformer.AVESFormer": "effseg_jax.weights.avesformer",
  "effseg_jax.models.backbones.vggish.VGGish": "effseg_jax.weights.vggish",
  "effseg_jax.models.efficientvit.EfficientViT": "effseg_jax.weights.efficientvit",
  "effseg_jax.models.eomt.EoMT": "effseg_jax.weights.eomt",
  "effseg_jax.models.segvit.SegViT": "effseg_jax.weights.segvit",
  "effseg_jax.models.setr.SETR": "effseg_jax.weights.setr",
  "effseg_jax.models.mask2former.Mask2Former": "effseg_jax.weights.mask2former",
  "effseg_jax.models.segformer.SegFormer": "effseg_jax.weights.segformer",
}


def load_weights(
  model: nn.Module,
  source: str | Path | Mapping[str, Any],
  partial: str | None = None,
  *,
  resize: bool = False,
) -> dict[str, Any]:
  """Reads a model's weights.

  Args:
    model: as `create_model` gives it; its variant and classes must be those of the weights.
    source: path of a checkpoint with the official names (`.pth`, `.pt`, `.pkl`, `.safetensors`,
      `.npz`) or of one of our own bundles (`.safetensors` with a card), or a mapping from official
      names to arrays in PyTorch's layout.
    partial: `"backbone"` reads that part alone, from a file of the whole model or of the backbone
      (ImageNet weights, whose names may lack `backbone.`); the rest of the file is not looked at.
      Models may have other parts: an error names them.
    resize: whether positions (and EoMT's patch kernels) of another image or patch size are resized
      to the model's; one line on stderr says so. With `partial` they always are. Without it they do
      not fit, because a trained model's accuracy holds for its own size.

  Returns:
    The model's collections (`params`, `batch_stats` and others, if it has them) of float32 numpy
    arrays; with `partial`, what they hold of that part.

  Raises:
    UserError: if the file cannot be read (see `reader.read_state_dict`) or does not fit: every
      missing, unexpected and wrongly shaped tensor is named, and every alias of a shared tensor
      that differs from it.
  """
  names = _names_of(model)
  if partial is not None and partial not in names.PARTS:
    raise UserError(
      f"partial is {partial!r}; expected None or one of {', '.join(names.PARTS)}."
      f"{suggestion(partial, names.PARTS)}"
    )
  shapes = variable_shapes(model)
  if not isinstance(source, Mapping) and is_bundle(Path(source)):
    arrays = {**_dead_zeros(names.rows(model, shapes), shapes), **read_bundle(source)[0]}
    return _load_own(arrays, shapes, str(source), names.PARTS.get(partial))
  if isinstance(source, Mapping):
    origin, tensors = "the given mapping", tensors_by_name(source)
  else:
    origin, tensors = str(source), read_state_dict(source)
  rows = names.rows(model, shapes)
  tensors = names.renamed(model, tensors)
  for name, part in names.PARTS.items():
    tensors = _with_prefix(tensors, name, part.beginnings)
  if (resize or partial is not None) and hasattr(names, "resized"):
    tensors, lines = names.resized(model, tensors)
    for line in lines:
      print(f"{origin}: {line}.", file=sys.stderr)
  if partial is not None:
    part = names.PARTS[partial]
    shapes = _part_of(shapes, part)
    rows = [row for row in rows if re.match(part.names, row.name)]
    tensors = {name: x for name, x in tensors.items() if re.match(part.names, name)}
  _check_fit(rows, shapes, tensors, origin, names.PARTS if partial is None else {})
  return unflatten_dict(
    {
      row.path: table.to_ours(np.asarray(tensors[row.name]), row.layout)
      for row in rows
      if row.path and not row.canonical
    },
    sep="/",
  )


def parts_in(model: nn.Module, source: str | Path) -> tuple[str, ...]:
  """The parts of a model whose official names a file holds, each complete.

  A part inside another one is not named beside it. `load_weights(..., partial=part)` reads them.
  """
  names = _names_of(model)
  rows = names.rows(model, variable_shapes(model))
  tensors = names.renamed(model, read_state_dict(source))
  for name, part in names.PARTS.items():
    tensors = _with_prefix(tensors, name, part.beginnings)
  held = {
    name: wanted
    for name, part in names.PARTS.items()
    if (wanted := {row.name for row in rows if row.path and re.match(part.names, row.name)})
    and wanted <= set(tensors)
  }
  return tuple(a for a in held if not any(held[a] < held[b] for b in held))


def export_weights(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Writes a model's variables under the official names, for `load_state_dict(strict=True)`.

  Args:
    model: whose variables they are.
    variables: its collections. Layers that the official model holds without using them are zero
      where the collections lack them.

  Returns:
    Official name -> float32 array in PyTorch's layout, in the official order; shared tensors once
    for every name, and the counters of batches int64 0.

  Raises:
    UserError: if the variables are not the model's, or have no place in the official model.
  """
  shapes = variable_shapes(model)
  names = _names_of(model)
  rows = names.rows(model, shapes)
  arrays = flatten_dict(jax.device_get(dict(variables)), sep="/")
  arrays = {path: np.asarray(array) for path, array in arrays.items()}
  arrays = {**_dead_zeros(rows, shapes), **arrays}
  _check_own(arrays, shapes, "the variables")
  unnamed = sorted(set(arrays) - {row.path for row in rows})
  if unnamed:
    raise UserError(
      f"this variant cannot be exported: the official model has no {', '.join(unnamed)}."
    )
  tensors = {
    row.name: table.to_official(arrays[row.path], row.layout)
    if row.path
    else np.array(row.constant)
    for row in rows
  }
  return names.exported(model, tensors) if hasattr(names, "exported") else tensors


@functools.lru_cache(maxsize=16)
def variable_shapes(model: nn.Module) -> Shapes:
  """Shapes of all variables, `collection/module/.../leaf`; nothing is computed.

  Raises:
    UserError: if the model's class has no official weights.
  """
  inputs = _names_of(model).example_inputs(model)
  # Shapes do not depend on the platform, and this one's formulations are the shortest to trace.
  with target_platform("gpu"):
    tree = jax.eval_shape(
      lambda key, *args: model.init(key, *args, train=False), jax.random.key(0), *inputs
    )
  return {path: leaf.shape for path, leaf in flatten_dict(dict(tree), sep="/").items()}


def _names_of(model: nn.Module) -> ModuleType:
  """The module that knows the official names of a model's class."""
  kind = f"{type(model).__module__}.{type(model).__qualname__}"
  if kind not in _NAMES:
    raise UserError(f"{type(model).__name__} has no official weights that this library supports.")
  return importlib.import_module(_NAMES[kind])


def _with_prefix(
  tensors: Mapping[str, Any], part: str, beginnings: tuple[str, ...]
) -> Mapping[str, Any]:
  """Puts `part.` before the names of a file that holds that part alone."""
  if any(name.startswith(f"{part}.") for name in tensors):
    return tensors
  return {
    f"{part}.{name}" if name.startswith(beginnings) else name: x for name, x in tensors.items()
  }


def _check_fit(
  rows: Collection[Row],
  shapes: Shapes,
  tensors: Mapping[str, Any],
  origin: str,
  parts: Mapping[str, Part],
) -> None:
  """Compares official tensors with those of a model; raises one error with all differences."""
  missing, wrong, differing = [], [], []
  for row in rows:
    if row.name not in tensors:
      if row.path:  # PyTorch itself does without the counters, which old files lack
        missing.append(row.name)
      continue
    if not row.path:
      continue
    array = tensors[row.name]
    expected = table.official_shape(shapes[row.path], row.layout)
    if tuple(array.shape) != expected:
      meaning = f" ({row.meaning})" if row.meaning else ""
      wrong.append(f"{row.name} has shape {tuple(array.shape)}, expected {expected}{meaning}")
    elif np.asarray(array).dtype.kind not in "biuf":
      wrong.append(f"{row.name} has type {np.asarray(array).dtype}, expected numbers")
    elif row.canonical in tensors and not np.array_equal(
      np.asarray(array), np.asarray(tensors[row.canonical]), equal_nan=True
    ):
      differing.append(f"{row.name} != {row.canonical}")
  named = {row.path for row in rows}
  missing += [f"{path} (ours alone)" for path in shapes if path not in named]
  unexpected = sorted(set(tensors) - {row.name for row in rows})
  hint = ""
  for name, part in parts.items():
    fits = [row for row in rows if row.path and re.match(part.names, row.name)]
    inside = re.compile(f"{part.names}|{part.paths}")
    if fits and not any(inside.match(line) for line in (*missing, *unexpected, *wrong)):
      hint = f' The {name} fits: partial="{name}" loads it alone.'
  groups = {
    "missing": missing,
    "unexpected": unexpected,
    "of the wrong shape or type": wrong,
    "copies of shared tensors that differ": differing,
  }
  _raise_differences(origin, groups, hint)


def _dead_zeros(rows: Collection[Row], shapes: Shapes) -> dict[str, np.ndarray]:
  """Replaces layers that are never used, if a training run or a bundle does not contain them."""
  return {row.path: np.zeros(shapes[row.path], np.float32) for row in rows if row.dead}


def _load_own(
  arrays: Mapping[str, np.ndarray], shapes: Shapes, origin: str, part: Part | None
) -> dict[str, Any]:
  """The variables that a bundle holds under our own names."""
  if part is not None:
    arrays, shapes = _part_of(arrays, part), _part_of(shapes, part)
  _check_own(arrays, shapes, origin)
  return unflatten_dict({path: np.asarray(x, np.float32) for path, x in arrays.items()}, sep="/")


def _check_own(arrays: Mapping[str, np.ndarray], shapes: Shapes, origin: str) -> None:
  """Compares arrays under our own names with a model's; raises one error with all differences."""
  wrong = [
    f"{path} has shape {arrays[path].shape}, expected {shape}"
    for path, shape in shapes.items()
    if path in arrays and arrays[path].shape != shape
  ]
  missing, unexpected = sorted(set(shapes) - set(arrays)), sorted(set(arrays) - set(shapes))
  groups = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
  _raise_differences(origin, groups)


def _part_of(flat: Mapping[str, Any], part: Part) -> dict[str, Any]:
  """The entries that belong to a part."""
  return {path: x for path, x in flat.items() if re.match(part.paths, path)}


def is_bundle(path: Path) -> bool:
  """Whether a file is one of our bundles; the reader reports other problems of a file."""
  if not path.is_file():
    return False
  with path.open("rb") as file:
    if not is_safetensors(file.read(16)):
      return False
  try:
    with safe_open(str(path), framework="numpy") as file:
      return "card" in (file.metadata() or {})
  except (SafetensorError, OSError):
    return False


def _raise_differences(origin: str, groups: Mapping[str, Collection[str]], hint: str = "") -> None:
  """Raises the one error, if any group (what is the matter -> tensors) has a member."""
  found = [f"{len(names)} {what}: {', '.join(names)}" for what, names in groups.items() if names]
  if found:
    raise UserError(f"{origin} does not fit the model; {'; '.join(found)}.{hint}")
