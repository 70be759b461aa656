"""The description of a run: lines for its log, and data beside its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from effseg_jax.run.checkpoint import RunDescription
from effseg_jax.tasks import Task


def inference_settings(config: ConfigDict) -> dict[str, Any]:
  """The settings of an evaluation that its numbers depend on."""
  other = ("split", "batch_size", "every", "best_by", "pictures")
  return {key: value for key, value in config.to_dict().items() if key not in other}


def describe_run(
  config: ConfigDict, model_fields: Mapping[str, Any], task: Task, dataset: Any
) -> RunDescription:
  """The data stored with each checkpoint of a run.

  Args:
    config: of the run.
    model_fields: the arguments of `create_model` beside the name.
    task: that the model is trained for.
    dataset: that it is trained on.
  """
  card = {
    "model": {
      "name": config.model.name,
      "fields": dict(model_fields),
    },
    "task": {"name": config.task.name, **dataclasses.asdict(task)},
    "trained_on": trained_on(config),
    # How the model was evaluated is how predict.py uses it.
    "inference": inference_settings(config.eval),
  }
  mixed = hasattr(dataset, "parts")
  data = {
    "seed": config.seed,
    "batch_size": config.train.batch_size,
    "data": trained_on(config),
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


def trained_on(config: ConfigDict) -> str:
  """The data set and its split, or the parts of a mixture."""
  entries = config.data.get("mixture", ())
  if not entries:
    return f"{config.data.name} {config.data.train_split}"
  return " + ".join(f"{weight:g} {name} {split}" for name, _, split, weight in entries)


def run_lines(
  config: ConfigDict, *, parameters: int, dataset: Any, mesh: Mesh, step: int, workdir: str
) -> dict[str, str]:
  """The lines a run begins with.

  Args:
    config: of the run.
    parameters: number of trained scalars.
    dataset: that it trains on.
    mesh: of its devices.
    step: that it begins after.
    workdir: of the run; empty: it is left out.
  """
  device = mesh.devices.flat[0]
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
  train = config.train
  return {
    "model": f"{config.model.name}, {parameters:,} parameters",
    "data": f"{trained_on(config)}: {len(dataset):,} examples, {dataset.num_classes} classes",
    "devices": f"{mesh.size} x {device.device_kind} ({device.platform})"
    + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
    + (axes and f": {axes}"),
    "training": f"{train.num_steps:,} steps of {train.batch_size} images"
    + (f", resuming from step {step}" if step else ""),
    **({"workdir": workdir} if workdir else {}),
  }


def rates(schedule: optax.Schedule, num_steps: int) -> str:
  """The learning rate at a few steps: `2e-09 at step 1, 0.0018 at 30, ...`."""
  steps = sorted({1, *(max(round(num_steps * part / 8), 1) for part in range(1, 9))})
  return ", ".join(f"{float(schedule(step - 1)):.2g} at step {step:,}" for step in steps)
