"""Trains a model: `effseg train --config=afformer/camvid:tiny --workdir=runs/camvid`.

Any field of the configuration can be set from the command line:
`--config.train.batch_size=16 --config.optimizer.learning_rate=1e-3`. Started again with the same
command, a run resumes from its last checkpoint, also with other devices or processes.
`--config=NAME --help` describes an experiment; `--dry_run` builds everything and stops before the
first step.

On TPU hosts and under SLURM's `srun` the processes of a run find each other. Elsewhere, start one
on each host with `--coordinator=HOST0:PORT --num_processes=N --process_id=I`, and a `--workdir`
that all of them see (docs/scaling.md).
"""

from __future__ import annotations

import contextlib
import functools
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
  from effseg_jax.run import chips, clu_parts, finite
  from effseg_jax.run.checkpoint import Checkpointer, initialise_from
  from effseg_jax.run.log import ReportWindow, RunLog, run_summary
  from effseg_jax.run.pace import Pace
  from effseg_jax.run.profile import StepProfiler
  from effseg_jax.run.stopping import StopRequest
  from effseg_jax.run.watch import Watch

  # Model, data and task. Mistakes are found here, before any device is used.
  parts = experiment.build(config)
  config, description_of_run = parts.config, parts.description
  processes.require_same(description_of_run.data, "the data")
  odd = experiment.check_data(parts)
  batch_shapes = parts.batch_shapes
  evaluate = parts.evaluate if config.eval.every else None

  with contextlib.ExitStack() as at_end:
    # The working directory, which is this run's alone.
    log = RunLog(workdir, config.train.num_steps, config.train.batch_size, config.eval.best_by)
    at_end.callback(log.close)
    profiler = StepProfiler(profile, workdir)
    at_end.callback(profiler.close)

    # The state, from this run's last checkpoint or from other weights, if there are.
    checkpointer = Checkpointer(
      workdir, description_of_run, keep=config.checkpoint.keep, metric=config.eval.best_by
    )
    state = parts.state
    resumed = checkpointer.restore(state)
    if resumed is not None:
      state = resumed
    elif config.init_from:
      state = initialise_from(
        state, experiment.read_variables(config.init_from, parts.model), config.init_from
      )
    step = int(state.step)
    log.begin(step)
    log.text(run_summary(experiment.describe(parts, step, workdir)))
    for line in odd:
      log.text(f"warning: {line}")
    log.document("parameters.txt", clu_parts.parameter_table(state.params))
    if step >= config.train.num_steps:
      log.text(f"nothing left to do: {workdir} has already reached step {step}")
      return {}
    changed = experiment.schedule_change(checkpointer.saved_config(), config, step)
    if changed:
      log.text(changed)

    # The batches from the state's step on, two of them ahead on the devices.
    feed = parts.batches.iterate(start=step)
    at_end.callback(feed.close)
    pace, stop = Pace(step), StopRequest()
    at_end.callback(stop.close)
    watch = Watch(pace, workdir, **config.watch.to_dict())
    at_end.callback(watch.close)

    # The compiled program.
    with pace.pause("the compiler"):
      begin = time.monotonic()
      train_step = parts.step.lower(state, batch_shapes).compile()
      log.text(f"compiled in {time.monotonic() - begin:.0f} s")
    flops = chips.flops_per_device(train_step)

    # The loop.
    window, stopping = ReportWindow(parts.task, int(state.skipped)), False
    previous, pictures, table = None, {}, ""
    pace.restart()
    while step < config.train.num_steps and not stopping:
      with pace.waiting("data"):
        batch = next(feed)
      with profiler.step(step + 1):
        state, report = train_step(state, batch)
      with pace.waiting("device"):
        finite.check_finite(previous, state, config.on_nonfinite, workdir)
      step += 1
      pace.step()
      window.add(report)
      previous = (step, report)

      last, stopping = step == config.train.num_steps, stop.at(step)
      due = functools.partial(_due, step, last)
      if due(config.log.every):
        with pace.waiting("device"):
          numbers = window.summary()
        # The optimizer counts the steps that changed something.
        updates = step - window.skipped
        numbers["learning_rate"] = float(parts.schedule(max(updates - 1, 0)))
        log.train(step, numbers, pace.split(), flops)
        pace.restart()
      metrics = None
      if evaluate is not None and due(config.eval.every):
        with pace.pause("the evaluation"):
          result = evaluate(state.eval_variables(), on_batch=pace.touch)
          metrics, table = result.scalars, result.table
          log.evaluation(step, metrics)
          # Pruned by its sweep: every process ends after this step.
          if trial is not None:
            stopping = processes.any_of(trial.report(step, metrics)) or stopping
          for name, image in result.pictures.items():
            pictures[name] = log.picture(step, name, image)
      with pace.pause("the checkpoint"):
        checkpointer.check()
        if metrics or last or stopping or due(config.checkpoint.every):
          checkpointer.save(state, metrics)

    finite.check_finite(previous, state, config.on_nonfinite, workdir)
    checkpointer.close()
    if step < config.train.num_steps:
      log.text(f"stopped at step {step}; the same command resumes from here")
      return pictures
    log.text(table)
    log.text(f"checkpoint: {workdir}/checkpoints    log: {workdir}/metrics.jsonl")
    for name, path in pictures.items():
      log.text(f"{name}: {path}")
  return pictures


def _due(step: int, last: bool, every: int) -> bool:
  """Whether something that happens every so many steps, and at the end, happens now; 0: never."""
  return every > 0 and (step % every == 0 or last)


def dry_run(config: ConfigDict) -> str:
  """Builds the parts of `train` and compiles its step; no step is executed, nothing is written.

  Returns:
    The plan: data, model, parameters, memory, steps, and the learning rate over time.

  Raises:
    UserError: for mistakes in the configuration or the data.
  """
  from effseg_jax import experiment
  from effseg_jax.run import chips, description
  from effseg_jax.run.log import run_summary
  from effseg_jax.training import sharding

  parts = experiment.build(config)
  config = parts.config
  lines = experiment.describe(parts, 0, "")
  batch = parts.batch_shapes
  if config.init_from:
    experiment.read_variables(config.init_from, parts.model)
  lines["batch"] = ", ".join(
    f"{name} {leaf.dtype} {'x'.join(map(str, leaf.shape))}" for name, leaf in batch.items()
  )
  lines["evaluation"] = "never"
  if config.eval.every:
    parts.evaluate  # noqa: B018 (opens its data)
    lines["evaluation"] = (
      f"{config.data.name} {config.eval.split}: {len(parts.eval_dataset):,} examples, every"
      f" {config.eval.every:,} steps and at the end; the best by {config.eval.best_by} is kept"
    )
  begin = time.monotonic()
  program = parts.step.lower(parts.abstract_state, batch).compile()
  seconds = time.monotonic() - begin
  held = sharding.bytes_per_device(parts.abstract_state)
  lines["memory"] = chips.memory_line(program, held, parts.mesh.devices.flat[0])
  lines["compiling"] = f"{seconds:.0f} s (kept in the cache)"
  lines["learning rate"] = description.rates(parts.schedule, config.train.num_steps)
  return run_summary(lines)


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  define_config(values)
  flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints, logs and pictures.", flag_values=values
  )
  flags.DEFINE_string(
    "profile",
    None,
    "Trace these steps into WORKDIR/profile, for example 100:105.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "study", None, "Set by effseg sweep: the storage that receives evaluations.", flag_values=values
  )
  flags.DEFINE_integer("trial", 0, "Set by effseg sweep: the number in it.", flag_values=values)
  flags.DEFINE_bool(
    "dry_run", False, "Build everything, print the plan, and stop.", flag_values=values
  )
  processes.define_flags(values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and trains."""
  with processes.run(values):
    no_arguments(arguments)
    if values.config is None or not (values.workdir or values.dry_run):
      raise UserError("--config and --workdir are needed; see effseg train --help.")
    logging.set_verbosity(logging.FATAL)  # orbax's reports of errors become one line of ours
    platform.tune_host_malloc()
    platform.use_compilation_cache()
    note = platform.unused_gpu()
    if note:
      print(note, flush=True)
    if values.dry_run:
      print(dry_run(values.config))
      return
    trial = None
    if values.study:
      from effseg_jax.sweep import study

      trial = study.attach(values.study, values.trial)
    train(values.config, values.workdir, values.profile, trial)
