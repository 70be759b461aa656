"""The definition of a task: the model's inputs, the loss, and the counts of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from effseg_jax import task_table

if TYPE_CHECKING:
  import jax


# Scalars of a loss that are sums over the batch. All others are means: where a batch is computed in
# parts, they are averaged.
BATCH_SUMS = ("dropped_segments",)


class Task(Protocol):
  """The parts of a task that the training step needs. A task is a frozen dataclass of plain values.

  `counts` of the loss are integers that add up over steps, devices and hosts; `summarise` turns
  their sum into the numbers of a log line. A task without such counts returns None.

  A task whose model works otherwise as training goes on has `model_options(step)`, too: keyword
  arguments of `model.apply` for the number of a step (int32 ()), which is part of the state.
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

  # A task whose loss is not the plain mean over examples also has
  #   def loss_weight(self, batch) -> jax.Array
  # a scalar: what the loss of this batch is divided by. Where a batch is computed in parts, their
  # losses are averaged with these weights, so that the result is that of the whole batch.

  def summarise(self, counts: Any) -> dict[str, float]:
    """Numbers for the log from summed counts (host arrays)."""


def make_task(config: Mapping[str, Any], dataset: Any) -> Task:
  """Builds the task of a configuration for a data set.

  Args:
    config: `name`, one of `task_table.TASKS`, and the fields of that task's class.
    dataset: gives `classes`, and for segmentation `palette`.

  Raises:
    UserError: for an unknown task.
  """
  options = dict(config)
  name = options.pop("name")
  return task_table.find(name, "task").for_dataset(dataset, **options)
