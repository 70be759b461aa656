"""A worker of a sweep: takes trials until none is left, and runs each as a training of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effseg_jax.configs import sweeps
from effseg_jax.sweep import study as studies
from effseg_jax.sweep.report import read_numbers

if TYPE_CHECKING:
  import optuna

# Runs a trial.
_TRAINER = [sys.executable, "-m", "effseg_jax"]

_LOG, _LOCK = "train.log", "worker.lock"
_POLL_SECONDS = 0.2  # between looks at a training that runs
_WAIT_SECONDS = 2.0  # between looks at trials that other workers run


@dataclasses.dataclass(frozen=True)
class Job:
  """The shared settings of a sweep's workers.

  Attributes:
    plan: the sweep.
    url: of the storage, which has the study.
    workdir: of the sweep, seen by all workers.
    common: flags that hold for all trials: `--config.seed=3`.
    metric: the experiment's `eval.best_by`.
  """

  plan: sweeps.Sweep | sweeps.Search
  url: str
  workdir: Path
  common: Sequence[str]
  metric: str


def work(job: Job) -> None:
  """Runs trials until all are finished, those of workers that died included; prints a line each.

  Raises:
    KeyboardInterrupt: after Ctrl-C or SIGTERM; the running trial has saved and can be resumed.
  """
  while True:
    study = studies.join(job.plan, job.url)
    with _next_trial(job, study) as (trial, lock):
      if trial is not None:
        _run(job, trial, lock)
        continue
    if not _unfinished(study):
      return
    time.sleep(_WAIT_SECONDS)  # for the trials of the other workers, which may die


def _unfinished(study: optuna.Study) -> list[Any]:
  return [trial for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished()]


@contextlib.contextmanager
def _next_trial(job: Job, study: optuna.Study) -> Iterator[tuple[Any, Any]]:
  """An abandoned trial, or the next of the queue, with the lock of its folder; (None, None)."""
  optuna = studies.import_optuna()
  running, waiting = optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING
  number, lock = None, None
  workdir = job.workdir
  with studies.exclusive(workdir / "queue.lock"):
    for frozen in study.get_trials(deepcopy=False, states=(running,)):
      lock = _lock(workdir / frozen.user_attrs[studies.FOLDER])
      if lock is not None:
        number = frozen.number
        break
    if number is None and study.get_trials(deepcopy=False, states=(waiting,)):
      asked = study.ask()
      number = asked.number
      lock = _lock(workdir / asked.user_attrs[studies.FOLDER])
    if number is None:
      yield None, None
      return
    study = studies.join(job.plan, job.url, number)
    frozen = study.get_trials(deepcopy=False)[number]
    trial = optuna.trial.Trial(study, frozen._trial_id)
    # The values are stored before another worker may look.
    studies.changes_of(job.plan, trial)
  try:
    yield trial, lock
  finally:
    if lock is not None:
      lock.close()


def _lock(folder: Path) -> Any:
  """The lock of a trial's folder; None if another worker or its training still holds it."""
  folder.mkdir(parents=True, exist_ok=True)
  file = (folder / _LOCK).open("a")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    return None
  return file


def _run(job: Job, trial: optuna.Trial, lock: Any) -> None:
  """Runs a trial's training to its end and tells the study how it ended."""
  optuna = studies.import_optuna()
  states, study = optuna.trial.TrialState, trial.study
  folder = job.workdir / trial.user_attrs[studies.FOLDER]
  objectives = studies.objectives_of(job.plan, job.metric)
  begin = time.monotonic()
  flags = trial_flags(studies.changes_of(job.plan, trial)) + list(job.common)
  command = ["train", f"--config={job.plan.config}", f"--workdir={folder}", *flags]
  status = _train([*command, f"--study={job.url}", f"--trial={trial.number}"], folder, lock)
  seconds = time.monotonic() - begin
  title = f"trial {trial.number} ({' '.join(flags) or 'as configured'}):"
  attributes = study.get_trials(deepcopy=False)[trial.number].user_attrs
  if status:
    reason = last_words(folder, status)
    trial.set_user_attr(studies.REASON, reason)
    study.tell(trial, state=states.FAIL)
    _say(f"{title} failed: {reason}")
    return
  numbers = [read_numbers(folder, name) for name in objectives]
  values = [
    found[-1] if name.startswith("train/") else max(found)
    for name, found in zip(objectives, numbers, strict=True)
    if found
  ]
  shown = ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives, values, strict=False))
  if studies.PRUNED_AT in attributes:
    study.tell(trial, state=states.PRUNED)
    step = attributes[studies.PRUNED_AT]
    _say(f"{title} pruned at step {step}, {shown}, {seconds:.0f} s")
  elif len(values) < len(objectives) or not all(map(math.isfinite, values)):
    trial.set_user_attr(studies.REASON, f"no value of {', '.join(objectives)} was logged")
    study.tell(trial, state=states.FAIL)
    _say(f"{title} failed: no value of {', '.join(objectives)} was logged")
  else:
    study.tell(trial, values)
    _say(f"{title} {shown}, {seconds:.0f} s")


def _say(line: str) -> None:
  print(line, flush=True)


def trial_flags(changes: dict[str, Any]) -> list[str]:
  """A trial's changes as flags of `effseg train`."""
  return [f"--config.{field}={text(value)}" for field, value in changes.items()]


def text(value: Any) -> str:
  """A value as it is written on the command line."""
  return repr(value) if isinstance(value, float) else str(value)


def _train(command: list[str], folder: Path, lock: Any) -> int:
  """Runs the training; on Ctrl-C or SIGTERM it saves first.

  The training inherits the lock, so that no other worker takes the trial while it still runs.
  """
  with (folder / _LOG).open("a", encoding="utf-8") as log:
    process = subprocess.Popen(
      [*_TRAINER, *command],
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # Ctrl-C reaches this process alone, which forwards it once
      pass_fds=() if lock is None else (lock.fileno(),),
      env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    stopped: list[int] = []
    handlers = {
      number: signal.signal(number, lambda number, frame: stopped.append(number))
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
      while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        if stopped:
          process.send_signal(signal.SIGTERM)
          print(f"{folder.name} saves and stops; the same command resumes it", flush=True)
          process.wait()
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
  if stopped:
    raise KeyboardInterrupt
  return process.returncode


def last_words(folder: Path, status: int) -> str:
  """The last line that a failed training printed."""
  lines = (folder / _LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
  ending = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
  return f"{ending}, {lines[-1] if lines else 'no output'} ({folder / _LOG})"
