"""From files to files: what `predict.py` does for each task. One file per task."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from effseg_jax import task_table
from effseg_jax.errors import UserError, suggestion

if TYPE_CHECKING:
  from effseg_jax.weights.bundle import Bundle

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Predictor(Protocol):
  """A model that turns input files into result files."""

  def inputs(self, source: Path) -> list[Path]:
    """The inputs that a path means: itself, or what a folder holds.

    Raises:
      UserError: if there are none.
    """

  def __call__(self, path: Path, stem: Path) -> str:
    """Predicts one input and writes files whose names begin with `stem`.

    Returns:
      The line to print.

    Raises:
      UserError: if the input cannot be read.
    """


def make_predictor(bundle: Bundle, **options: Any) -> Predictor:
  """Makes the predictor of a bundle's task.

  Args:
    bundle: model, variables and card.
    **options: of that task's predictor.

  Raises:
    UserError: if the task has no predictor, or does not know an option.
  """
  name = bundle.card["task"]["name"]
  predictor = task_table.find(name, "predictor")
  if predictor is None:
    known = [task for task, parts in task_table.TASKS.items() if parts.predictor]
    raise UserError(
      f"the checkpoint was trained for {name}; prediction needs one for {', '.join(known)}."
    )
  known = list(inspect.signature(predictor).parameters)[1:]
  for option in options:
    if option not in known:
      raise UserError(
        f"--{option} means nothing to a checkpoint for {name}, which knows"
        f" {', '.join(f'--{k}' for k in known)}.{suggestion(option, known)}"
      )
  return predictor(bundle, **options)


def pictures_in(source: Path) -> list[Path]:
  """The picture itself, or the pictures of a folder, by name.

  Raises:
    UserError: if there are none.
  """
  if source.is_file():
    return [source]
  if not source.is_dir():
    raise UserError(f"{source} does not exist; expected a picture or a folder of pictures.")
  found = sorted(path for path in source.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
  if not found:
    raise UserError(f"{source} holds no picture ({', '.join(PICTURE_SUFFIXES)}).")
  return found
