"""The model in a checkpoint, to be evaluated or used: nothing of training is loaded for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from effseg_jax.errors import UserError
from effseg_jax.weights.bundle import Bundle, load_bundle, model_of

# The folder of a working directory that holds a checkpoint for each of some steps.
CHECKPOINTS = "checkpoints"


def load_for_inference(path: str | Path) -> Bundle:
  """Loads a model to evaluate or to predict with.

  Args:
    path: a bundle file, a run's working directory (its best checkpoint by the evaluation metric,
      the latest if it has none), or the folder of one step.

  Returns:
    The model, its variables (the averaged ones, where the run kept an average; float32 on the
    host) and its card.

  Raises:
    UserError: if there is nothing there that can be loaded.
  """
  path = Path(path)
  if path.is_file():
    return load_bundle(path)
  step_folder = _step_folder(path)
  try:
    card = json.loads((step_folder / "card" / "metadata").read_text())
    state = read_state(step_folder / "state")
  except Exception as error:  # whatever the library meets in a damaged file
    raise UserError(
      f"{step_folder} cannot be read ({str(error).splitlines()[0]}); choose another step's folder."
    ) from error
  variables = state["average"] or {"params": state["params"], **state["model_state"]}
  return Bundle(model_of(card, str(path)), variables, card)


def _step_folder(path: Path) -> Path:
  """The folder of the step that a path means."""
  if (path / "state").is_dir():
    return path
  folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
  steps = {step: child for step, child in steps_in(folder).items() if (child / "state").is_dir()}
  if not steps:
    raise UserError(
      f"{path} holds no checkpoint; expected a bundle file (.safetensors, .npz) or the --workdir of"
      " a training run."
    )
  metric = _best_by(steps[max(steps)])
  return steps[max(steps, key=lambda step: (_score(steps[step], metric), step))]


def steps_in(folder: Path) -> dict[int, Path]:
  """The finished checkpoints by their step."""
  children = folder.iterdir() if folder.is_dir() else ()
  return {int(child.name): child for child in children if child.name.isdigit()}


def _best_by(step_folder: Path) -> str:
  """The metric by which a run chose its best when this step was saved."""
  return json.loads((step_folder / "config" / "metadata").read_text())["eval"]["best_by"]


def _score(step_folder: Path, metric: str) -> float:
  """A metric that is stored with a step; minus infinity where it has none."""
  path = step_folder / "metrics" / "metrics"
  metrics = json.loads(path.read_text()) if path.is_file() else {}
  return metrics.get(metric, -math.inf)


def read_state(folder: Path) -> dict[str, Any]:
  """Reads a saved state as nested dictionaries of host arrays."""
  checkpointer = ocp.PyTreeCheckpointer()
  folder = folder.absolute()  # orbax finds no metadata below a relative path
  tree = checkpointer.metadata(folder).item_metadata.tree
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  return checkpointer.restore(folder, restore_args=args)
