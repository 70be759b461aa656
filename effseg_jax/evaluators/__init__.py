"""Evaluation per task: the on-device step, the host-side accumulation and the report.

One file per task. `training/evaluation.py` runs them: it compiles `step` for the mesh, feeds every
example once, and asks for the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from effseg_jax import task_table


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
  """The result of an evaluation, the same on every process.

  Attributes:
    scalars: the metrics for the log; the best checkpoint is chosen by one of them.
    table: for people to read.
    report: JSON-compatible, for `metrics.json`.
    pictures: name -> uint8 (H, W, 3); `samples` shows examples beside their ground truth.
    write_predictions: writes what this process predicted into a folder in the field's official
      format; None where the task has no such format.
  """

  scalars: dict[str, float]
  table: str
  report: dict[str, Any]
  pictures: dict[str, np.ndarray]
  write_predictions: Callable[[Path], None] | None = None


class Evaluator(Protocol):
  """One task's evaluation of one data set; made anew for each pass over it."""

  @staticmethod
  def metric_names(options: Mapping[str, Any], num_classes: int | None) -> tuple[str, ...]:
    """The scalars that the result may have.

    Args:
      options: the settings of the evaluation.
      num_classes: of the data set; None: it is not known yet.
    """

  def step(self, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """The on-device computation for a batch; pure, compiled once.

    Returns:
      `totals`, a tree of arrays summed over the global batch (or None), and `examples`, a tree of
      arrays with a leading batch axis (or None).
    """

  def update(self, batch: Mapping[str, np.ndarray], totals: Any, examples: Any) -> None:
    """Counts a batch on the host.

    Args:
      batch: this process's examples; those of weight 0 do not count.
      totals: of the global batch, the same on every process.
      examples: this process's rows.
    """

  def result(self) -> EvaluationResult:
    """Merges over all processes and summarises; every process calls it."""


def make_evaluator(
  task_name: str, model: Any, task: Any, dataset: Any, options: Mapping[str, Any]
) -> Evaluator:
  """Makes a task's evaluator.

  Args:
    task_name: `semantic`, `classification`, `universal` or `audio_visual`.
    model: to evaluate.
    task: the task.
    dataset: the open split.
    options: the settings of the evaluation; each task reads its own.

  Raises:
    UserError: for an unknown task, or settings that make no sense.
  """
  return task_table.find(task_name, "evaluator")(model, task, dataset, options)


def metric_names(
  task_name: str, options: Mapping[str, Any], num_classes: int | None = None
) -> tuple[str, ...]:
  """The metrics that a task's evaluation gives, by which the best checkpoint can be chosen.

  Args:
    task_name: as for `make_evaluator`.
    options: the settings of the evaluation.
    num_classes: of the data set; None: those of any data set of the task.

  Raises:
    UserError: for an unknown task.
  """
  return task_table.find(task_name, "evaluator").metric_names(options, num_classes)


def sum_over_processes(array: Any) -> np.ndarray:
  """Adds up a host array (int64 stays exact) over all processes."""
  array = np.asarray(array)
  if jax.process_count() == 1:
    return array
  # As bytes, because jax would truncate 64-bit numbers to 32.
  rows = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
  each = [np.frombuffer(np.asarray(row).tobytes(), array.dtype) for row in rows]
  return np.sum(each, axis=0, dtype=array.dtype).reshape(array.shape)


def spread(count: int, over: int) -> set[int]:
  """`count` whole numbers, evenly spread over `range(over)`."""
  return set(np.linspace(0, over - 1, count).astype(int).tolist()) if count and over else set()
