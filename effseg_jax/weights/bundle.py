"""A released model in one file: weights under our own names, and a card that describes them.

The file is `.safetensors`; the card is JSON in its metadata. Anyone can open it, and nothing in it
is executed.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from effseg_jax import json_fields
from effseg_jax.errors import UserError
from effseg_jax.models import create_model
from effseg_jax.weights import load_weights


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model ready to be used.

  Attributes:
    model: the Flax module.
    variables: its collections, float32 on the host.
    card: JSON-compatible: `model` (`name`, `fields`), `task` (`name` and its fields: classes,
      palette, mean and std among them), and the description of the training.
  """

  model: nn.Module
  variables: Mapping[str, Any]
  card: Mapping[str, Any]


def save_bundle(
  path: str | Path, variables: Mapping[str, Any], card: Mapping[str, Any], *, half: bool = False
) -> None:
  """Writes a bundle.

  Args:
    path: ending in `.safetensors`.
    variables: collections of float32 arrays.
    card: see `Bundle`.
    half: store float16; half the size, and about three digits.
  """
  dtype = np.float16 if half else np.float32
  flat = flatten_dict(jax.device_get(dict(variables)), sep="/")
  with np.errstate(over="ignore"):  # checked below
    arrays = {name: np.ascontiguousarray(array, dtype) for name, array in flat.items()}
  for name, array in arrays.items():
    if not np.isfinite(array).all():
      raise UserError(f"{name} is not finite as {np.dtype(dtype).name}; nothing was written.")
  save_file(arrays, str(path), metadata={"card": json.dumps(card)})


def read_bundle(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads a bundle's arrays (flat names, as stored) and its card.

  Raises:
    UserError: if the file is no bundle, or is damaged.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path} is missing; expected a bundle (.safetensors).")
  try:
    with safe_open(str(path), framework="numpy") as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is damaged or no .safetensors file ({error}).") from None
  if "card" not in metadata:
    raise UserError(
      f"{path} has no card; expected a bundle of this library. Official weights are read by"
      " load_weights and converted by effseg convert."
    )
  return arrays, _parse_card(metadata["card"], path)


def load_bundle(path: str | Path) -> Bundle:
  """Loads a model from a bundle, or opens one that `effseg export` wrote.

  Raises:
    UserError: if the file is no bundle, is damaged, or does not fit the model it names.
  """
  from effseg_jax.weights.exported import is_exported, load_exported

  if is_exported(path):
    return load_exported(path)
  _, card = read_bundle(path)
  model = model_of(card, str(path))
  return Bundle(model, load_weights(model, path), card)


def model_of(card: Mapping[str, Any], origin: str) -> nn.Module:
  """The model that a card describes.

  Args:
    card: with `model`.
    origin: how messages call the checkpoint.

  Raises:
    UserError: for an unknown model or field, or a value of another type.
  """
  name, fields = card["model"]["name"], card["model"]["fields"]
  try:
    model = create_model(name, **fields)
  except (TypeError, ValueError) as error:  # the latter is what a UserError is, too
    raise UserError(f"{origin}: the card's model cannot be made: {error}") from None
  hints = typing.get_type_hints(type(model))
  for field, value in fields.items():
    if field in hints:
      json_fields.check(
        json_fields.as_tuples(value), hints[field], f"{origin}: the card's model.fields.{field}"
      )
  return model


def _parse_card(text: str, path: Path) -> dict[str, Any]:
  """Reads a card; raises `UserError` unless it names a model and its fields."""
  try:
    card = json.loads(text)
    model = card["model"]
    complete = isinstance(model["name"], str) and isinstance(model["fields"], dict)
  except (ValueError, KeyError, TypeError):
    complete = False
  if not complete:
    raise UserError(f"{path} has a broken card; expected JSON with a model's name and fields.")
  return card
