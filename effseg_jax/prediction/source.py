"""Where a model comes from: a released name, a bundle, a run's folder, an official file."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effseg_jax.errors import UserError, suggestion
from effseg_jax.models import list_models

if TYPE_CHECKING:
  from effseg_jax.weights.bundle import Bundle

# Checkpoints that come with the package: a link in a checkout, files in an installed wheel.
CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"

_SUFFIX = ".safetensors"


def list_checkpoints() -> list[str]:
  """The names of the released checkpoints that come with the package, sorted."""
  return sorted(path.stem for path in CHECKPOINTS.glob(f"*{_SUFFIX}"))


def find(source: str | os.PathLike[str]) -> Path:
  """The file or folder that a source means.

  Args:
    source: a path, or the name of a released checkpoint.

  Raises:
    UserError: if there is neither.
  """
  path, name = Path(source), os.fspath(source)
  released = CHECKPOINTS / f"{name.removesuffix(_SUFFIX)}{_SUFFIX}"
  plain = path.name == name
  # A name wins over a folder of the same name that holds no checkpoint.
  if plain and released.is_file() and not path.is_file() and not _holds_checkpoint(path):
    return released
  if path.exists():
    return path
  if plain and not path.suffix:
    names = list_checkpoints()
    raise UserError(
      f"{name} is neither a path nor a released checkpoint; released are"
      f" {', '.join(names) or 'none'}.{suggestion(name, names)}"
    )
  raise UserError(
    f"{name} does not exist; expected a released name, a bundle ({_SUFFIX}), a run's working"
    " directory or an official file."
  )


def read_source(
  source: str | os.PathLike[str], *, dataset: str | None = None, model: str | None = None
) -> Bundle:
  """Reads a model, its variables and its card.

  Args:
    source: see `effseg_jax.load`.
    dataset: whose classes an official file knows.
    model: name of the model of an official file; None: the one that fits.

  Raises:
    UserError: if it cannot be read.
  """
  from effseg_jax.weights.bundle import load_bundle
  from effseg_jax.weights.exported import is_exported
  from effseg_jax.weights.loading import is_bundle

  path = find(source)
  if path.is_dir():
    from effseg_jax.run.saved_model import load_for_inference

    return load_for_inference(path)
  if is_exported(path) or is_bundle(path):
    return load_bundle(path)
  if dataset is None:
    raise UserError(
      f"{path} does not say which classes it knows; name their data set (dataset='ade20k',"
      " --dataset=ade20k), or convert it to a bundle with effseg convert."
    )
  return _read_official(path, dataset, model)


def _holds_checkpoint(path: Path) -> bool:
  return path.is_dir() and any((path / name).is_dir() for name in ("checkpoints", "state"))


def _read_official(path: Path, dataset: str, model_name: str | None) -> Bundle:
  """Reads official weights with the classes of a data set."""
  from effseg_jax.models import create_model
  from effseg_jax.prediction.official import card_of, class_table
  from effseg_jax.weights.bundle import Bundle
  from effseg_jax.weights.loading import load_weights
  from effseg_jax.weights.reader import read_state_dict

  table = class_table(dataset, None)
  tensors: Any = read_state_dict(path)
  names = [model_name] if model_name else _alike_first(path.stem)
  problems = []
  for name in names:
    fields = {"num_classes": len(table[0])}
    try:
      model = create_model(name, **fields)
      variables = load_weights(model, tensors)
    except UserError as error:
      problems.append(error)
      continue
    return Bundle(model, variables, card_of(name, fields, table, dataset, path.name))
  if model_name:
    raise problems[0]
  raise UserError(
    f"{path} holds the weights of no model of this library with {len(table[0])} classes"
    f" ({dataset}); name the model to see what differs (model='afformer_base',"
    " --model=afformer_base)."
  )


def _alike_first(stem: str) -> list[str]:
  """All models, those whose name is in a file's first, then those whose name is most like it.

  Variants that compute the same weights in another way come last.
  """
  stem = stem.lower().replace("-", "_")

  def order(name: str) -> tuple[int, bool, float]:
    likeness = difflib.SequenceMatcher(None, name, stem).ratio()
    return -len(name) * (name in stem), name.endswith("_fft"), -likeness

  return sorted(list_models(), key=order)
