"""From a configuration to the parts of a run.

`build` is the one builder: training, evaluation, the benchmark and the tools that compile for other
devices use it, and so does a notebook:

  experiment = effseg_jax.experiment.build(effseg_jax.configs.load("afformer/synthetic"))
  state = experiment.state
  for batch in experiment.batches:
    state, report = experiment.step(state, batch)
  result = experiment.evaluate(state.eval_variables())
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

import effseg_jax
from effseg_jax.configs.defaults import complete
from effseg_jax.errors import UserError
from effseg_jax.evaluators import make_evaluator
from effseg_jax.input_pipeline import datasets, inspection, loader, pipelines
from effseg_jax.input_pipeline.mixture import Mixture
from effseg_jax.run.checkpoint import RunDescription
from effseg_jax.run.description import describe_run, run_lines
from effseg_jax.run.saved_model import load_for_inference
from effseg_jax.tasks import Task, make_task
from effseg_jax.training import evaluation, schedules, sharding
from effseg_jax.training import optimizer as optimizer_lib
from effseg_jax.training import state as state_lib
from effseg_jax.training.feed import DeviceBatches
from effseg_jax.training.state import TrainState, Variables
from effseg_jax.training.step import TrainStep, compile_train_step, make_train_step
from effseg_jax.validation import validate
from effseg_jax.weights.loading import is_bundle, parts_in

__all__ = ["Experiment", "build", "make_task"]


class Experiment:
  """The parts of a run. Each is made when it is first used, and kept.

  Unused parts cost nothing: an evaluation alone does not open the training data, and a step
  that is compiled for other devices needs no arrays.

  Attributes:
    config: checked, complete, and not to be changed any more.
  """

  def __init__(
    self,
    config: ConfigDict,
    *,
    dataset: Any = None,
    eval_dataset: Any = None,
    mesh: Mesh | None = None,
    task: Task | None = None,
    model: nn.Module | None = None,
  ):
    """See `build`."""
    self.config = complete(config.copy_and_resolve_references())
    validate(self.config)
    if dataset is not None:
      validate(self.config, dataset)
    given = {
      "dataset": dataset,
      "eval_dataset": eval_dataset,
      "mesh": mesh,
      "task": task,
      "model": model,
    }
    # Where the properties below would cache their values.
    self.__dict__.update({name: part for name, part in given.items() if part is not None})

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The devices, by axis."""
    return sharding.make_mesh(self.config.mesh)

  @functools.cached_property
  def dataset(self) -> Any:
    """The open training data."""
    dataset = open_training_data(self.config)
    validate(self.config, dataset)
    return dataset

  @functools.cached_property
  def task(self) -> Task:
    """Inputs and loss, for the classes of the data."""
    return make_task(self.config.task, self.dataset)

  @functools.cached_property
  def model(self) -> nn.Module:
    """The network."""
    return make_model(self.config.model, self.task.num_classes)

  @functools.cached_property
  def batches(self) -> DeviceBatches:
    """The training batches on the devices, from the first step or from another one on."""
    self._check_batch_size()
    rows = sharding.process_rows(self.config.train.batch_size, self.mesh)
    loading = _training_batches(self.config, self.dataset, rows)
    return DeviceBatches(loading.iterate, self.batch_shapes, self.mesh)

  @functools.cached_property
  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and sharding of a global training batch, from its first example."""
    self._check_batch_size()
    loading = _training_batches(self.config, self.dataset, None)
    shapes = {
      key: jax.ShapeDtypeStruct((loading.batch_size, *shape), dtype)
      for key, (shape, dtype) in loading.element_shapes().items()
    }
    return sharding.batch_shapes(shapes, self.mesh)

  @functools.cached_property
  def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the model's inputs for a global training batch."""
    task = self.task
    return jax.eval_shape(
      lambda batch: task.model_inputs(task.augment(batch, jax.random.key(0))), self.batch_shapes
    )

  @functools.cached_property
  def schedule(self) -> optax.Schedule:
    """Step -> learning rate."""
    return make_schedule(self.config)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """Gradients -> updates."""
    return make_optimizer(self.config, self.model, self.inputs)[0]

  @functools.cached_property
  def state(self) -> TrainState:
    """The state of step 0 with random weights, on the devices.

    `step` takes a state's arrays over: after the first step, this one is used up.
    """
    return state_lib.init_state(
      self.model, self.inputs, self.optimizer, seed=self.config.seed, **self._of_state
    )

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """`state` as shapes, dtypes and shardings alone."""
    return state_lib.abstract_state(self.model, self.inputs, self.optimizer, **self._of_state)

  @property
  def _of_state(self) -> dict[str, Any]:
    return {
      "keep_average": self.config.train.average_decay > 0,
      "rules": self.config.mesh.rules,
      "mesh": self.mesh,
    }

  @functools.cached_property
  def step(self) -> TrainStep:
    """The jitted training step: (state, batch) -> (state, report).

    It is compiled when it is first called, or by `step.lower(state, batch_shapes).compile()`.
    """
    config = self.config
    step = make_train_step(
      self.model,
      self.task,
      self.optimizer,
      accumulate=config.train.accumulate,
      average_decay=config.train.average_decay,
      freeze=config.optimizer.freeze,
    )
    return compile_train_step(step, self.abstract_state, self.mesh)

  @functools.cached_property
  def eval_dataset(self) -> Any:
    """The open split that is evaluated on."""
    return open_dataset(self.config, self.config.eval.split)

  @functools.cached_property
  def evaluate(self) -> evaluation.Evaluate:
    """Variables -> the metrics, table and pictures of an evaluation of the whole split."""
    config, options = self.config, self.config.eval.to_dict()
    sharding.check_batch_size(config.eval.batch_size, self.mesh, "eval.batch_size")
    batches = pipelines.eval_batches(
      config.task.name,
      self.eval_dataset,
      options,
      batch_size=config.eval.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_threads=config.data.num_threads,
      on_error=config.data.on_error,
    )
    parts = (config.task.name, self.model, self.task, self.eval_dataset, options)
    return evaluation.compile_evaluation(
      functools.partial(make_evaluator, *parts), batches, self.mesh
    )

  @functools.cached_property
  def description(self) -> RunDescription:
    """The data stored with each checkpoint."""
    fields = model_fields(self.config.model, self.task.num_classes)
    return describe_run(self.config, fields, self.task, self.dataset)

  def _check_batch_size(self) -> None:
    train = self.config.train
    sharding.check_batch_size(train.batch_size, self.mesh, "train.batch_size", train.accumulate)


def one_device() -> Mesh:
  """The mesh of the first device alone."""
  return sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])


def build(
  config: ConfigDict,
  *,
  dataset: Any = None,
  eval_dataset: Any = None,
  mesh: Mesh | None = None,
  task: Task | None = None,
  model: nn.Module | None = None,
) -> Experiment:
  """Checks a configuration and makes the parts of a run of it.

  Args:
    config: a complete experiment; it is copied.
    dataset: in place of the configured training data.
    eval_dataset: in place of the configured split to evaluate on.
    mesh: in place of the configured one; its devices need not be here, then there is no `state`,
      and `step` can only be traced and compiled.
    task: in place of the one for the training data.
    model: in place of the configured one, a trained one that is evaluated for example.

  Returns:
    `model`, `task`, `state`, `step`, `batches`, `evaluate` and the parts that they consist of.

  Raises:
    UserError: for a field that makes no sense; for data that cannot be opened, when they are.
  """
  return Experiment(
    config, dataset=dataset, eval_dataset=eval_dataset, mesh=mesh, task=task, model=model
  )


def open_dataset(config: ConfigDict, split: str) -> Any:
  """Opens a split of the configured data set."""
  dataset = datasets.open_dataset(
    config.data.name,
    root=config.data.root or None,
    split=split,
    **config.data.options.to_dict(),
  )
  return pipelines.as_task_reads(config.task.name, dataset)


def check_data(experiment: Experiment) -> list[str]:
  """Looks at the data for some seconds, unless `data.check` is off.

  Returns:
    What is odd, a line each.

  Raises:
    UserError: for data with which a training makes no sense.
  """
  config = experiment.config
  if config.data.get("check", "on") == "off" or config.data.get("mixture", ()):
    return []
  splits = {config.data.train_split: experiment.dataset}
  if config.eval.every:
    splits.setdefault(config.eval.split, experiment.eval_dataset)
  return inspection.check(
    splits,
    config.task.name,
    training=config.data.train_split,
    on_error=config.data.on_error,
  )


def make_model(config: ConfigDict, num_classes: int) -> nn.Module:
  """Creates the configured model for a number of classes."""
  return effseg_jax.create_model(config.name, **model_fields(config, num_classes))


def model_fields(config: ConfigDict, num_classes: int) -> dict[str, Any]:
  """The keyword arguments of `create_model` that a configuration means."""
  fields = {key: value for key, value in config.items() if key != "name"}
  return {**fields, "num_classes": num_classes}


def open_training_data(config: ConfigDict) -> Any:
  """Opens the training data: the configured split, or the mixture of data sets.

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


def _training_batches(
  config: ConfigDict, dataset: Any, rows: tuple[int, ...] | None
) -> loader.TrainBatches:
  """The rows of the training batches that a process loads; None: all of them."""
  return loader.TrainBatches(
    dataset,
    pipelines.train_transforms(config.task.name, **config.data.augment.to_dict()),
    batch_size=config.train.batch_size,
    seed=config.seed,
    rows=rows,
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    on_error=config.data.on_error,
  )


def make_schedule(config: ConfigDict) -> optax.Schedule:
  """The configured learning rate by step."""
  return schedules.make_schedule(
    config.schedule.to_dict(), config.optimizer.learning_rate, config.train.num_steps
  )


def make_optimizer(
  config: ConfigDict, model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct]
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The configured optimizer and its learning-rate schedule."""
  schedule = make_schedule(config)
  groups = schedules.make_group_schedules(
    config.schedule.to_dict(), config.optimizer.learning_rate, config.train.num_steps
  )
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


def describe(experiment: Experiment, step: int, workdir: str) -> dict[str, str]:
  """The lines a run begins with, see `run.description.run_lines`."""
  return run_lines(
    experiment.config,
    parameters=state_lib.parameter_count(experiment.abstract_state.params),
    dataset=experiment.dataset,
    mesh=experiment.mesh,
    step=step,
    workdir=workdir,
  )


def schedule_change(saved: Mapping[str, Any] | None, config: ConfigDict, step: int) -> str | None:
  """A note where the learning rate of a resumed run is not what it would have been.

  Args:
    saved: the configuration that the checkpoint was made with; None: there is none.
    config: the one to resume with.
    step: to resume after.

  Returns:
    The note; None if the rate is the same.
  """
  if not saved:
    return None
  before = complete(ConfigDict(saved))
  was, now = (float(make_schedule(each)(step)) for each in (before, config))
  if abs(now - was) <= 1e-6 * max(abs(now), abs(was)):
    return None
  why = "the schedule has changed"
  if before.train.num_steps != config.train.num_steps:
    why = f"the schedule ended at step {before.train.num_steps:,} and ends at"
    why += f" {config.train.num_steps:,} now"
  return (
    f"note: {why}, so the learning rate of step {step + 1:,} goes from {was:.3g} to {now:.3g}. To"
    " train on with a schedule of its own, use a new --workdir with --config.init_from."
  )
