"""The one registry of tasks: where each part of a task is, by the task's name.

A task is a name in `config.task.name` and the modules of one row below. A part is imported when it
is first used, so that the input pipeline, which must not import jax, can use the table as well.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from effseg_jax.errors import UserError, suggestion


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a task consists of, each as `module:name`.

  Attributes:
    task: class with `model_inputs`, `loss` and `summarise`, see `effseg_jax.tasks.Task`.
    transforms: function that returns the training transforms.
    eval_batches: function that returns the evaluation batches.
    evaluator: class, see `effseg_jax.evaluators.Evaluator`.
    predictor: function (bundle, origin, **options) that returns what `effseg_jax.load` gives; None
      where there is nothing to predict.
  """

  task: str
  transforms: str
  eval_batches: str
  evaluator: str
  predictor: str | None = None


TASKS = {
  "semantic": Parts(
    task="effseg_jax.tasks.semantic:SemanticTask",
    transforms="effseg_jax.input_pipeline.transforms_semantic:semantic_transforms",
    eval_batches="effseg_jax.input_pipeline.eval_semantic:semantic_eval_batches",
    evaluator="effseg_jax.evaluators.semantic:SemanticEvaluator",
    predictor="effseg_jax.prediction.semantic:segmenter",
  ),
  "class_masks": Parts(
    task="effseg_jax.tasks.class_masks:ClassMasksTask",
    transforms="effseg_jax.input_pipeline.transforms_semantic:semantic_transforms",
    eval_batches="effseg_jax.input_pipeline.eval_semantic:semantic_eval_batches",
    evaluator="effseg_jax.evaluators.semantic:SemanticEvaluator",
    predictor="effseg_jax.prediction.semantic:segmenter",
  ),
  "classification": Parts(
    task="effseg_jax.tasks.classification:ClassificationTask",
    transforms="effseg_jax.input_pipeline.transforms_classification:classification_transforms",
    eval_batches="effseg_jax.input_pipeline.eval_classification:classification_eval_batches",
    evaluator="effseg_jax.evaluators.classification:ClassificationEvaluator",
  ),
  "universal": Parts(
    task="effseg_jax.tasks.universal:UniversalTask",
    transforms="effseg_jax.input_pipeline.transforms_universal:universal_transforms",
    eval_batches="effseg_jax.input_pipeline.eval_universal:universal_eval_batches",
    evaluator="effseg_jax.evaluators.universal:UniversalEvaluator",
    predictor="effseg_jax.prediction.universal:segmenter",
  ),
  "audio_visual": Parts(
    task="effseg_jax.tasks.audio_visual:AudioVisualTask",
    transforms="effseg_jax.input_pipeline.transforms_audio_visual:audio_visual_transforms",
    eval_batches="effseg_jax.input_pipeline.eval_audio_visual:audio_visual_eval_batches",
    evaluator="effseg_jax.evaluators.audio_visual:AudioVisualEvaluator",
    predictor="effseg_jax.prediction.audio_visual:ClipSegmenter",
  ),
}

# Everything but the loss is semantic segmentation's.
TASKS["semantic_ssa"] = dataclasses.replace(
  TASKS["semantic"], task="effseg_jax.tasks.ssa_seg:SSASegTask"
)


def find(task: str, part: str) -> Any:
  """Imports a part of a task.

  Args:
    task: name of the task.
    part: field of `Parts`.

  Returns:
    The class or function; None where the task has no such part.

  Raises:
    UserError: for an unknown task.
  """
  if task not in TASKS:
    raise UserError(
      f"task.name is {task!r}; expected one of {', '.join(TASKS)}.{suggestion(task, TASKS)}"
    )
  place = getattr(TASKS[task], part)
  if place is None:
    return None
  module, name = place.split(":")
  return getattr(importlib.import_module(module), name)
