"""The training transforms and evaluation batches of a task, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effseg_jax import task_table
from effseg_jax.input_pipeline.eval_batches import EvalBatches
from effseg_jax.input_pipeline.transforms import Transform


def train_transforms(task: str, **options: Any) -> list[Transform]:
  """The training transforms of a task.

  Args:
    task: `semantic`, `classification`, `universal` or `audio_visual`.
    **options: of that task's function of transforms.

  Raises:
    UserError: for an unknown task.
  """
  return task_table.find(task, "transforms")(**options)


def as_task_reads(task: str, dataset: Any) -> Any:
  """An open split with the examples that a task reads: for example class maps as segments."""
  if task == "universal":
    from effseg_jax.input_pipeline.datasets.panoptic import as_universal

    return as_universal(dataset)
  return dataset


def eval_batches(
  task: str, dataset: Any, options: Mapping[str, Any], **loading: Any
) -> EvalBatches:
  """This process's part of the evaluation batches of a data set, every example once.

  Args:
    task: as above.
    dataset: an open split.
    options: the settings of the evaluation; each task reads its own.
    **loading: `batch_size` (over all processes), `process_index`, `process_count`, `num_threads`
      and `on_error`, see `EvalBatches`.

  Raises:
    UserError: for an unknown task.
  """
  return task_table.find(task, "eval_batches")(dataset, options, **loading)
