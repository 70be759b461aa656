"""Evaluation of image classification: top-1 accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from effseg_jax.evaluators import EvaluationResult
from effseg_jax.metrics.segmentation import ConfusionMatrix
from effseg_jax.tasks.classification import ClassificationTask


class ClassificationEvaluator:
  """Top-1 accuracy over all examples."""

  def __init__(
    self, model: nn.Module, task: ClassificationTask, dataset: Any, options: Mapping[str, Any]
  ):
    """Sets the evaluation up; there is nothing to configure beyond the batches."""
    del dataset, options
    self._model, self._task = model, task
    self._matrix = ConfusionMatrix(task.num_classes)

  @staticmethod
  def metric_names(options: Mapping[str, Any], num_classes: int | None) -> tuple[str, ...]:
    """The scalars of the result, see `Evaluator`."""
    del options, num_classes
    return ("top1",)

  def step(self, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, None]:
    """Classifies a batch; returns counts int32 (K, K)."""
    outputs = self._model.apply(variables, *self._task.model_inputs(batch), train=False)
    return self._task.eval_counts(outputs, batch), None

  def update(self, batch: Mapping[str, np.ndarray], totals: Any, examples: Any) -> None:
    """Adds the counts."""
    del batch, examples
    self._matrix.update(totals)

  def result(self) -> EvaluationResult:
    """The counts are those of all processes already."""
    scalars = self._task.summarise(self._matrix.counts)
    return EvaluationResult(scalars, f"top-1 {100 * scalars['top1']:.2f}%", dict(scalars), {})
