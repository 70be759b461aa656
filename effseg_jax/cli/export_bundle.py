r"""Makes a released bundle of a run's checkpoint.

  effseg export_bundle --workdir=runs/camvid --output=afformer_tiny_camvid.safetensors \
    --half --licence=CC-BY-NC-4.0 --note="trained on CamVid train" \
    --metrics=runs/camvid/eval_test/metrics.json

The bundle holds the weights (averaged, where the run kept an average) and a card: model, classes,
colours, normalisation, the size of the network's input, and the given notes. It is a `--checkpoint`
for `effseg predict` and `effseg eval`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError


def export(
  workdir: str | Path,
  output: str | Path,
  *,
  step: str = "best",
  half: bool = False,
  note: str | None = None,
  licence: str | None = None,
  metrics: str | Path | None = None,
) -> dict[str, Any]:
  """Writes a bundle; returns its card.

  Args:
    workdir: of the run.
    output: ends in `.safetensors`; its folder is made if it is missing.
    step: `best`, `latest` or a step's number.
    half: store float16.
    note: for the card.
    licence: for the card.
    metrics: path of a `metrics.json` of `effseg eval`.

  Raises:
    UserError: if there is no such checkpoint, or a file cannot be read.
  """
  from effseg_jax.run.saved_model import load_for_inference
  from effseg_jax.weights.bundle import save_bundle

  output = Path(output)
  if output.suffix != ".safetensors":
    raise UserError(f"--output={output}: a bundle's name ends in .safetensors.")
  scores = None if metrics is None else read_metrics(metrics)
  bundle = load_for_inference(checkpoint_folder(workdir, step))
  card = {**bundle.card}
  inference = card.get("inference") or trained_inference(workdir)
  extras = {"inference": inference, "metrics": scores, "note": note, "licence": licence}
  card.update({key: value for key, value in extras.items() if value})
  output.parent.mkdir(parents=True, exist_ok=True)
  save_bundle(output, bundle.variables, card, half=half)
  return card


def checkpoint_folder(workdir: str | Path, step: str) -> Path:
  """What `load_for_inference` is given to read this step of a run.

  Raises:
    UserError: if the run has no such step.
  """
  if step == "best":
    return Path(workdir)
  saved = _saved_steps(workdir)
  if not saved:
    raise UserError(f"{workdir} holds no checkpoint; expected the --workdir of a training run.")
  if step == "latest":
    return saved[max(saved)]
  if not step.isdigit() or int(step) not in saved:
    raise UserError(
      f"--step={step}: {workdir} has the steps {', '.join(map(str, sorted(saved)))}; or use best or"
      " latest."
    )
  return saved[int(step)]


def trained_inference(workdir: str | Path) -> dict[str, Any] | None:
  """The size at which the run evaluated, from the configuration kept with its checkpoints."""
  saved = _saved_steps(workdir)
  path = saved[max(saved)] / "config" / "metadata" if saved else None
  if path is None or not path.is_file():
    return None
  options = json.loads(path.read_text(encoding="utf-8")).get("eval", {})
  found = {key: options[key] for key in ("scale", "multiple") if key in options}
  return found or None


def read_metrics(path: str | Path) -> dict[str, Any]:
  """The part of a `metrics.json` that goes into a card.

  Raises:
    UserError: if the file is missing or no such file.
  """
  try:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(
      f"--metrics={path} cannot be read ({error}); expected that of effseg eval."
    ) from None
  if not isinstance(found, dict) or "inference" not in found:
    raise UserError(f"--metrics={path} is no metrics.json of effseg eval: it names no inference.")
  # The numbers and the settings that they depend on; tables per class and paths stay behind.
  numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
  return {**{key: found[key] for key in ("data", "split", "inference")}, **numbers}


def _saved_steps(workdir: str | Path) -> dict[int, Path]:
  """The finished checkpoints of a run by their step."""
  folder = Path(workdir) / "checkpoints"
  children = folder.iterdir() if folder.is_dir() else ()
  return {int(child.name): child for child in children if child.name.isdigit()}


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  flags.DEFINE_string("workdir", None, "Working directory of the training run.", flag_values=values)
  flags.DEFINE_string(
    "output", None, "The bundle to write, ending in .safetensors.", flag_values=values
  )
  flags.DEFINE_string(
    "step", "best", "best (by the evaluation metric), latest, or a number.", flag_values=values
  )
  flags.DEFINE_bool(
    "half", False, "Store float16: half the size, about three digits.", flag_values=values
  )
  flags.DEFINE_string("note", None, "A note for users of the weights.", flag_values=values)
  flags.DEFINE_string("licence", None, "Licence of the weights.", flag_values=values)
  flags.DEFINE_string(
    "metrics", None, "metrics.json of effseg eval, stored in the card.", flag_values=values
  )


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and exports."""
  no_arguments(arguments)
  if not values.workdir or not values.output:
    raise UserError("--workdir and --output are needed.")
  card = export(
    values.workdir,
    values.output,
    step=values.step,
    half=values.half,
    note=values.note,
    licence=values.licence,
    metrics=values.metrics,
  )
  size = Path(values.output).stat().st_size
  print(
    f"{values.output}: {card['model']['name']}, {len(card['task']['classes'])} classes,"
    f" {np.dtype('float16' if values.half else 'float32').name}, {size / 1e6:.1f} MB"
  )
