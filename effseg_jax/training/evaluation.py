"""One evaluation loop for training and for `eval.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from effseg_jax.metrics.segmentation import ConfusionMatrix, confusion_counts
from effseg_jax.tasks.classification import ClassificationTask
from effseg_jax.tasks.inference import Inference, class_map
from effseg_jax.tasks.semantic import SemanticTask
from effseg_jax.training import sharding
from effseg_jax.training.state import Variables

# variables, batch -> counts int32 (K, K), and the class maps (B, Hb, Wb) or None.
EvalStep = Callable[[Variables, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array | None]]


@dataclasses.dataclass(frozen=True)
class Sample:
  """One evaluated example, to be drawn.

  Attributes:
    image: uint8 (h, w, 3), as the network saw it.
    prediction: class ids (H, W) at the original size.
    label: uint8 (H, W), 255 ignored.
  """

  image: np.ndarray
  prediction: np.ndarray
  label: np.ndarray


def semantic_eval_step(model: nn.Module, task: SemanticTask, inference: Inference) -> EvalStep:
  """Segments a batch at the labels' size and counts; see docs/architecture.md for the batch."""

  def step(variables: Variables, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    (images,) = task.model_inputs(batch)
    forward = lambda x: model.apply(variables, x, train=False)  # noqa: E731
    prediction = class_map(
      forward, images, batch["label_size"], batch["label"].shape[1:3], inference
    )
    counts = confusion_counts(
      prediction, batch["label"], task.num_classes, task.ignore_label, batch["weight"]
    )
    return counts, prediction.astype(jnp.uint8)

  return step


def classification_eval_step(model: nn.Module, task: ClassificationTask) -> EvalStep:
  """Classifies a batch and counts."""

  def step(variables: Variables, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, None]:
    outputs = model.apply(variables, *task.model_inputs(batch), train=False)
    return task.eval_counts(outputs, batch), None

  return step


def evaluate(
  step: EvalStep,
  variables: Variables,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  num_classes: int,
  mesh: Mesh,
  num_samples: int = 0,
) -> tuple[ConfusionMatrix, list[Sample]]:
  """Evaluates a model over a data set, each example once.

  Args:
    step: jitted; its counts are summed over the global batch.
    variables: of the model, on the devices of the mesh.
    batches: this process's part of each global batch, in the same order on every process.
    num_classes: K.
    mesh: from `sharding.make_mesh`.
    num_samples: how many examples to return for pictures, spread over the data set.

  Returns:
    The confusion matrix over all processes, and this process's samples.
  """
  matrix, samples = ConfusionMatrix(num_classes), []
  total = len(batches) if hasattr(batches, "__len__") else 1
  wanted = set(np.linspace(0, total - 1, num_samples).astype(int)) if num_samples else set()
  for index, batch in enumerate(batches):
    counts, prediction = step(variables, sharding.put_batch(batch, mesh))
    matrix.update(np.asarray(counts.addressable_data(0)))
    if index in wanted and prediction is not None:
      samples.append(_sample(batch, np.asarray(prediction.addressable_data(0))))
  return matrix, samples


def _sample(batch: Mapping[str, np.ndarray], prediction: np.ndarray) -> Sample:
  """The first example of a batch, without padding."""
  rows, cols = batch["label_size"][0]
  return Sample(batch["image"][0], prediction[0, :rows, :cols], batch["label"][0, :rows, :cols])


def jit_eval_step(step: EvalStep, mesh: Mesh) -> EvalStep:
  """Compiles an evaluation step: batches cut over the mesh, counts on every device."""
  cut, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  return jax.jit(step, in_shardings=(None, cut), out_shardings=(everywhere, cut))


def wait_for_all(name: str) -> None:
  """Blocks until every process has arrived here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def variables_on(variables: Any, mesh: Mesh) -> Any:
  """Puts host arrays on every device of the mesh."""
  return jax.device_put(jax.tree.map(jnp.asarray, dict(variables)), sharding.replicated(mesh))
