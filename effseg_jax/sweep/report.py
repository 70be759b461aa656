"""The report of a sweep: a table, `results.json` and pictures."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effseg_jax.configs import sweeps
from effseg_jax.sweep import study as studies

if TYPE_CHECKING:
  import optuna

_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}


def read_numbers(folder: Path, name: str) -> list[float]:
  """The logged values of a number, in the order of their steps.

  Args:
    folder: working directory of a run.
    name: `train/...`, `eval/...`, or a metric of the evaluation without its prefix.
  """
  key = name if name.startswith(("train/", "eval/")) else f"eval/{name}"
  found = {}
  with contextlib.suppress(FileNotFoundError):
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
      with contextlib.suppress(ValueError, KeyError, TypeError):
        record = json.loads(line)
        found[int(record["step"])] = float(record[key])
  return [value for _, value in sorted(found.items()) if math.isfinite(value)]


def results(
  plan: sweeps.Sweep | sweeps.Search, study: optuna.Study, workdir: Path, metric: str
) -> list[dict[str, Any]]:
  """A record of each trial, the best first.

  Returns:
    For each trial `trial`, `state`, `changes`, `metric`, `best`, `last`, `steps` (trained so far),
    `values` (of all objectives) and `reason` (of a failure).
  """
  objectives = studies.objectives_of(plan, metric)
  trials = study.get_trials(deepcopy=False)
  retried = {trial.user_attrs.get("retry_of") for trial in trials}
  rows = []
  for trial in trials:
    if trial.number in retried:
      continue
    folder = workdir / trial.user_attrs[studies.FOLDER]
    numbers = read_numbers(folder, objectives[0])
    rows.append(
      {
        "trial": trial.number,
        "folder": folder.name,
        "state": _STATES.get(trial.state.name, "open"),
        "changes": dict(trial.user_attrs.get(studies.CHANGES) or trial.params),
        "metric": objectives[0],
        "best": max(numbers, default=math.nan),
        "last": numbers[-1] if numbers else math.nan,
        "steps": last_step(folder),
        "values": dict(zip(objectives, trial.values or (), strict=False)),
        "reason": trial.user_attrs.get(studies.REASON, ""),
      }
    )
  return sorted(rows, key=lambda row: math.inf if math.isnan(row["best"]) else -row["best"])


def last_step(folder: Path) -> int:
  """The last step that a run has logged; 0 for one that has not begun."""
  with contextlib.suppress(FileNotFoundError, IndexError, ValueError, KeyError):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(json.loads(line)["step"]) for line in lines if line.startswith("{"))
  return 0


def varied_fields(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """The fields whose value is not the same in all trials; all of them if there is one trial."""
  fields = list(dict.fromkeys(field for row in rows for field in row["changes"]))
  if len(rows) == 1:
    return fields
  return [field for field in fields if len({str(row["changes"].get(field)) for row in rows}) > 1]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line per trial, and how many steps all of them took."""
  fields = varied_fields(rows)
  short = [field.rpartition(".")[2] for field in fields]
  lines = [["", "trial", *short, f"best {rows[0]['metric']}, %", "last, %", "steps", "state"]]
  for rank, row in enumerate(rows, 1):
    values = ["-" if row["changes"].get(f) is None else _short(row["changes"][f]) for f in fields]
    shares = [_percent(row["best"]), _percent(row["last"])]
    lines.append([str(rank), str(row["trial"]), *values, *shares, str(row["steps"]), row["state"]])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in lines]
  text += [f"trial {row['trial']}: {row['reason']}" for row in rows if row["reason"]]
  longest = max(row["steps"] for row in rows) * len(rows)
  total = sum(row["steps"] for row in rows)
  if longest:
    text.append(
      f"{total:,} steps in all, {100 * total / longest:.0f} % of {len(rows)} trials to their end"
    )
  return "\n".join(text)


def plot(
  plan: sweeps.Sweep | sweeps.Search, study: optuna.Study, folder: Path, metric: str
) -> list[Path]:
  """Draws Optuna's pictures: history, importance, parallel coordinates, the Pareto front.

  Pictures that cannot be drawn (too few trials, a list without a space) are left out.

  Returns:
    The paths; none without matplotlib.
  """
  try:
    import matplotlib
  except ImportError:
    return []
  matplotlib.use("Agg")
  from matplotlib import pyplot
  from optuna.importance import PedAnovaImportanceEvaluator
  from optuna.visualization import matplotlib as pictures

  objectives = studies.objectives_of(plan, metric)
  if len(objectives) > 1:
    draw = {"pareto": lambda: pictures.plot_pareto_front(study, target_names=list(objectives))}
  else:
    evaluator = PedAnovaImportanceEvaluator()
    draw = {
      "history": lambda: pictures.plot_optimization_history(study, target_name=metric),
      "curves": lambda: pictures.plot_intermediate_values(study),
      "importance": lambda: pictures.plot_param_importances(study, evaluator=evaluator),
      "parallel": lambda: pictures.plot_parallel_coordinate(study, target_name=metric),
    }
  paths = []
  folder.mkdir(parents=True, exist_ok=True)
  for name, picture in draw.items():
    with warnings.catch_warnings(), contextlib.suppress(ValueError, RuntimeError, KeyError):
      warnings.simplefilter("ignore")  # Optuna's matplotlib pictures are marked experimental
      axes = picture()
      figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
      figure.set_size_inches(8, 5)
      path = folder / f"{name}.png"
      figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")
      paths.append(path)
    pyplot.close("all")
  return paths


def _short(value: Any) -> str:
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> str:
  return "-" if math.isnan(share) else f"{100 * share:.1f}"
