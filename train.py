"""Trains a model: `python train.py --config=configs/afformer/camvid.py:tiny --workdir=runs/camvid`.

Any field of the configuration can be set from the command line:
`--config.train.batch_size=16 --config.optimizer.learning_rate=1e-3`. Started again with the same
command, a run goes on where its last checkpoint was taken.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from effseg_jax import platform
from effseg_jax.errors import UserError, friendly_exit, parse_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: configs/afformer/camvid.py[:variant].", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and pictures go.")


def train(config: ConfigDict, workdir: str) -> dict[str, Path]:
  """Runs the training that a configuration describes; returns the pictures drawn at the end."""
  import jax
  from clu import parameter_overview

  from effseg_jax.training import experiment, sharding
  from effseg_jax.training import state as state_lib
  from effseg_jax.training.checkpoint import Checkpointer, initialise_from
  from effseg_jax.training.log import Pace, ReportWindow, RunLog, run_summary
  from effseg_jax.training.step import compile_train_step, make_train_step

  # The devices, the data, the model and what it is trained for.
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.train.batch_size, mesh, "train.batch_size")
  dataset = experiment.open_dataset(config, config.data.train_split)
  task = experiment.make_task(config.task, dataset)
  model = experiment.make_model(config.model, task.num_classes)
  batches = experiment.train_batches(config, dataset)

  # The state, born sharded; from this run's last checkpoint or from other weights, if there are.
  inputs = experiment.input_shapes(task, batches)
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
  log = RunLog(workdir, config.train.num_steps, config.train.batch_size)
  run = experiment.describe_run(config, task, dataset)
  checkpointer = Checkpointer(workdir, run, keep=config.checkpoint.keep, metric=config.eval.best_by)
  resumed = checkpointer.restore(state, batches)
  if resumed is not None:
    state = resumed
  elif config.init_from:
    state = initialise_from(
      state, experiment.read_variables(config.init_from, model), config.init_from
    )
  log.text(run_summary(experiment.describe(config, state, dataset, mesh, workdir)))
  log.document("parameters.txt", parameter_overview.get_parameter_overview(state.params))

  # The compiled programs.
  train_step = compile_train_step(
    make_train_step(
      model,
      task,
      optimizer,
      accumulate=config.train.accumulate,
      average_decay=config.train.average_decay,
      freeze=config.optimizer.freeze,
    ),
    state,
    mesh,
  )
  evaluate = experiment.make_evaluation(config, model, task, mesh)

  # The loop.
  step = first_step = int(state.step)
  stop = _StopRequest()
  window, pace = ReportWindow(task), Pace()
  previous, pictures = None, {}
  while step < config.train.num_steps and not stop.requested:
    state, report = train_step(state, sharding.put_batch(next(batches), mesh))
    step += 1
    pace.step()
    window.add(report)
    experiment.check_finite(previous, state, config, workdir)
    previous = (step, report)

    last = step == config.train.num_steps
    if step == first_step + 1:
      jax.block_until_ready(report)
      log.text(f"compiled in {pace.seconds_per_step():.0f} s")
      pace.restart()
    if step % config.log.every == 0 or last:
      numbers = window.summary()
      log.train(step, {**numbers, "learning_rate": float(schedule(step - 1))}, pace)
      pace.restart()
    metrics = None
    with pace.pause():
      if step % config.eval.every == 0 or last:
        result = evaluate(state.eval_variables())
        metrics = result.scalars
        log.evaluation(step, metrics, config.eval.best_by)
        for name, image in result.pictures.items():
          pictures[name] = log.picture(step, name, image)
      if metrics or step % config.checkpoint.every == 0 or stop.requested:
        checkpointer.save(state, batches, metrics)

  experiment.check_finite(previous, state, config, workdir)
  checkpointer.close()
  if stop.requested:
    log.text(f"stopped at step {step}; the same command goes on from here")
  elif step == first_step:
    log.text(f"nothing left to do: {workdir} has already reached step {step}")
  else:
    log.text(result.table)
    log.text(f"checkpoint: {workdir}/checkpoints    log: {workdir}/metrics.jsonl")
    for name, path in pictures.items():
      log.text(f"{name}: {path}")
  log.close()
  batches.close()
  return pictures


class _StopRequest:
  """Turns the first Ctrl-C or SIGTERM into "save after this step, then stop"."""

  def __init__(self) -> None:
    self.requested = False
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._handle)

  def _handle(self, number: int, _: object) -> None:
    self.requested = True
    signal.signal(number, signal.default_int_handler)  # a second one does not wait
    print("stopping after this step ...", file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
  """Checks the flags and trains."""
  with friendly_exit():
    if len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
    if _CONFIG.value is None or not _WORKDIR.value:
      raise UserError("--config and --workdir are needed; see python train.py --help.")
    logging.set_verbosity(logging.ERROR)  # orbax tells of every file it reads and writes
    platform.tune_host_malloc()
    platform.use_compilation_cache()
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
