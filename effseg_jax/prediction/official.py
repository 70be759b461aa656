"""The card of official weights: which classes they know, by the name of their data set."""

from __future__ import annotations

import dataclasses
from typing import Any

from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline.datasets import DATASETS, fixed_classes
from effseg_jax.input_pipeline.datasets.files import distinct_palette
from effseg_jax.models import create_model
from effseg_jax.models.avesformer import AVESFormer
from effseg_jax.models.eomt import EoMT
from effseg_jax.models.mask2former import Mask2Former
from effseg_jax.models.segvit import SegViT
from effseg_jax.models.setr import SETR
from effseg_jax.tasks.audio_visual import AudioVisualTask
from effseg_jax.tasks.class_masks import ClassMasksTask
from effseg_jax.tasks.semantic import SemanticTask
from effseg_jax.tasks.universal import UniversalTask

# Classes that have numbers for names.
GENERIC = "generic"

ClassTable = tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], tuple[bool, ...]]


def class_table(dataset: str, num_classes: int | None) -> ClassTable:
  """Names, colours, and whether each class is a thing (of which there are several).

  Args:
    dataset: a segmentation data set's name, or `generic`.
    num_classes: None for the data set's own.

  Raises:
    UserError: for an unknown data set, or another number of classes than it has.
  """
  if dataset == GENERIC:
    if num_classes is None:
      raise UserError("--num_classes is needed where no --dataset says it.")
    names = tuple(f"class {index}" for index in range(num_classes))
    palette = tuple(map(tuple, distinct_palette(num_classes).tolist()))
    return names, palette, (True,) * num_classes  # then a segment is never merged with another
  fixed = fixed_classes(dataset)
  if fixed is None:
    named = [GENERIC, *DATASETS]
    raise UserError(
      f"--dataset={dataset}: no segmentation data set with fixed classes has this name; use"
      f" --dataset={GENERIC}.{suggestion(dataset, named)}"
    )
  classes, palette, things = fixed
  if num_classes not in (None, len(classes)):
    raise UserError(f"--num_classes={num_classes}, but {dataset} has {len(classes)}.")
  return classes, tuple(map(tuple, palette.tolist())), tuple(map(bool, things))


def card_of(
  model_name: str, fields: dict[str, Any], table: ClassTable, dataset: str, file_name: str
) -> dict[str, Any]:
  """The card of a bundle of official weights.

  Args:
    model_name: one of `effseg_jax.list_models()`.
    fields: of the model.
    table: see `class_table`.
    dataset: that the model was trained on, or `generic`.
    file_name: of the official file.
  """
  classes, palette, is_thing = table
  model = create_model(model_name, **fields)
  task: SemanticTask | ClassMasksTask | UniversalTask | AudioVisualTask
  inference: dict[str, Any] = {}
  if isinstance(model, Mask2Former):
    name, task = "universal", UniversalTask(classes, palette, is_thing)
  elif isinstance(model, EoMT):
    name, task = "universal", UniversalTask(classes, palette, is_thing, black_padding=True)
    inference = _eomt_inference(model, dataset)
  elif isinstance(model, SegViT):
    name, task = "class_masks", ClassMasksTask(classes, palette, **_segvit_colours(model_name))
    inference = _slide(model)
  elif isinstance(model, SETR):
    name, task = "semantic", SemanticTask(classes, palette)
    inference = _slide(model)
  elif isinstance(model, AVESFormer):
    name, task = "audio_visual", AudioVisualTask(classes, palette)
  else:
    name, task = "semantic", SemanticTask(classes, palette)
  return {
    "model": {"name": model_name, "fields": fields},
    "task": {"name": name, **dataclasses.asdict(task)},
    "trained_on": "unknown" if dataset == GENERIC else dataset,
    **({"inference": inference} if inference else {}),
    "converted_from": file_name,
  }


def _eomt_inference(model: EoMT, dataset: str) -> dict[str, Any]:
  """EoMT sees pictures of one size: in windows where classes are pixels', else fitted into it."""
  rows, cols = model.vit().grid
  side = model.patch_size * rows
  if dataset in ("ade20k", "cityscapes", "coco_stuff_10k", "coco_stuff_164k") and rows == cols:
    return {"window_side": side, "panoptic": False, "instance": False, "semantic": True}
  return {"fit": (side, model.patch_size * cols)}


def _segvit_colours(model_name: str) -> dict[str, Any]:
  """L was pretrained, and trained, with other statistics than ImageNet's."""
  if model_name == "segvit_b16":
    return {}
  return {"mean": (127.5,) * 3, "std": (127.5,) * 3}


def _slide(model: SETR | SegViT) -> dict[str, Any]:
  """Windows of the size that the model was trained with, at the recipes' strides."""
  rows, cols = (model.patch_size * n for n in model.vit().grid)
  strides = {480: 320, 512: 341, 640: 608, 768: 512}
  return {
    "scale": (2049, 1025) if rows == 768 else (2048, min(rows, cols)),
    "mode": "slide",
    "crop": (rows, cols),
    "stride": tuple(strides.get(side, side * 2 // 3) for side in (rows, cols)),
  }
