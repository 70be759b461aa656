r"""Runs an experiment again and again with other settings, and compares what came out.

  effseg sweep --sweep=configs/sweeps/afformer_lr.py
  effseg sweep --sweep=configs/sweeps/afformer_lr.py --print    # for another launcher

Trials run one after the other, each as a train.py of its own. The same command goes on after an
interruption: finished trials are left alone, the others continue from their checkpoints. A trial
that fails is reported and stops none of the others. `--config.KEY=VALUE` holds for all trials.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from effseg_jax import configs
from effseg_jax.cli import Flags
from effseg_jax.cli.plot_curves import read_curves
from effseg_jax.configs.sweeps import Sweep
from effseg_jax.errors import UserError

_LOG = "train.log"


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a sweep.

  Attributes:
    name: of its folder.
    command: that runs it.
    workdir: its folder.
    changes: field of the configuration -> value.
    num_steps: when it is finished.
    metric: by which runs are compared.
  """

  name: str
  command: list[str]
  workdir: Path
  changes: Mapping[str, Any]
  num_steps: int
  metric: str

  def curve(self) -> tuple[list[int], list[float]]:
    """Steps and values of the metric so far."""
    try:
      curves = read_curves(self.workdir)
    except UserError:  # nothing logged yet
      return [], []
    return curves.get(f"eval/{self.metric}", ([], []))

  @property
  def finished(self) -> bool:
    """Whether the evaluation after the last step is there."""
    steps = self.curve()[0]
    return bool(steps) and steps[-1] >= self.num_steps


def load_sweep(path: str) -> Sweep:
  """Reads a sweep's file.

  Raises:
    UserError: if there is none, or it describes nothing.
  """
  if not Path(path).is_file():
    raise UserError(f"--sweep={path} does not exist; expected configs/sweeps/X.py.")
  get_sweep = runpy.run_path(path).get("get_sweep")
  if get_sweep is None:
    raise UserError(f"--sweep={path} has no get_sweep; expected a sweep's file.")
  sweep = get_sweep()
  if not sweep.trials:
    raise UserError(f"--sweep={path} has no trials.")
  return sweep


def make_trials(sweep: Sweep, workdir: Path, common: Mapping[str, str]) -> list[Trial]:
  """The runs of a sweep, each in a folder below `workdir`.

  Args:
    sweep: what is run.
    workdir: of the sweep.
    common: changes that hold for all trials, as text.

  Raises:
    UserError: for a field that the experiment does not have.
  """
  varied = varied_fields(sweep.trials)
  width = len(str(len(sweep.trials) - 1))
  trials = []
  for number, changes in enumerate(sweep.trials):
    words = [
      f"{field.rpartition('.')[2]}={_text(changes[field])}" for field in varied if field in changes
    ]
    name = "_".join([f"{number:0{width}d}", *(word.replace(" ", "") for word in words)])
    overrides = {**{field: _text(value) for field, value in changes.items()}, **common}
    config = configs.load(sweep.config)
    for field, value in overrides.items():
      _change(config, field, value)
    command = ["train", f"--config={sweep.config}", f"--workdir={workdir / name}"]
    command += [f"--config.{field}={value}" for field, value in overrides.items()]
    trials.append(
      Trial(
        name, command, workdir / name, changes, config.train.num_steps, str(config.eval.best_by)
      )
    )
  return trials


def varied_fields(trials: Sequence[Mapping[str, Any]]) -> list[str]:
  """The fields whose value is not the same everywhere; all of them if there is one trial."""
  fields = list(dict.fromkeys(field for trial in trials for field in trial))
  if len(trials) == 1:
    return fields
  return [field for field in fields if len({_text(trial.get(field)) for trial in trials}) > 1]


def run_trials(trials: Sequence[Trial]) -> dict[str, str]:
  """Runs what is not finished; returns the reasons of those that failed, by name."""
  failed: dict[str, str] = {}
  for number, trial in enumerate(trials, 1):
    title = f"trial {number} of {len(trials)}, {trial.name}:"
    if trial.finished:
      print(f"{title} finished before, {_result(trial)}", flush=True)
      continue
    begin = time.monotonic()
    status = _train(trial)
    seconds = time.monotonic() - begin
    if trial.finished:
      print(f"{title} {_result(trial)}, {seconds:.0f} s", flush=True)
    elif status == 0:  # it was told to stop, and not by us
      print(f"{title} {_reason(trial, status)}", flush=True)
    else:
      failed[trial.name] = _reason(trial, status)
      print(f"{title} failed: {failed[trial.name]}", flush=True)
  return failed


def _train(trial: Trial) -> int:
  """Runs a trial to its end, or until the sweep is told to stop: then the trial saves first."""
  trial.workdir.mkdir(parents=True, exist_ok=True)
  with (trial.workdir / _LOG).open("a", encoding="utf-8") as log:
    process = subprocess.Popen(
      [sys.executable, "-m", "effseg_jax", *trial.command],
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # it is we who tell it of Ctrl-C, once
      env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    stopped = []
    handlers = {
      number: signal.signal(number, lambda number, frame: stopped.append(number))
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
      while process.poll() is None:
        time.sleep(0.2)
        if stopped:
          process.send_signal(signal.SIGTERM)
          print(f"{trial.name} saves and stops; the same command goes on", flush=True)
          process.wait()
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
  if stopped:
    raise KeyboardInterrupt
  return process.returncode


def _reason(trial: Trial, status: int) -> str:
  """The last words of a trial that did not reach its end."""
  text = (trial.workdir / _LOG).read_text(encoding="utf-8", errors="replace").strip()
  last = text.splitlines()[-1] if text else "it said nothing"
  ending = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
  return f"{ending}, {last} ({trial.workdir / _LOG})"


def results(trials: Sequence[Trial], failed: Mapping[str, str]) -> list[dict[str, Any]]:
  """What is known of each trial, the best first."""
  varied = varied_fields([trial.changes for trial in trials])
  rows = []
  for trial in trials:
    steps, values = trial.curve()
    best = max(values, default=math.nan)
    rows.append(
      {
        "trial": trial.name,
        "state": "finished" if trial.finished else "failed" if trial.name in failed else "open",
        "changes": {field: trial.changes.get(field) for field in varied},
        "metric": trial.metric,
        "best": best,
        "best_step": steps[values.index(best)] if values else 0,
        "last": values[-1] if values else math.nan,
        "reason": failed.get(trial.name, ""),
      }
    )
  return sorted(rows, key=lambda row: math.inf if math.isnan(row["best"]) else -row["best"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line per trial."""
  fields = list(rows[0]["changes"])
  metric = rows[0]["metric"]
  short = [field.rpartition(".")[2] for field in fields]
  lines = [["", *short, f"best {metric}, %", "at step", "last, %", "state"]]
  for rank, row in enumerate(rows, 1):
    lines.append(
      [
        str(rank),
        *("-" if row["changes"][f] is None else _text(row["changes"][f]) for f in fields),
        *(_percent(row["best"]), str(row["best_step"]), _percent(row["last"]), row["state"]),
      ]
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in lines]
  return "\n".join(text + [f"{row['trial']}: {row['reason']}" for row in rows if row["reason"]])


def plot(trials: Sequence[Trial], path: Path) -> Path | None:
  """Draws the metric over each numeric setting and over the steps; None without matplotlib."""
  try:
    import matplotlib
  except ImportError:
    return None
  matplotlib.use("Agg")
  from matplotlib import pyplot

  curves = [(trial, *trial.curve()) for trial in trials]
  fields = [
    field
    for field in varied_fields([trial.changes for trial in trials])
    if all(isinstance(trial.changes.get(field), int | float) for trial in trials)
  ]
  count = len(fields) + 1
  figure, axes = pyplot.subplots(
    1, count, figsize=(4.2 * count, 3.6), constrained_layout=True, squeeze=False
  )
  for field, panel in zip(fields, axes[0], strict=False):
    points = [(trial.changes[field], 100 * max(values)) for trial, _, values in curves if values]
    panel.scatter(*zip(*points, strict=True) if points else ([], []), color="#0072B2")
    numbers = [value for value, _ in points if value > 0]
    if len(numbers) == len(points) > 0 and max(numbers) >= 8 * min(numbers):
      panel.set_xscale("log")
    panel.set_xlabel(field)
    panel.set_ylabel(f"best {trials[0].metric}, %")
  for trial, steps, values in curves:
    axes[0][-1].plot(steps, [100 * value for value in values], label=trial.name, linewidth=1.4)
  axes[0][-1].set_xlabel("step")
  axes[0][-1].set_ylabel(f"{trials[0].metric}, %")
  if len(trials) <= 10:
    axes[0][-1].legend(fontsize=6)
  for panel in axes[0]:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#E4E4E0", linewidth=0.8)
    panel.set_axisbelow(True)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130, facecolor="white")
  pyplot.close(figure)
  return path


def _change(config: Any, field: str, value: str) -> None:
  """Sets what the trial's own train.py is going to read: here only the length and the metric."""
  section, _, name = field.rpartition(".")
  for part in section.split(".") if section else ():
    config = config.get(part)
    if config is None:
      break
  if config is None or name not in config:
    raise UserError(f"the sweep changes {field}, which the experiment does not have.")
  if field in ("train.num_steps", "eval.best_by"):
    config[name] = type(config[name])(value)


def _text(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> str:
  return "-" if math.isnan(share) else f"{100 * share:.1f}"


def _result(trial: Trial) -> str:
  return f"{trial.metric} {_percent(max(trial.curve()[1]))}%"


def define_flags(values: Flags) -> None:
  """Declares the flags; `--config.FIELD=VALUE` changes a field of all trials."""
  flags.DEFINE_string("sweep", None, "File with get_sweep().", flag_values=values)
  flags.DEFINE_string("workdir", "", "Default: runs/sweeps/NAME.", flag_values=values)
  flags.DEFINE_bool("print", False, "Only print the trials' commands.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags; runs the sweep, or prints its commands."""
  if not values.sweep:
    raise UserError("--sweep is needed; see effseg sweep --help.")
  workdir = Path(values.workdir or Path("runs/sweeps") / Path(values.sweep).stem)
  if not values.print:
    workdir = workdir.absolute()
  trials = make_trials(load_sweep(values.sweep), workdir, _common_changes(arguments))
  if values.print:
    for trial in trials:
      print(shlex.join(["effseg", *trial.command]))
    return 0
  failed = run_trials(trials)
  rows = results(trials, failed)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
  print(table(rows))
  picture = plot(trials, workdir / "sweep.png")
  print(f"plot: {picture}" if picture else "no plot: pip install 'effseg_jax[train]'")
  return 1 if failed else 0


def _common_changes(words: Sequence[str]) -> dict[str, str]:
  """Reads `--config.FIELD=VALUE`.

  Raises:
    UserError: for any other word.
  """
  common = {}
  for word in words:
    field, equals, value = word.removeprefix("--config.").partition("=")
    if not word.startswith("--config.") or not equals:
      raise UserError(f"unexpected argument {word!r}; --help lists the flags.")
    common[field] = value
  return common
