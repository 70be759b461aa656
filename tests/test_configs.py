"""Every configuration builds, and trains one reduced step on synthetic images."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from effseg_jax import create_model, experiment
from effseg_jax.tasks import make_task
from effseg_jax.training import sharding
from effseg_jax.training import state as state_lib
from effseg_jax.training.step import compile_train_step, make_train_step

CONFIGS = sorted(
  ".".join(path.with_suffix("").parts[-3:])
  for path in (Path(__file__).parents[1] / "configs").glob("afformer/*.py")
  if path.stem != "__init__"
)
SIZE = 32
# Every operation of the model once, and none as wide as it is: compiling is what takes time.
REDUCED = {"widths": (8, 16, 32, 32), "depths": (0, 1, 1, 1)}


class _Dataset:
  """Stands for the configured data set, with few classes."""

  classes = ("ground", "sky", "tree", "car")
  palette = np.arange(12, dtype=np.uint8).reshape(4, 3)
  ignore_label = 255
  num_classes = 4


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reduced_step_runs(name):
  config = importlib.import_module(name).get_config("tiny")
  dataset = _Dataset()
  task_config = config.task.to_dict()
  task_config.pop("class_weights", None)  # of the real classes
  task = make_task(task_config, dataset)
  fields = experiment.model_fields(config.model, dataset.num_classes)
  assert create_model(config.model.name, **fields).num_classes == dataset.num_classes
  model = create_model(config.model.name, **{**fields, **REDUCED})
  rng = np.random.default_rng(0)
  dense = config.task.name != "classification"
  batch = {
    "image": rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8),
    "label": rng.integers(0, 4, (2, SIZE, SIZE) if dense else (2,)).astype(np.int32),
    "valid_size": np.full((2, 2), SIZE, np.int32),
    "weight": np.ones(2, np.float32),
  }
  mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
  inputs = jax.eval_shape(lambda b: task.model_inputs(task.augment(b, jax.random.key(0))), batch)
  optimizer, _ = experiment.make_optimizer(config, model, inputs)
  state = state_lib.init_state(
    model,
    inputs,
    optimizer,
    seed=0,
    keep_average=config.train.average_decay > 0,
    rules=config.mesh.rules,
    mesh=mesh,
  )
  step = make_train_step(model, task, optimizer, average_decay=config.train.average_decay)
  state, report = compile_train_step(step, state, mesh)(state, sharding.put_batch(batch, mesh))
  assert bool(report.finite)
  assert float(report.scalars["loss"]) > 0
