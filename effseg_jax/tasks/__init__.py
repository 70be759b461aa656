"""What a task means: the model's inputs, the loss, and what is counted."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from effseg_jax.errors import UserError, suggestion

if TYPE_CHECKING:
  import jax

# Name -> "module:class".
_TASKS = {
  "semantic": "effseg_jax.tasks.semantic:SemanticTask",
  "classification": "effseg_jax.tasks.classification:ClassificationTask",
  "universal": "effseg_jax.tasks.universal:UniversalTask",
  "audio_visual": "effseg_jax.tasks.audio_visual:AudioVisualTask",
}


class Task(Protocol):
  """What the training step asks of a task. A task is a frozen dataclass of plain values.

  `counts` of the loss are integers that add up over steps, devices and hosts; `summarise` turns
  their sum into the numbers of a log line. A task without such counts returns None.
  """

  num_classes: int

  def augment(self, batch: Mapping[str, jax.Array], rng: jax.Array) -> Mapping[str, jax.Array]:
    """Random changes of a training batch that are made on the device."""

  def model_inputs(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """The arguments of `model.apply`."""

  def loss(
    self, outputs: Any, batch: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """The scalar to minimise, other scalars to log, and counts."""

  def summarise(self, counts: Any) -> dict[str, float]:
    """Numbers for the log from summed counts (host arrays)."""


def make_task(config: Mapping[str, Any], dataset: Any) -> Task:
  """Builds the task of a configuration for a data set.

  Args:
    config: `name` (`semantic`, `classification`, `universal` or `audio_visual`) and the fields of
      that task's class.
    dataset: gives `classes`, and for segmentation `palette`.

  Raises:
    UserError: for an unknown task.
  """
  options = dict(config)
  name = options.pop("name")
  if name not in _TASKS:
    raise UserError(
      f"task.name is {name!r}; expected one of {', '.join(_TASKS)}.{suggestion(name, _TASKS)}"
    )
  module, kind = _TASKS[name].split(":")
  return getattr(importlib.import_module(module), kind).for_dataset(dataset, **options)
