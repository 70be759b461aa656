"""Trains a model: `effseg train --config=afformer/camvid:tiny --workdir=runs/camvid`.

Any field of the configuration can be set from the command line:
`--config.train.batch_size=16 --config.optimizer.learning_rate=1e-3`. Started again with the same
command, a run goes on where its last checkpoint was taken, also with other devices or processes.

On TPU hosts and under SLURM's `srun` the processes of a run find each other. Elsewhere, start one
on each host with `--coordinator=HOST0:PORT --num_processes=N --process_id=I`, and a `--workdir`
that all of them see (docs/scaling.md).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import ConfigDict

from effseg_jax import platform
from effseg_jax.cli import Flags, define_config, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.run import processes

if TYPE_CHECKING:
  from effseg_jax.run.trial import StudyTrial


def train(
  config: ConfigDict, workdir: str, profile: str | None = None, trial: StudyTrial | None = None
) -> dict[str, Path]:
  """Runs the training that a configuration describes; returns the pictures drawn at the end."""
  from effseg_jax import experiment
  from effseg_jax.run import chips, clu_parts
  from effseg_jax.run.checkpoint import Checkpointer, initialise_from
  from effseg_jax.run.log import ReportWindow, RunLog, run_summary
  from effseg_jax.run.pace import Pace
  from effseg_jax.run.profile import StepProfiler
  from effseg_jax.run.stopping import StopRequest
  from effseg_jax.run.watch import Watch
  from effseg_jax.training import sharding
  from effseg_jax.training import state as state_lib
  from effseg_jax.training.feed import DeviceFeed
  from effseg_jax.training.step import compile_train_step, make_train_step

  # The devices, the data, the model and what it is trained for.
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.train.batch_size, mesh, "train.batch_size")
  dataset = experiment.open_training_data(config)
  task = experiment.make_task(config.task, dataset)
  model = experiment.make_model(config.model, task.num_classes)
  batches = experiment.train_batches(config, dataset, mesh)
  batch_shapes = experiment.batch_shapes(batches, mesh)
  evaluate = experiment.make_evaluation(config, model, task, mesh)

  with contextlib.ExitStack() as at_end:
    # The working directory, which is this run's alone.
    log = RunLog(workdir, config.train.num_steps, config.train.batch_size, config.eval.best_by)
    at_end.callback(log.close)
    profiler = StepProfiler(profile, workdir)
    at_end.callback(profiler.close)

    # The state, born sharded; from this run's last checkpoint or from other weights, if there are.
    inputs = experiment.input_shapes(task, batch_shapes)
    optimizer, schedule = experiment.make_optimizer(config, model, inputs)
    state = state_lib.init_state(
      model,
      inputs,
      optimizer,
      seed=config.seed,
      keep_average=config.train.average_decay > 0,
      rules=config.mesh.rules,
      mesh=mesh,
    )
    run = experiment.describe_run(config, task, dataset)
    checkpointer = Checkpointer(
      workdir, run, keep=config.checkpoint.keep, metric=config.eval.best_by
    )
    resumed = checkpointer.restore(state)
    if resumed is not None:
      state = resumed
    elif config.init_from:
      state = initialise_from(
        state, experiment.read_variables(config.init_from, model), config.init_from
      )
    log.text(run_summary(experiment.describe(config, state, dataset, mesh, workdir)))
    log.document("parameters.txt", clu_parts.parameter_table(state.params))

    step = int(state.step)
    if step >= config.train.num_steps:
      log.text(f"nothing left to do: {workdir} has already reached step {step}")
      return {}

    # The batches from where the state stands, two of them ahead on the devices.
    feed = DeviceFeed(batches.iterate(start=step), mesh)
    at_end.callback(feed.close)
    pace, stop = Pace(step), StopRequest()
    at_end.callback(stop.close)
    watch = Watch(pace, workdir, **config.watch.to_dict())
    at_end.callback(watch.close)

    # The compiled program.
    with pace.pause("the compiler"):
      begin = time.monotonic()
      train_step = make_train_step(
        model,
        task,
        optimizer,
        accumulate=config.train.accumulate,
        average_decay=config.train.average_decay,
        freeze=config.optimizer.freeze,
      )
      train_step = compile_train_step(train_step, state, mesh).lower(state, batch_shapes).compile()
      log.text(f"compiled in {time.monotonic() - begin:.0f} s")
    flops = chips.flops_per_device(train_step)

    # The loop.
    window, stopping = ReportWindow(task), False
    previous, pictures = None, {}
    pace.restart()
    while step < config.train.num_steps and not stopping:
      with pace.waiting("data"):
        batch = next(feed)
      with profiler.step(step + 1):
        state, report = train_step(state, batch)
      with pace.waiting("device"):
        experiment.check_finite(previous, state, config, workdir)
      step += 1
      pace.step()
      window.add(report)
      previous = (step, report)

      last, stopping = step == config.train.num_steps, stop.at(step)
      if step % config.log.every == 0 or last:
        with pace.waiting("device"):
          numbers = window.summary()
        numbers["learning_rate"] = float(schedule(step - 1))
        log.train(step, numbers, pace.split(), flops)
        pace.restart()
      metrics = None
      if step % config.eval.every == 0 or last:
        with pace.pause("the evaluation"):
          result = evaluate(state.eval_variables(), on_batch=pace.touch)
          metrics = result.scalars
          log.evaluation(step, metrics)
          # Pruned by its sweep: every process ends after this step.
          if trial is not None:
            stopping = processes.any_of(trial.report(step, metrics)) or stopping
          for name, image in result.pictures.items():
            pictures[name] = log.picture(step, name, image)
      with pace.pause("the checkpoint"):
        checkpointer.check()
        if metrics or step % config.checkpoint.every == 0 or stopping:
          checkpointer.save(state, metrics)

    experiment.check_finite(previous, state, config, workdir)
    checkpointer.close()
    if step < config.train.num_steps:
      log.text(f"stopped at step {step}; the same command goes on from here")
      return pictures
    log.text(result.table)
    log.text(f"checkpoint: {workdir}/checkpoints    log: {workdir}/metrics.jsonl")
    for name, path in pictures.items():
      log.text(f"{name}: {path}")
  return pictures


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  define_config(values)
  flags.DEFINE_string(
    "workdir", None, "Where checkpoints, logs and pictures go.", flag_values=values
  )
  flags.DEFINE_string(
    "profile", None, "Trace these steps into WORKDIR/profile, 100:105 say.", flag_values=values
  )
  flags.DEFINE_string(
    "study", None, "Set by effseg sweep: the storage that hears of evaluations.", flag_values=values
  )
  flags.DEFINE_integer("trial", 0, "Set by effseg sweep: the number in it.", flag_values=values)
  processes.define_flags(values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and trains."""
  with processes.run(values):
    no_arguments(arguments)
    if values.config is None or not values.workdir:
      raise UserError("--config and --workdir are needed; see effseg train --help.")
    logging.set_verbosity(logging.FATAL)  # what orbax tells of errors, we tell in one line
    platform.tune_host_malloc()
    platform.use_compilation_cache()
    trial = None
    if values.study:
      from effseg_jax.sweep import study

      trial = study.attach(values.study, values.trial)
    train(values.config, values.workdir, values.profile, trial)
