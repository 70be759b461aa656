"""Segments pictures and clips: `effseg predict --input=street.jpg --output=out`.

What is written depends on what the checkpoint was trained for:

* semantic: `NAME_classes.png`, the class of every pixel as an 8-bit PNG with a palette, and
  `NAME_overlay.png`, the picture tinted by class beside a legend;
* universal: `NAME_panoptic.png` and `.json`, and `NAME_overlay.png` with names and scores;
* audio-visual: a clip with what sounds tinted, and its masks.

An input that cannot be read is reported and skipped; the exit status is then 1. `--checkpoint` is a
bundle (`.safetensors`) or the working directory of a run. The network sees a picture at the size
that the model was evaluated at; `--scale` says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from effseg_jax import platform
from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError

if TYPE_CHECKING:
  from effseg_jax.prediction import Predictor
  from effseg_jax.weights.bundle import Bundle

_DEFAULT = Path("checkpoints") / "afformer_tiny_camvid.safetensors"


def load(checkpoint: str | Path | None) -> Bundle:
  """Loads the checkpoint, by default the released one beside this file.

  Raises:
    UserError: if it is missing or cannot be read.
  """
  from effseg_jax.run.checkpoint import load_for_inference

  path = Path(checkpoint or Path(__file__).resolve().parent / _DEFAULT)
  if not path.exists():
    hint = "" if checkpoint else " Give --checkpoint=FILE, or the --workdir of a training run."
    raise UserError(f"{path} does not exist.{hint}")
  if path.suffix in (".pth", ".pt", ".pkl"):
    raise UserError(
      f"{path} does not say which classes it knows; convert it to a bundle (.safetensors) with"
      " effseg convert."
    )
  return load_for_inference(path)


def predict(predictor: Predictor, source: str | Path, output: str | Path) -> int:
  """Predicts every input, and prints a line for each.

  Args:
    predictor: of the checkpoint.
    source: a file, or a folder of files.
    output: folder; made if it is missing.

  Returns:
    How many inputs could not be read.

  Raises:
    UserError: if there is nothing to read, or the folder cannot be made.
  """
  paths = predictor.inputs(Path(source))
  folder = Path(output)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--output={output} is a file; expected a folder.")
  folder.mkdir(parents=True, exist_ok=True)
  stems = [path.stem for path in paths]
  failed = 0
  for path in paths:
    # a.jpg and a.png must not overwrite each other's results
    name = path.stem if stems.count(path.stem) == 1 else path.name
    try:
      print(f"{path.name}: {predictor(path, folder / name)}", flush=True)
    except UserError as error:
      failed += 1
      print(f"skipped: {error}", file=sys.stderr, flush=True)
  done = len(paths) - failed
  print(f"{done} of {len(paths)} written to {folder}" + (f", {failed} skipped" if failed else ""))
  return failed


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  flags.DEFINE_string(
    "checkpoint",
    None,
    f"A bundle or a run's working directory; default: {_DEFAULT.as_posix()}.",
    flag_values=values,
  )
  flags.DEFINE_string("input", None, "A picture, a clip, or a folder of them.", flag_values=values)
  flags.DEFINE_string("output", None, "Folder for what is written.", flag_values=values)
  flags.DEFINE_string(
    "scale", None, "Size the network sees: 720x540, or a factor: 1.5.", flag_values=values
  )


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and predicts."""
  no_arguments(arguments)
  if not values.input or not values.output:
    raise UserError("--input and --output are needed; see effseg predict --help.")
  if not Path(values.input).exists():  # told before anything slow is loaded
    raise UserError(f"{values.input} does not exist; expected a picture, a clip or a folder.")
  platform.tune_host_malloc()
  platform.use_compilation_cache()

  from effseg_jax.prediction import make_predictor

  options = {name: values[name].value for name in ("scale",) if values[name].value is not None}
  predictor = make_predictor(load(values.checkpoint), **options)
  failed = predict(predictor, values.input, values.output)
  return 1 if failed else 0
