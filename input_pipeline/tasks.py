"""Which transforms and which evaluation batches a task has, by its name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from effseg_jax.errors import UserError, suggestion
from input_pipeline.eval_batches import EvalBatches
from input_pipeline.transforms import Transform

# Task -> "module:function" of its training transforms, and of its evaluation batches.
_TRANSFORMS = {
  "semantic": "input_pipeline.transforms:semantic_transforms",
  "classification": "input_pipeline.transforms_classification:classification_transforms",
  "universal": "input_pipeline.transforms_universal:universal_transforms",
  "audio_visual": "input_pipeline.transforms_audio_visual:audio_visual_transforms",
}
_EVAL_BATCHES = {
  "semantic": "input_pipeline.eval_batches:semantic_eval_batches",
  "classification": "input_pipeline.eval_batches:classification_eval_batches",
  "universal": "input_pipeline.eval_universal:universal_eval_batches",
  "audio_visual": "input_pipeline.eval_audio_visual:audio_visual_eval_batches",
}


def train_transforms(task: str, **options: Any) -> list[Transform]:
  """The training transforms of a task.

  Args:
    task: `semantic`, `classification`, `universal` or `audio_visual`.
    **options: of that task's function of transforms.

  Raises:
    UserError: for an unknown task.
  """
  return _find(_TRANSFORMS, task)(**options)


def as_task_reads(task: str, dataset: Any) -> Any:
  """An open split with the examples that a task reads: class maps become segments, say."""
  if task == "universal":
    from input_pipeline.datasets.panoptic import as_universal

    return as_universal(dataset)
  return dataset


def eval_batches(
  task: str, dataset: Any, options: Mapping[str, Any], **loading: Any
) -> EvalBatches:
  """This process's part of the evaluation batches of a data set, every example once.

  Args:
    task: as above.
    dataset: an open split.
    options: the settings of the evaluation; each task reads those it knows.
    **loading: `batch_size` (over all processes), `process_index`, `process_count`, `num_threads`
      and `on_error`, see `EvalBatches`.

  Raises:
    UserError: for an unknown task.
  """
  return _find(_EVAL_BATCHES, task)(dataset, options, **loading)


def _find(table: Mapping[str, str], task: str) -> Any:
  if task not in table:
    raise UserError(
      f"task.name is {task!r}; expected one of {', '.join(table)}.{suggestion(task, table)}"
    )
  module, function = table[task].split(":")
  return getattr(importlib.import_module(module), function)
