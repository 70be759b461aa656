"""The training's side of a sweep: reports evaluations to Optuna and ends early if pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from effseg_jax.errors import UserError


class StudyTrial:
  """One trial of a study, as the training that runs it sees it."""

  def __init__(self, trial: Any, metric: str):
    """Keeps the trial.

    Args:
      trial: an `optuna.Trial`; its study has the pruner.
      metric: of the evaluation; the pruner judges by it.
    """
    self._trial, self._metric = trial, metric

  def report(self, step: int, metrics: Mapping[str, float]) -> bool:
    """Reports an evaluation; returns whether the trial should end here.

    With several processes each of them calls it, and the first one reports.

    Raises:
      UserError: if the evaluation does not give the metric.
    """
    if self._metric not in metrics:
      raise UserError(
        f"the sweep judges by {self._metric}; the evaluation gives {', '.join(metrics)}."
      )
    if jax.process_index() != 0:
      return False
    if len(self._trial.study.directions) > 1:  # Optuna prunes by a single objective only
      return False
    self._trial.report(float(metrics[self._metric]), step)
    if not self._trial.should_prune():
      return False
    self._trial.set_user_attr("pruned_at", step)
    return True
