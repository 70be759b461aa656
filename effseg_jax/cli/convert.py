r"""Converts official weights to a bundle of this library, and bundles back to official names.

  effseg convert --model=afformer_base --dataset=ade20k --input=AFFormer_base_ade20k.pth \
    --output=afformer_base_ade20k.safetensors --half
  effseg convert --model=mask2former_r50 --dataset=coco_panoptic \
    --input=model_final_94dc52.pkl --output=mask2former_r50_coco.safetensors
  effseg convert --input=afformer_base_ade20k.safetensors --to_torch=back.pth

A bundle is a `--checkpoint` for `effseg predict` and `effseg eval`: weights, and a card with the
model, the classes, their colours and the normalisation. `--to_torch` writes all names of the
official state dict, for `load_state_dict(strict=True)`; `.pth` needs PyTorch, `.safetensors` does
not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from safetensors.numpy import save_file

import effseg_jax
from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.prediction.official import GENERIC, card_of, class_table
from effseg_jax.weights.bundle import load_bundle, save_bundle
from effseg_jax.weights.loading import export_weights


def to_bundle(
  model_name: str,
  source: str | Path,
  output: str | Path,
  *,
  dataset: str = GENERIC,
  num_classes: int | None = None,
  fields: dict[str, Any] | None = None,
  half: bool = False,
) -> dict[str, Any]:
  """Writes a bundle of official weights; returns its card.

  Args:
    model_name: one of `effseg_jax.list_models()`.
    source: a file with official names; see `effseg_jax.load_weights`.
    output: ends in `.safetensors`; its folder is made if it is missing.
    dataset: whose classes and colours go into the card, or `generic` for numbered classes.
    num_classes: of the weights; the data set's if it is not given.
    fields: others of the model, where the weights are not those of its defaults.
    half: store float16.

  Raises:
    UserError: if something is unknown, or the weights do not fit.
  """
  output = Path(output)
  if output.suffix != ".safetensors":
    raise UserError(f"--output={output}: a bundle's name ends in .safetensors.")
  table = class_table(dataset, num_classes)
  fields = {**(fields or {}), "num_classes": len(table[0])}
  variables = effseg_jax.load_weights(effseg_jax.create_model(model_name, **fields), source)
  card = card_of(model_name, fields, table, dataset, Path(source).name)
  output.parent.mkdir(parents=True, exist_ok=True)
  save_bundle(output, variables, card, half=half)
  return card


def to_official(bundle_path: str | Path, output: str | Path) -> int:
  """Writes a bundle's weights under their official names; returns how many entries.

  Args:
    bundle_path: a bundle.
    output: ends in `.pth` or `.pt` (needs PyTorch), or `.safetensors`.

  Raises:
    UserError: if the bundle cannot be read or exported, or PyTorch is needed and missing.
  """
  output = Path(output)
  if output.suffix not in (".pth", ".pt", ".safetensors"):
    raise UserError(f"--to_torch={output}: expected a name ending in .pth, .pt or .safetensors.")
  torch = None
  if output.suffix != ".safetensors":
    try:
      import torch
    except ImportError:
      raise UserError(
        f"--to_torch={output} needs PyTorch, which is not installed; a name ending in .safetensors"
        " does not."
      ) from None
  bundle = load_bundle(bundle_path)
  arrays = export_weights(bundle.model, bundle.variables)
  output.parent.mkdir(parents=True, exist_ok=True)
  if torch is None:
    save_file(arrays, str(output))
  else:
    meta = {"CLASSES": list(bundle.card["task"]["classes"])}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    torch.save({"meta": meta, "state_dict": tensors}, output)
  return len(arrays)


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  string("input", None, "Official weights; a bundle with --to_torch.")
  string("output", None, "The bundle to write, ending in .safetensors.")
  string("model", None, "One of effseg_jax.list_models().")
  string("dataset", GENERIC, "Whose classes: ade20k, cityscapes, ...")
  string("fields", None, 'Other fields of the model, as JSON: {"norm": "bn"}.')
  string("to_torch", None, "Write official names: .pth, .pt or .safetensors.")
  flags.DEFINE_integer(
    "num_classes", None, "The data set's number if it is not given.", flag_values=values
  )
  flags.DEFINE_bool("half", False, "Store float16: half the size.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and converts."""
  no_arguments(arguments)
  if not values.input:
    raise UserError("--input is needed; see effseg convert --help.")
  if values.to_torch:
    entries = to_official(values.input, values.to_torch)
    print(f"{values.to_torch}: {entries} entries with official names")
    return
  if not values.output or not values.model:
    raise UserError("--model and --output are needed (or --to_torch for the opposite direction).")
  card = to_bundle(
    values.model,
    values.input,
    values.output,
    dataset=values.dataset,
    num_classes=values.num_classes,
    fields=_json_object(values.fields),
    half=values.half,
  )
  size = Path(values.output).stat().st_size
  print(
    f"{values.output}: {values.model}, {len(card['task']['classes'])} classes,"
    f" {'float16' if values.half else 'float32'}, {size / 1e6:.1f} MB"
  )


def _json_object(text: str | None) -> dict[str, Any] | None:
  """Reads `--fields`.

  Raises:
    UserError: if it is no JSON object.
  """
  if text is None:
    return None
  try:
    fields = json.loads(text)
  except json.JSONDecodeError:
    fields = None
  if not isinstance(fields, dict):
    raise UserError(f'--fields={text}; expected a JSON object such as {{"norm": "bn"}}.')
  return fields
