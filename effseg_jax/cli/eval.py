"""Evaluates a model: `effseg eval --config=afformer/camvid --checkpoint=runs/camvid`.

The configuration defines the data and the size of the network's input; the checkpoint defines the
model. It is a released bundle (`.safetensors`), the working directory of a run (its best
checkpoint, with averaged weights if the run kept an average), or a file with official names
(`.pth`; then the configuration defines the model). Without `--checkpoint`, the run in `--workdir`
is evaluated.

Any field can be set: `--config.eval.split=test`, `--config.eval.mode=slide`,
`--config.eval.scales='(0.75,1.0,1.25)' --config.eval.flip=True`.

Several processes evaluate together in the same way as they train: see `effseg train --help`.

The output folder (default `WORKDIR/eval_SPLIT`) receives `metrics.json`, the evaluation's pictures
(`samples.png`, and more by task), and with `--predictions` the predictions in the format of the
benchmark's servers and tools.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from effseg_jax import platform
from effseg_jax.cli import Flags, define_config, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.run import processes

if TYPE_CHECKING:
  import flax.linen as nn

  from effseg_jax.evaluators import EvaluationResult
  from effseg_jax.tasks import Task
  from effseg_jax.training.state import Variables


def evaluate(
  config: ConfigDict, checkpoint: str | Path, output: str | Path, *, predictions: bool = False
) -> EvaluationResult:
  """Evaluates a checkpoint on the configured split and writes the results.

  Args:
    config: a complete experiment; `data`, `task` and `eval` are used, and `model` for official
      files.
    checkpoint: bundle, working directory or official file.
    output: folder for `metrics.json` and the pictures; made if it is missing.
    predictions: whether the predictions are written, too.

  Returns:
    Metrics, table and pictures, as in training.

  Raises:
    UserError: if the checkpoint cannot be read, or its classes are not those of the data set.
  """
  import jax

  from effseg_jax import experiment
  from effseg_jax.run.description import inference_settings
  from effseg_jax.training import evaluation

  dataset = experiment.open_dataset(config, config.eval.split)
  # Weights of the loss belong to the classes of the training data, which may be others.
  fields = {name: value for name, value in config.task.items() if name != "class_weights"}
  task = experiment.make_task(fields, dataset)
  model, variables, task = load(config, checkpoint, task)
  parts = experiment.build(config, eval_dataset=dataset, model=model, task=task)
  run = parts.evaluate

  begin = time.monotonic()
  result = run(evaluation.variables_on(variables, parts.mesh))
  seconds = time.monotonic() - begin
  if predictions:
    _write_predictions(result, config.task.name, Path(output) / "predictions")
  if jax.process_index() == 0:
    facts = {
      "checkpoint": str(checkpoint),
      "data": config.data.name,
      "split": config.eval.split,
      "num_images": len(dataset),
      "seconds": round(seconds, 1),
      "inference": inference_settings(config.eval),
    }
    _write(result, facts, Path(output))
    print(result.table)
    print(
      f"{checkpoint} on {config.data.name} {config.eval.split}: {len(dataset):,} images in"
      f" {seconds:.0f} s (compilation included); written to {output}",
      flush=True,
    )
  return result


def load(
  config: ConfigDict, checkpoint: str | Path, task: Task
) -> tuple[nn.Module, Variables, Task]:
  """Reads the model to evaluate. The checkpoint's own description takes precedence over the
  configuration.

  Args:
    config: names the model where the checkpoint does not.
    checkpoint: bundle, working directory or official file.
    task: with the data set's classes.

  Returns:
    The model, its variables (host arrays), and the task as the checkpoint was trained for it: its
    normalisation above all.

  Raises:
    UserError: if nothing can be read there, or if task or classes are not those of the data set.
  """
  import effseg_jax
  from effseg_jax import experiment
  from effseg_jax.run.saved_model import load_for_inference
  from effseg_jax.weights.loading import is_bundle

  if Path(checkpoint).is_file() and not is_bundle(Path(checkpoint)):
    model = experiment.make_model(config.model, task.num_classes)
    return model, effseg_jax.load_weights(model, checkpoint), task

  bundle = load_for_inference(checkpoint)
  _check_classes(bundle.card["task"], config, task, checkpoint)
  wanted = {"name": config.model.name, **experiment.model_fields(config.model, task.num_classes)}
  card = {"name": bundle.card["model"]["name"], **bundle.card["model"]["fields"]}
  for key in sorted(set(wanted) & set(card)):
    if json.dumps(wanted[key]) != json.dumps(card[key]):
      print(
        f"note: {checkpoint} was made with model.{key}={card[key]}; the configuration's"
        f" {wanted[key]} is not used"
      )
  return bundle.model, bundle.variables, _as_trained(task, bundle.card["task"])


def _as_trained(task: Task, card: dict[str, Any]) -> Task:
  """The task with the fields that the checkpoint was trained with; classes are the data set's."""
  of_data = ("classes", "palette", "is_thing", "ignore_label", "class_weights")
  own = {field.name for field in dataclasses.fields(task)} - set(of_data)
  fields = {name: value for name, value in card.items() if name in own}
  return dataclasses.replace(
    task, **{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
  )


def _check_classes(
  card: dict[str, Any], config: ConfigDict, task: Task, checkpoint: str | Path
) -> None:
  """Raises `UserError` unless the checkpoint was trained for this task and these classes."""
  if card["name"] != config.task.name:
    raise UserError(
      f"{checkpoint} was trained for {card['name']} and --config is for {config.task.name};"
      " take the configuration that it was trained with."
    )
  theirs, ours = tuple(card["classes"]), tuple(task.classes)
  if theirs == ours:
    return
  found = f"{len(theirs)} classes where the data set has {len(ours)}"
  if len(theirs) == len(ours):
    index = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    found = f"class {index} is {theirs[index]!r} where the data set has {ours[index]!r}"
  raise UserError(
    f"{checkpoint} does not fit {config.data.name}: {found}. Take the data set that it was trained"
    " on, or train a new head with effseg train --config.init_from."
  )


def _write_predictions(result: EvaluationResult, task_name: str, folder: Path) -> None:
  """Writes this process's predictions.

  Raises:
    UserError: if the task has no official format.
  """
  if result.write_predictions is None:
    raise UserError(f"--predictions: {task_name} has no official format of predictions.")
  folder.mkdir(parents=True, exist_ok=True)
  result.write_predictions(folder)


def _write(result: EvaluationResult, facts: dict[str, Any], folder: Path) -> None:
  """Writes numbers and pictures."""
  from PIL import Image

  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps({**facts, **result.report}, indent=2, ensure_ascii=False)
  (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
  for name, picture in result.pictures.items():
    Image.fromarray(picture).save(folder / f"{name}.png")


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  define_config(values)
  flags.DEFINE_string(
    "checkpoint",
    None,
    "A bundle, a run's working directory or an official file; else --workdir.",
    flag_values=values,
  )
  flags.DEFINE_string("workdir", None, "Working directory of the run.", flag_values=values)
  flags.DEFINE_string(
    "output", None, "Where results go; default: WORKDIR/eval_SPLIT.", flag_values=values
  )
  flags.DEFINE_bool(
    "predictions",
    False,
    "Write the predictions in the official format.",
    flag_values=values,
  )
  processes.define_flags(values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and evaluates."""
  with processes.run(values):
    no_arguments(arguments)
    if values.config is None:
      raise UserError("--config is needed; see effseg eval --help.")
    checkpoint = values.checkpoint or values.workdir
    if not checkpoint:
      raise UserError("--checkpoint or --workdir is needed; see effseg eval --help.")
    if not Path(checkpoint).exists():
      raise UserError(f"{checkpoint} does not exist; expected a bundle or a run's --workdir.")
    workdir = values.workdir or (checkpoint if Path(checkpoint).is_dir() else None)
    if not (values.output or workdir):
      raise UserError("--output=DIR is needed for a checkpoint that is a file.")
    output = values.output or Path(workdir) / f"eval_{values.config.eval.split}"
    platform.tune_host_malloc()
    platform.use_compilation_cache()
    evaluate(values.config, checkpoint, output, predictions=values.predictions)
