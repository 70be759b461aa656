"""Evaluation of universal segmentation: PQ, AP and mIoU from one set of masks."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.evaluators import EvaluationResult, spread, sum_over_processes
from effseg_jax.inference.mask_readout import MaskInference, Segmentations
from effseg_jax.inference.segments import instance_result, panoptic_result, segment_on_host
from effseg_jax.metrics.average_precision import MEASURES as INSTANCE_MEASURES
from effseg_jax.metrics.average_precision import AveragePrecision
from effseg_jax.metrics.coco_results import panoptic_prediction, write_detections, write_panoptic
from effseg_jax.metrics.panoptic import MEASURES as PANOPTIC_MEASURES
from effseg_jax.metrics.panoptic import PanopticQuality
from effseg_jax.metrics.segmentation import ConfusionMatrix
from effseg_jax.pictures import universal as pictures_universal
from effseg_jax.tasks.universal import UniversalTask


class UniversalEvaluator:
  """Panoptic quality, average precision and mIoU, those of them that the settings ask for.

  Masks are read in each picture's original size on the device; truth and counts are the host's.
  """

  def __init__(
    self, model: nn.Module, task: UniversalTask, dataset: Any, options: Mapping[str, Any]
  ):
    """Sets the evaluation up.

    Args:
      model: image -> class and mask logits of queries.
      task: gives the model's inputs, classes and things.
      dataset: the open split; gives the ground truth and the ids of the official formats.
      options: of `mask_inference_options`, and `pictures`, the number of examples to draw.

    Raises:
      UserError: if no result is requested.
    """
    self._model, self._task, self._dataset = model, task, dataset
    self._inference = mask_inference_options(options, task)
    self._drawn = spread(options.get("pictures", 0), len(dataset))
    self._rows: list[list[np.ndarray]] = []
    self._quality = PanopticQuality(task.is_thing)
    official = dataset.instances_json
    self._own_truth = official is None
    self._precision = AveragePrecision(dataset.class_ids, task.is_thing, official)
    self._matrix = ConfusionMatrix(task.num_classes)
    self._maps = {"panoptic": _CompressedMaps(), "semantic": _CompressedMaps()}

  @staticmethod
  def metric_names(options: Mapping[str, Any], num_classes: int | None) -> tuple[str, ...]:
    """The scalars of the result, see `Evaluator`."""
    del num_classes
    names = {"panoptic": PANOPTIC_MEASURES, "instance": INSTANCE_MEASURES, "semantic": ("mIoU",)}
    return tuple(name for kind, own in names.items() if options[kind] for name in own)

  def step(self, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[None, dict[str, Any]]:
    """Class and mask logits of a batch; they become masks in the size of each picture later.

    Pictures of one network size come in many original sizes, and shapes must be known here.
    """
    outputs = self._model.apply(variables, *self._task.model_inputs(batch), train=False)
    found = {name: outputs[name] for name in ("class_logits", "mask_logits")}
    if "starts" in batch:
      grid = batch["starts"].shape[:3]
      found = {name: x.reshape(*grid, *x.shape[1:]) for name, x in found.items()}
      found["starts"] = batch["starts"]
    return None, found

  def update(self, batch: Mapping[str, np.ndarray], totals: Any, examples: Any) -> None:
    """Reads the masks and compares them with the ground truth."""
    del totals
    rows = np.flatnonzero(batch["weight"] > 0)
    if not len(rows):
      return
    # All rows, so that the batch's shape stays the same; fillers are as large as the largest.
    sizes = np.where(
      batch["weight"][:, None] > 0, batch["label_size"], batch["label_size"][rows].max(axis=0)
    )
    found = segment_on_host(examples, sizes, batch["valid_size"], self._inference)
    for row in rows:
      index, size = int(batch["index"][row]), tuple(map(int, sizes[row]))
      truth = self._dataset.ground_truth(index)
      self._check_layers(truth)
      self._count(found, row, size, truth)
      if index in self._drawn:
        self._draw(_picture(batch, row), found, row, size, truth)

  def result(self) -> EvaluationResult:
    """Merges over processes; the pictures are this process's."""
    self._quality.counts = sum_over_processes(self._quality.counts)
    self._matrix.counts = sum_over_processes(self._matrix.counts)
    self._precision = self._merged_precision()
    scalars, lines, report = {}, [], {}
    task, inference = self._task, self._inference
    if inference.panoptic:
      scalars.update(self._quality.summary())
      lines += self._quality_lines()
      report["panoptic"] = self._quality.to_json(task.classes)
    if inference.instance:
      numbers, per_class = self._precision.result()
      scalars.update(AP=0.0)  # where no object occurs
      scalars.update(numbers)
      lines.append("  ".join(f"{name} {100 * value:.2f}" for name, value in numbers.items()))
      present = np.flatnonzero(~np.isnan(per_class))
      classes = {task.classes[index]: float(per_class[index]) for index in present}
      report["instance"] = {**numbers, "classes": classes}
    if inference.semantic:
      scalars["mIoU"] = self._matrix.miou()
      alone = not (inference.panoptic or inference.instance)
      means = f"mIoU {100 * scalars['mIoU']:.2f}"
      lines.append(self._matrix.table(task.classes) if alone else means)
      report["semantic"] = self._matrix.to_json(task.classes)
    drawn = {"samples": pictures_universal.stack_rows(self._rows)} if self._rows else {}
    table = "\n".join(lines)
    return EvaluationResult(scalars, table, {**scalars, **report}, drawn, self._write_predictions)

  def _quality_lines(self) -> list[str]:
    """The table of panoptic quality, without the classes that never occur."""
    title, *lines = self._quality.table(self._task.classes).splitlines()
    occurs = self._quality.counts.any(axis=1)
    num_classes = self._task.num_classes
    shown = [lines[index] for index in np.flatnonzero(occurs)]
    return [title, *shown, *lines[num_classes:]]

  def _count(self, found: Segmentations, row: int, size: Sequence[int], truth: Any) -> None:
    """Counts an image, and keeps predictions that may be written."""
    if self._inference.panoptic:
      prediction = panoptic_result(found, row, size, self._task.is_thing)
      segment_map = prediction["segmentation"] - 1
      labels = [segment["label_id"] for segment in prediction["segments_info"]]
      (truth_map,) = truth.segments
      self._quality.update(
        segment_map, labels, truth_map, truth.labels, crowd=truth.crowd, areas=truth.areas
      )
      ids = self._dataset.class_ids[np.asarray(labels, int)].tolist()
      self._maps["panoptic"].add(segment_map.astype(np.int16), (truth.image_id, truth.name, ids))
    if self._inference.instance:
      instances = instance_result(found, row, size)
      if self._own_truth:
        self._precision.add_truth(truth.image_id, truth.each_mask(), truth.labels, truth.crowd)
      self._precision.update(
        truth.image_id, instances["masks"], instances["labels"], instances["scores"]
      )
    if self._inference.semantic:
      class_map = found.semantic[row, : size[0], : size[1]]
      self._matrix.update(_confusion(class_map, truth.semantic_map(), self._task.num_classes))
      self._maps["semantic"].add(class_map, truth.name)

  def _check_layers(self, truth: Any) -> None:
    """Raises `UserError` where segments overlap and a requested result does not allow it."""
    if (self._inference.panoptic or self._inference.semantic) and truth.overlaps():
      raise UserError(
        f"{self._dataset.name}: segments of {truth.name} overlap, so it has instances and no"
        " panoptic or semantic truth. Set eval.panoptic=False and eval.semantic=False."
      )

  def _draw(self, image, found: Segmentations, row: int, size: Sequence[int], truth: Any) -> None:
    """Keeps the panels image | prediction | ground truth."""
    task = self._task
    if self._inference.panoptic:
      result = panoptic_result(found, row, size, task.is_thing)
      segment_map = result["segmentation"] - 1
      labels = [segment["label_id"] for segment in result["segments_info"]]
    elif self._inference.instance:
      result = instance_result(found, row, size)
      chosen = result["scores"] >= self._inference.score_threshold
      segment_map = pictures_universal.stack_masks(result["masks"][chosen])
      labels = result["labels"][chosen]
    else:
      segment_map = found.semantic[row, : size[0], : size[1]].astype(np.int16)
      labels = np.arange(task.num_classes)
    paint = lambda m, kinds: pictures_universal.paint_segments(  # noqa: E731
      image, m, pictures_universal.segment_colours(kinds, task.is_thing, task.palette)
    )
    truth_map = truth.flat_map()
    self._rows.append([image, paint(segment_map, labels), paint(truth_map, truth.labels)])

  def _merged_precision(self) -> AveragePrecision:
    """The entries of all processes."""
    own = self._precision
    everything = AveragePrecision(
      self._dataset.class_ids, self._task.is_thing, self._dataset.instances_json
    )
    for collected in _gather_bytes(own.to_bytes()):
      everything.merge_bytes(collected)
    return everything

  def _write_predictions(self, folder: Path) -> None:
    """Writes files in the formats of the official servers.

    `panoptic.json` and its PNGs in `panoptic/`, `instances.json` (COCO's results), `semantic/` (the
    class id of each pixel). Every process writes its own pictures, the first one the lists.
    """
    first = jax.process_index() == 0
    if self._inference.panoptic:
      predictions = [
        panoptic_prediction(image_id, name, segment_map, ids)
        for segment_map, (image_id, name, ids) in self._maps["panoptic"]
      ]
      write_panoptic(folder / "panoptic.json", predictions)
      annotations = [prediction.annotation for prediction in predictions]
      parts = _gather_bytes(json.dumps(annotations).encode())
      if first and len(parts) > 1:
        merged = [annotation for part in parts for annotation in json.loads(part)]
        (folder / "panoptic.json").write_text(json.dumps({"annotations": merged}))
    if self._inference.instance and first:
      write_detections(folder / "instances.json", self._precision.entries)
    if self._inference.semantic:
      (folder / "semantic").mkdir(parents=True, exist_ok=True)
      for class_map, name in self._maps["semantic"]:
        Image.fromarray(class_map).save(folder / "semantic" / f"{name}.png")


def mask_inference_options(options: Mapping[str, Any], task: UniversalTask) -> MaskInference:
  """The configured way of reading masks.

  Args:
    options: `panoptic`, `instance` and `semantic` (which results are made), `score_threshold` and
      `overlap_threshold` of panoptic segments, and `detections`, instances per image.
    task: defines which classes are things.

  Raises:
    UserError: if no result is requested.
  """
  kinds = ("panoptic", "instance", "semantic")
  if not any(options[kind] for kind in kinds):
    raise UserError("eval.panoptic, eval.instance and eval.semantic are all False; set one.")
  return MaskInference(
    task.is_thing,
    **{kind: bool(options[kind]) for kind in kinds},
    score_threshold=float(options["score_threshold"]),
    overlap_threshold=float(options["overlap_threshold"]),
    detections=int(options["detections"]),
  )


def _picture(batch: Mapping[str, np.ndarray], row: int) -> np.ndarray:
  """What the network saw of an image: without padding, windows put together."""
  rows, cols = batch["valid_size"][row]
  image = batch["image"][row]
  if "starts" not in batch:
    return image[:rows, :cols]
  picture = np.zeros((rows, cols, 3), np.uint8)
  for window, (top, left) in zip(
    image.reshape(-1, *image.shape[-3:]), batch["starts"][row].reshape(-1, 2), strict=True
  ):
    picture[top : top + len(window), left : left + window.shape[1]] = window
  return picture


class _CompressedMaps:
  """Maps of a whole data set, compressed: a few kilobytes each."""

  def __init__(self) -> None:
    self._entries: list[tuple[bytes, tuple[int, ...], np.dtype, Any]] = []

  def add(self, array: np.ndarray, about: Any) -> None:
    packed = zlib.compress(np.ascontiguousarray(array).tobytes(), 1)
    self._entries.append((packed, array.shape, array.dtype, about))

  def __iter__(self) -> Iterator[tuple[np.ndarray, Any]]:
    for packed, shape, dtype, about in self._entries:
      yield np.frombuffer(zlib.decompress(packed), dtype).reshape(shape), about


def _confusion(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts of (label, prediction), int64 (K, K); labels beyond the classes are void."""
  known = label < num_classes
  cells = label[known].astype(np.int64) * num_classes + prediction[known]
  return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _gather_bytes(own: bytes) -> list[bytes]:
  """The bytes of every process, of any length."""
  if jax.process_count() == 1:
    return [own]
  lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(own)))).ravel()
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(own)] = np.frombuffer(own, np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
