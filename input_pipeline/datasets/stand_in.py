"""A data set's classes without its files, for uses that need only shapes.

Compiling ahead of time needs the number of classes and one example to put through the transforms;
its content does not matter. So the example is one of the embedded data set of the same task.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline import datasets
from effseg_jax.input_pipeline.datasets import base, files, synthetic_av

# The embedded data set that has a task's examples, and its options.
_SCENES = ("synthetic", {"size": (256, 256)})
_EMBEDDED = {
  "semantic": _SCENES,
  "semantic_ssa": _SCENES,
  "class_masks": _SCENES,
  "universal": ("synthetic_instances", {"size": (256, 256)}),
  "audio_visual": ("synthetic_av", {}),
}
# Data sets that list their classes in a file, and how many there are; of a folder of one's own
# nobody knows.
_NUM_CLASSES = {"imagenet": 1000, "folder": 20, "tfds": 3, "avss": 71, "s4": 1, "ms3": 1}
# Frames of a clip.
_NUM_FRAMES = {"s4": 5, "ms3": 5, "avss": 10}


@dataclasses.dataclass(frozen=True, eq=False)
class StandIn:
  """One example, and the classes of another data set.

  Attributes:
    name: of that data set.
    classes: name per class id.
    palette: uint8 (K, 3).
    thing_mask: bool (K,), for universal segmentation.
    example: with the keys of that data set's examples.
  """

  name: str
  classes: tuple[str, ...]
  palette: np.ndarray
  thing_mask: np.ndarray
  example: Mapping[str, Any]

  ignore_label = base.IGNORE_LABEL

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.classes)

  def __len__(self) -> int:
    return 1

  def __getitem__(self, index: int) -> base.Example:
    del index
    return dict(self.example)


def stand_in(name: str, task: str, options: Mapping[str, Any]) -> StandIn:
  """Replaces a data set that may not be available.

  Args:
    name: one of `DATASETS`.
    task: `task.name` of the experiment.
    options: `data.options` of the experiment; the size of embedded pictures is read.

  Raises:
    UserError: for an unknown data set.
  """
  if name not in datasets.DATASETS:
    raise UserError(
      f"data.name is {name!r}; expected one of {', '.join(datasets.DATASETS)}."
      f"{suggestion(name, datasets.DATASETS)}"
    )
  classes, palette, things = _classes(name, options)
  return StandIn(name, classes, palette, things, _example(name, task, options))


def _classes(
  name: str, options: Mapping[str, Any]
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
  """Names, colours, and which are things."""
  module = importlib.import_module(datasets.DATASETS[name].partition(":")[0])
  if name == "synthetic_av":
    clips = synthetic_av.open_split(None, "train", **options)
    return tuple(clips.classes), clips.palette, np.zeros(clips.num_classes, bool)
  if hasattr(module, "CLASS_TABLE"):
    table = module.CLASS_TABLE
    return tuple(table.names), table.palette, table.things
  if hasattr(module, "CLASSES"):
    return tuple(module.CLASSES), module.PALETTE, np.zeros(len(module.CLASSES), bool)
  count = _NUM_CLASSES[name]
  names = tuple(f"class {index}" for index in range(count))
  return names, files.distinct_palette(count), np.zeros(count, bool)


def _example(name: str, task: str, options: Mapping[str, Any]) -> base.Example:
  if task == "classification":
    return {
      "image": np.zeros((256, 256, 3), np.uint8),
      "label": np.int32(0),
      "valid_size": np.array((256, 256), np.int32),
      "name": name,
    }
  embedded, settings = _EMBEDDED[task]
  if name == embedded:
    settings = options
  elif name in _NUM_FRAMES:
    settings = {"num_frames": _NUM_FRAMES[name]}
  return datasets.open_dataset(embedded, split="train", **settings)[0]
