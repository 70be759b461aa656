"""Runs an experiment with many settings, on any number of workers, and compares the results.

  effseg sweep --sweep=afformer_lr --workdir=runs/sweeps/lr                # this process works
  effseg sweep --sweep=afformer_lr --workdir=runs/sweeps/lr --worker       # so does any other one
  effseg sweep --sweep=afformer_lr --print                                 # the trials' commands

Trials, samplers and pruners are Optuna's; its storage (by default WORKDIR/study.log; `--storage`
takes any URL of Optuna's) and the working directory are all that workers share. Workers may start
and end at any time: a trial whose worker died is resumed from its checkpoint by the next one. A
trial that fails is recorded with its last line and does not stop the others; `--retry_failed` runs
it again. `--config.FIELD=VALUE` holds for all trials.
"""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from effseg_jax import configs
from effseg_jax.cli import Flags
from effseg_jax.configs.sweeps import Search, Sweep
from effseg_jax.errors import UserError


def load_sweep(name: str) -> Sweep | Search:
  """Reads a sweep.

  Args:
    name: a file with `get_sweep()`, or the name of a packaged one: `afformer_lr`.

  Raises:
    UserError: if there is none, or it describes nothing.
  """
  path = Path(name)
  if not path.is_file():
    stem = name.removeprefix("configs/").removeprefix("sweeps/").removesuffix(".py")
    path = Path(configs.__file__).parent / "sweeps" / f"{stem}.py"
  if not path.is_file():
    raise UserError(
      f"--sweep={name} does not exist; expected a file with get_sweep(), or one of"
      f" {', '.join(packaged())}."
    )
  get_sweep = runpy.run_path(str(path)).get("get_sweep")
  if get_sweep is None:
    raise UserError(f"--sweep={name} has no get_sweep; expected a sweep's file.")
  plan = get_sweep()
  if not plan.trials:
    raise UserError(f"--sweep={name} has no trials.")
  return plan


def packaged() -> list[str]:
  """The sweeps that come with the package."""
  folder = Path(configs.__file__).parent / "sweeps"
  return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  flags.DEFINE_string("sweep", None, "File with get_sweep(), or a name.", flag_values=values)
  flags.DEFINE_string("workdir", "", "Default: runs/sweeps/NAME.", flag_values=values)
  flags.DEFINE_string("storage", None, "Optuna's storage as a URL.", flag_values=values)
  flags.DEFINE_integer(
    "trials", None, "Number of trials of a search.", lower_bound=1, flag_values=values
  )
  flags.DEFINE_integer("workers", 1, "Workers on this machine.", lower_bound=1, flag_values=values)
  flags.DEFINE_bool("worker", False, "Join a sweep that was started elsewhere.", flag_values=values)
  flags.DEFINE_bool("retry_failed", False, "Run failed trials again.", flag_values=values)
  flags.DEFINE_bool("print", False, "Only print the trials' commands.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags; runs the sweep, or prints its commands."""
  if not values.sweep:
    raise UserError("--sweep is needed; see effseg sweep --help.")
  workdir = Path(values.workdir or Path("runs/sweeps") / Path(values.sweep).stem)
  plan = load_sweep(values.sweep)
  common = _common_flags(arguments)
  metric = _check_fields(plan, common)
  if values.print:
    _print_commands(plan, workdir, common)
    return 0

  from effseg_jax.sweep import report, study, worker

  workdir = workdir.absolute()
  url = study.storage_url(workdir, values.storage)
  if not values.worker:
    with study.exclusive(workdir / "queue.lock"):
      opened = study.create(plan, url, metric, values.trials)
      if values.retry_failed:
        print(f"{study.retry_failed(opened)} failed trials are run again")
  others = [
    subprocess.Popen([sys.executable, "-m", "effseg_jax", *_worker_words(values, workdir, common)])
    for _ in range(values.workers - 1)
  ]
  try:
    worker.work(worker.Job(plan, url, workdir, common, metric))
  finally:
    for process in others:
      process.wait()
  if values.worker:
    return 0
  opened = study.join(plan, url)
  rows = report.results(plan, opened, workdir, metric)
  (workdir / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
  print(report.table(rows))
  pictures = report.plot(plan, opened, workdir, metric)
  print(f"pictures: {', '.join(map(str, pictures))}" if pictures else "no picture was drawn")
  return 1 if any(row["state"] == "failed" for row in rows) else 0


def _print_commands(plan: Sweep | Search, workdir: Path, common: Sequence[str]) -> None:
  from effseg_jax.sweep.worker import trial_flags

  if isinstance(plan, Search):
    raise UserError("--print needs a list of trials; a search chooses each trial from the others.")
  width = max(2, len(str(len(plan.trials) - 1)))
  for number, changes in enumerate(plan.trials):
    words = [f"--config={plan.config}", f"--workdir={workdir / f'{number:0{width}d}'}"]
    print(shlex.join(["effseg", "train", *words, *trial_flags(changes), *common]))


def _worker_words(values: Flags, workdir: Path, common: Sequence[str]) -> list[str]:
  words = ["sweep", f"--sweep={values.sweep}", f"--workdir={workdir}", "--worker", *common]
  return words + ([f"--storage={values.storage}"] if values.storage else [])


def _common_flags(words: Sequence[str]) -> list[str]:
  """Checks that all words are `--config.FIELD=VALUE`.

  Raises:
    UserError: for any other word.
  """
  for word in words:
    if not word.startswith("--config.") or "=" not in word:
      raise UserError(f"unexpected argument {word!r}; --help lists the flags.")
  return list(words)


def _check_fields(plan: Sweep | Search, common: Sequence[str]) -> str:
  """Checks the fields that the trials change; returns the experiment's metric.

  Raises:
    UserError: for a field that the experiment does not have.
  """
  config = configs.load(plan.config)
  fields = list(plan.space) if isinstance(plan, Search) else [f for t in plan.trials for f in t]
  changed = [word.removeprefix("--config.").partition("=")[0] for word in common]
  for field in dict.fromkeys([*fields, *changed]):
    owner = config
    for part in field.split("."):
      if not hasattr(owner, "get") or part not in owner:
        raise UserError(f"the sweep changes {field}, which the experiment does not have.")
      owner = owner[part]
  for word in common:
    if word.startswith("--config.eval.best_by="):
      return word.partition("=")[2]
  return str(config.eval.best_by)
