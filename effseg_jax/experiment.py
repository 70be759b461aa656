"""From a configuration to the parts of a run: the one room that knows both sides.

`train.py` and `eval.py` are written in these words. Nothing else in effseg_jax reads a
configuration or opens a data set.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

import effseg_jax
from effseg_jax.errors import UserError
from effseg_jax.evaluators import make_evaluator
from effseg_jax.input_pipeline import datasets, loader, pipelines
from effseg_jax.input_pipeline.mixture import Mixture
from effseg_jax.run import processes
from effseg_jax.run.checkpoint import RunDescription, load_for_inference
from effseg_jax.tasks import Task, make_task
from effseg_jax.training import evaluation, schedules, sharding, trees
from effseg_jax.training import optimizer as optimizer_lib
from effseg_jax.training import state as state_lib
from effseg_jax.training.state import TrainState, Variables
from effseg_jax.training.step import StepReport
from effseg_jax.weights.loading import is_bundle, parts_in

__all__ = ["make_task"]


def open_dataset(config: ConfigDict, split: str) -> Any:
  """Opens a split of the configured data set."""
  dataset = datasets.open_dataset(
    config.data.name,
    root=config.data.root or None,
    split=split,
    **config.data.options.to_dict(),
  )
  return pipelines.as_task_reads(config.task.name, dataset)


def make_model(config: ConfigDict, num_classes: int) -> nn.Module:
  """Creates the configured model for a number of classes."""
  return effseg_jax.create_model(config.name, **model_fields(config, num_classes))


def model_fields(config: ConfigDict, num_classes: int) -> dict[str, Any]:
  """The keyword arguments of `create_model` that a configuration means."""
  fields = {key: value for key, value in config.items() if key != "name"}
  return {**fields, "num_classes": num_classes}


def open_training_data(config: ConfigDict) -> Any:
  """Opens what is trained on: the configured split, or the mixture of data sets.

  An entry of `data.mixture` is (name, root, split, weight).

  Raises:
    UserError: for an entry of another form, or data sets that do not go together.
  """
  entries = config.data.get("mixture", ())
  if not entries:
    return open_dataset(config, config.data.train_split)
  parts, weights = [], []
  for entry in entries:
    if len(entry) != 4:
      raise UserError(
        f"data.mixture: {entry!r} has another form; expected (name, root, split, weight)."
      )
    name, root, split, weight = entry
    part = datasets.open_dataset(name, root=root or None, split=split)
    parts.append(pipelines.as_task_reads(config.task.name, part))
    weights.append(weight)
  return Mixture(parts, weights)


def train_batches(config: ConfigDict, dataset: Any, mesh: Mesh | None) -> loader.TrainBatches:
  """This process's part of the training batches, or, without a mesh, all of them."""
  return loader.TrainBatches(
    dataset,
    pipelines.train_transforms(config.task.name, **config.data.augment.to_dict()),
    batch_size=config.train.batch_size,
    seed=config.seed,
    rows=None if mesh is None else sharding.process_rows(config.train.batch_size, mesh),
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    on_error=config.data.on_error,
  )


def batch_shapes(batches: loader.TrainBatches, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and sharding of a global batch, from its first example."""
  shapes = {
    key: jax.ShapeDtypeStruct((batches.batch_size, *shape), dtype)
    for key, (shape, dtype) in batches.element_shapes().items()
  }
  return sharding.batch_shapes(shapes, mesh)


def input_shapes(
  task: Task, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Shapes of the model's inputs for a batch of such shapes."""
  return jax.eval_shape(
    lambda batch: task.model_inputs(task.augment(batch, jax.random.key(0))), dict(batch)
  )


def make_optimizer(
  config: ConfigDict, model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct]
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The configured optimizer and its learning-rate schedule."""
  options = config.schedule.to_dict(), config.optimizer.learning_rate, config.train.num_steps
  schedule = schedules.make_schedule(*options)
  groups = schedules.make_group_schedules(*options)
  params = state_lib.model_shapes(model, inputs)["params"]
  optimizer = optimizer_lib.make_optimizer(config.optimizer.to_dict(), schedule, params, groups)
  return optimizer, schedule


def read_variables(source: str, model: nn.Module) -> Variables:
  """Reads weights to start from.

  Args:
    source: a run's working directory or a bundle, read whole, with whatever head it has
      (`initialise_from` takes what fits); or a file with official names, of which the parts are
      read that it holds whole (a backbone, a sound encoder, all but the head). Several, with commas
      between them, are put together.
    model: that will be trained; the parts of official files must be those of this model.

  Returns:
    Collections of host arrays.

  Raises:
    UserError: if there is nothing that can be read, or an official part does not fit.
  """
  flat: dict[str, Any] = {}
  for name in source.split(","):
    path = Path(name)
    if not path.exists():
      raise UserError(f"init_from: {name} does not exist.")
    if path.is_dir() or is_bundle(path):
      flat |= flatten_dict(dict(load_for_inference(path).variables), sep="/")
      continue
    for part in parts_in(model, path) or ("backbone",):
      flat |= flatten_dict(effseg_jax.load_weights(model, path, partial=part), sep="/")
  return unflatten_dict(flat, sep="/")


def inference_settings(config: ConfigDict) -> dict[str, Any]:
  """The settings of an evaluation that its numbers depend on."""
  other = ("split", "batch_size", "every", "best_by", "pictures")
  return {key: value for key, value in config.to_dict().items() if key not in other}


def describe_run(config: ConfigDict, task: Task, dataset: Any) -> RunDescription:
  """What is stored with each checkpoint of a run."""
  card = {
    "model": {
      "name": config.model.name,
      "fields": model_fields(config.model, task.num_classes),
    },
    "task": {"name": config.task.name, **dataclasses.asdict(task)},
    "trained_on": _trained_on(config),
    # How the model was evaluated is how predict.py uses it.
    "inference": inference_settings(config.eval),
  }
  mixed = isinstance(dataset, Mixture)
  data = {
    "seed": config.seed,
    "batch_size": config.train.batch_size,
    "data": _trained_on(config),
    "options": {key: _portable(value) for key, value in config.data.options.items()},
    "examples": [len(part) for part in dataset.parts] if mixed else len(dataset),
    "classes": list(task.classes),
  }
  return RunDescription(json.loads(config.to_json_best_effort()), card, data)


def _portable(value: Any) -> Any:
  """An option of a data set, of a path its last part alone: folders may move between two starts."""
  if isinstance(value, str) and Path(value).is_absolute():
    return Path(value).name
  return value


def _trained_on(config: ConfigDict) -> str:
  """The data set and its split, or what is mixed."""
  entries = config.data.get("mixture", ())
  if not entries:
    return f"{config.data.name} {config.data.train_split}"
  return " + ".join(f"{weight:g} {name} {split}" for name, _, split, weight in entries)


def describe(
  config: ConfigDict, state: TrainState, dataset: Any, mesh: Mesh, workdir: str
) -> dict[str, str]:
  """The lines a run begins with."""
  device = mesh.devices.flat[0]
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
  train = config.train
  step = int(state.step)
  return {
    "model": f"{config.model.name}, {state_lib.parameter_count(state.params):,} parameters",
    "data": f"{_trained_on(config)}: {len(dataset):,} examples, {dataset.num_classes} classes",
    "devices": f"{mesh.size} x {device.device_kind} ({device.platform})"
    + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
    + (axes and f": {axes}"),
    "training": f"{train.num_steps:,} steps of {train.batch_size} images"
    + (f", going on from step {step}" if step else ""),
    "workdir": workdir,
  }


def make_evaluation(
  config: ConfigDict, model: nn.Module, task: Task, mesh: Mesh
) -> evaluation.Evaluate:
  """Opens the evaluation split and returns a function from variables to a result."""
  batch_size = config.eval.batch_size
  sharding.check_batch_size(batch_size, mesh, "eval.batch_size")
  dataset = open_dataset(config, config.eval.split)
  options = config.eval.to_dict()
  batches = pipelines.eval_batches(
    config.task.name,
    dataset,
    options,
    batch_size=batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
    on_error=config.data.on_error,
  )
  make = functools.partial(make_evaluator, config.task.name, model, task, dataset, options)
  return evaluation.compile_evaluation(make, batches, mesh)


def check_finite(
  previous: tuple[int, StepReport] | None, state: TrainState, config: ConfigDict, workdir: str
) -> None:
  """Waits for a step, and stops a run whose loss or gradient is not finite.

  Args:
    previous: number and report of the step before the one that was just started.
    state: to save for inspection. The step with the bad gradient has left it unchanged.
    config: with `on_nonfinite` "skip" the run goes on; the state counts such steps.
    workdir: where `nonfinite_<step>.npz` is written.

  Raises:
    UserError: naming the step and the parameters whose gradient is not finite.
  """
  if previous is None or bool(previous[1].finite) or config.on_nonfinite == "skip":
    return
  step, report = previous
  path = Path(workdir) / f"nonfinite_{step:06d}.npz"
  variables = dict(state.variables())
  if jax.process_count() > 1:
    variables = multihost_utils.process_allgather(variables, tiled=True)
  if jax.process_index() == 0:
    np.savez(path, **flatten_dict(jax.device_get(variables), sep="/"))
  names = trees.leaf_names(state.params)
  norms = np.asarray(report.gradient_norms)
  bad = [name for name, norm in zip(names, norms, strict=True) if not np.isfinite(norm)]
  shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
  raise UserError(
    f"step {step} ({processes.location()}): the loss is {float(report.scalars['loss']):g} and the"
    f" gradient is not finite in {len(bad)} of {len(names)} parameters ({shown}). The variables"
    f" are in {path}; the last checkpoint is intact. Lower the learning rate, set"
    " optimizer.clip_norm, or set --config.on_nonfinite=skip."
  )
