"""Evaluation of semantic segmentation: a confusion matrix at the labels' own size."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.evaluators import EvaluationResult, spread
from effseg_jax.inference.semantic import Inference, class_map, forward_pass
from effseg_jax.metrics.segmentation import ConfusionMatrix, confusion_counts
from effseg_jax.pictures import semantic as pictures
from effseg_jax.tasks.class_masks import ClassMasksTask
from effseg_jax.tasks.semantic import SemanticTask

# A matrix of more classes is neither quick to draw nor possible to read.
_MAX_DRAWN_CLASSES = 256


class SemanticEvaluator:
  """mIoU, accuracies and a table per class."""

  def __init__(
    self,
    model: nn.Module,
    task: SemanticTask | ClassMasksTask,
    dataset: Any,
    options: Mapping[str, Any],
  ):
    """Sets the evaluation up.

    Args:
      model: image -> logits.
      task: gives the model's inputs, classes and colours.
      dataset: the open split; its length determines which examples are drawn.
      options: `mode`, `crop`, `stride`, `scales` and `flip` (see `Inference`), and `pictures`, the
        number of examples to draw.

    Raises:
      UserError: for an unknown mode.
    """
    self._model, self._task, self._dataset = model, task, dataset
    self._inference = inference_options(options, averages_scores=task.averages_scores)
    self._drawn = spread(options.get("pictures", 0), len(dataset))
    self._matrix = ConfusionMatrix(task.num_classes)
    self._samples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    self._predictions: dict[int, tuple[tuple[int, ...], bytes]] = {}

  @staticmethod
  def metric_names(options: Mapping[str, Any], num_classes: int | None) -> tuple[str, ...]:
    """The scalars of the result, see `Evaluator`."""
    del options, num_classes
    return "mIoU", "mean_accuracy", "pixel_accuracy"

  def step(self, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Segments a batch at the labels' size.

    Returns:
      Confusion counts int32 (K, K) and class maps uint8 (B, Hb, Wb).
    """
    (images,) = self._task.model_inputs(batch)
    forward = forward_pass(self._model, self._task, variables)
    prediction = class_map(
      forward, images, batch["label_size"], batch["label"].shape[1:3], self._inference
    )
    counts = confusion_counts(
      prediction, batch["label"], self._task.num_classes, self._task.ignore_label, batch["weight"]
    )
    return counts, prediction.astype(jnp.uint8)

  def update(self, batch: Mapping[str, np.ndarray], totals: Any, examples: Any) -> None:
    """Adds the counts; keeps predictions to draw, and compressed ones to write."""
    self._matrix.update(totals)
    for row in np.flatnonzero(batch["weight"] > 0):
      rows, cols = batch["label_size"][row]
      found = np.ascontiguousarray(examples[row, :rows, :cols])
      packed = zlib.compress(found.tobytes(), 1)
      self._predictions[int(batch["index"][row])] = (found.shape, packed)
    for row in np.flatnonzero(np.isin(batch["index"], list(self._drawn))):
      rows, cols = batch["label_size"][row]
      window = np.s_[row, :rows, :cols]
      self._samples.append((batch["image"][row], examples[window], batch["label"][window]))

  def result(self) -> EvaluationResult:
    """The counts are those of all processes already; the pictures are this process's."""
    classes, palette = self._task.classes, self._task.palette
    drawn = {}
    if self._samples:
      drawn["samples"] = pictures.side_by_side(self._samples, palette)
    if len(classes) <= _MAX_DRAWN_CLASSES:
      drawn["confusion"] = pictures.confusion_picture(self._matrix.counts, classes)
    matrix = self._matrix
    return EvaluationResult(
      matrix.summary(),
      matrix.table(classes),
      matrix.to_json(classes),
      drawn,
      self._write_predictions,
    )

  def _write_predictions(self, folder: Path) -> None:
    """Writes class ids as 8-bit PNGs with a palette, `NAME_classes.png` as prediction does."""
    palette = np.asarray(self._task.palette, np.uint8)[:256].tobytes()
    for index, name in _names(self._dataset, self._predictions).items():
      shape, packed = self._predictions[index]
      picture = Image.fromarray(np.frombuffer(zlib.decompress(packed), np.uint8).reshape(shape))
      picture.putpalette(palette)
      path = folder / f"{name}_classes.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      picture.save(path)


def _names(dataset: Any, indices: Iterable[int]) -> dict[int, str]:
  """A name for each example's files: its place below the data set's folder, or its own name."""
  if hasattr(dataset, "prediction_name"):
    return {index: dataset.prediction_name(index) for index in indices}
  names = {index: str(dataset[index].get("name", index)) for index in indices}
  counts: dict[str, int] = {}
  for name in names.values():
    counts[name] = counts.get(name, 0) + 1
  return {i: name if counts[name] == 1 else f"{name}_{i:06d}" for i, name in names.items()}


def inference_options(options: Mapping[str, Any], *, averages_scores: bool = False) -> Inference:
  """The configured way of evaluating an image.

  Args:
    options: `mode`, `crop`, `stride`, `scales` and `flip`.
    averages_scores: of the task, see `Inference.scores`.

  Raises:
    UserError: for an unknown mode.
  """
  if options["mode"] not in ("whole", "slide"):
    raise UserError(f"eval.mode is {options['mode']!r}; expected 'whole' or 'slide'.")
  return Inference(
    mode=options["mode"],
    crop=tuple(options["crop"]),
    stride=tuple(options["stride"]),
    scales=tuple(options["scales"]),
    flip=options["flip"],
    interpolation=options.get("interpolation", "bilinear"),
    scores=averages_scores,
  )
