"""Compares settings by cross-validation: a row per sweep over folds, with the mean of its folds.

  effseg folds runs/folds/plain runs/folds/classmix

Every folder is the `--workdir` of `effseg sweep` for a sweep whose trials are the folds
(`configs/sweeps/camvid_folds.py`). The evaluation after the last step is used: the best of
several evaluations would itself be chosen on the data that it is measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from effseg_jax.cli import Flags
from effseg_jax.cli.plot_curves import SCORES, read_curves, run_names
from effseg_jax.errors import UserError

Fold = tuple[int, float]  # the last evaluation's step and its score


def read_folds(sweep: str | Path, metric: str) -> dict[str, Fold]:
  """The last evaluation of every trial of a sweep.

  Args:
    sweep: working directory of the sweep.
    metric: of the evaluations, as they are logged: `mIoU`.

  Returns:
    Step and score by the trial's name, without those that have no evaluation yet.

  Raises:
    UserError: if there is no evaluated trial.
  """
  folds = {}
  for log in sorted(Path(sweep).glob("*/metrics.jsonl")):
    steps, scores = read_curves(log).get(f"eval/{metric}", ([], []))
    if steps:
      folds[log.parent.name] = steps[-1], scores[-1]
  if not folds:
    raise UserError(
      f"{sweep} has no trial with an evaluation of {metric}; expected a sweep's --workdir."
    )
  return folds


def fold_table(sweeps: Sequence[str | Path], metric: str) -> str:
  """A row per sweep: steps, every fold's score and their mean, in percent.

  The mean is left open (`-`) where a sweep lacks a fold that another one has, or where its folds
  stopped at different steps.

  Args:
    sweeps: working directories of sweeps over the same folds.
    metric: see `read_folds`.
  """
  rows = [read_folds(sweep, metric) for sweep in sweeps]
  folds = list(dict.fromkeys(name for row in rows for name in row))
  lines = [["setting", "steps", *folds, "mean"]]
  for name, row in zip(run_names(sweeps), rows, strict=True):
    steps = sorted({step for step, _ in row.values()})
    scores = [row[fold][1] if fold in row else None for fold in folds]
    complete = None not in scores and len(steps) == 1
    mean = f"{100 * sum(scores) / len(scores):.1f}" if complete else "-"
    numbers = ["-" if score is None else f"{100 * score:.1f}" for score in scores]
    lines.append([name, "/".join(map(str, steps)), *numbers, mean])
  body = ["| " + " | ".join(line) + " |" for line in lines]
  return "\n".join([body[0], "|" + "---|" * len(lines[0]), *body[1:]])


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  flags.DEFINE_string("metric", "mIoU", f"One of {', '.join(SCORES)}.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> None:
  """Prints the table."""
  if not arguments:
    raise UserError("expected the --workdir of one or more sweeps over folds.")
  print(fold_table(arguments, values.metric))
