"""A checkpoint's card, read into dataclasses: what is missing or of a wrong type is one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from effseg_jax import task_table
from effseg_jax.errors import UserError, suggestion
from effseg_jax.inference.semantic import Inference
from effseg_jax.json_fields import read_fields

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SemanticSettings:
  """How a semantic model was evaluated; the names are those of `config.eval`.

  Attributes:
    scale: (long, short) side that pictures are fitted into; (0, 0): as they are.
    multiple: both sides are then stretched up to a multiple of this.
    mode: "whole" or "slide".
    crop: rows and columns of a window.
    stride: rows and columns between windows.
    scales: factors of the network's input size, averaged over.
    flip: whether the mirrored picture is averaged in.
  """

  scale: tuple[int, int] = (0, 0)
  multiple: int = 1
  mode: str = "whole"
  crop: tuple[int, int] = (512, 512)
  stride: tuple[int, int] = (341, 341)
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False

  def problem(self) -> str | None:
    """What is wrong with the values, if anything."""
    if self.multiple < 1:
      return f"multiple is {self.multiple}; expected 1 or more"
    if min(self.scale) < 0:
      return f"scale is {self.scale}; expected (long, short) in pixels"
    if self.mode not in ("whole", "slide"):
      return f"mode is {self.mode!r}; expected 'whole' or 'slide'"
    if min(*self.crop, *self.stride) < 1:
      return f"crop and stride are {self.crop} and {self.stride}; expected 1 or more"
    if not self.scales or min(self.scales) <= 0:
      return f"scales is {self.scales}; expected factors above 0"
    return None

  @property
  def inference(self) -> Inference:
    """What is done with the network's logits."""
    return Inference(self.mode, self.crop, self.stride, self.scales, self.flip)


@dataclasses.dataclass(frozen=True)
class UniversalSettings:
  """How a universal model was evaluated; without a card, as COCO's models are.

  Attributes:
    short_side: length of the short side that the network sees; 0: the picture as it is.
    max_size: limit of the long side.
    multiple: the array is padded to multiples of this.
    fit: rows and columns of a frame that pictures are fitted into and padded to; (0, 0): none, and
      the three fields above say how large pictures are.
    window_side: of square windows that cover pictures whose short side is as long; 0: none.
    panoptic: whether segments are made.
    instance: whether instances are made.
    semantic: whether class maps are made.
    score_threshold: class probability above which a query becomes a segment.
    overlap_threshold: share of its mask that other queries must leave to it.
    detections: instances per picture, at most.
  """

  short_side: int = 800
  max_size: int = 1333
  multiple: int = 32
  fit: tuple[int, int] = (0, 0)
  window_side: int = 0
  panoptic: bool = True
  instance: bool = True
  semantic: bool = True
  score_threshold: float = 0.8
  overlap_threshold: float = 0.8
  detections: int = 100

  def problem(self) -> str | None:
    """What is wrong with the values, if anything."""
    if self.multiple < 1 or self.short_side < 0 or (self.short_side and self.max_size < 1):
      return (
        f"short_side, max_size and multiple are {self.short_side}, {self.max_size} and"
        f" {self.multiple}; expected lengths in pixels"
      )
    if not (self.panoptic or self.instance or self.semantic):
      return "panoptic, instance and semantic are all false; expected at least one"
    if min(self.fit) < 0 or self.window_side < 0 or (any(self.fit) and self.window_side):
      return (
        f"fit and window_side are {self.fit} and {self.window_side}; expected lengths in pixels,"
        " and one of the two to be 0"
      )
    if self.window_side and (self.panoptic or self.instance):
      return f"window_side is {self.window_side}, where panoptic or instance is true"
    if self.detections < 1:
      return f"detections is {self.detections}; expected 1 or more"
    return None


@dataclasses.dataclass(frozen=True)
class AudioVisualSettings:
  """How an audio-visual model was evaluated.

  Attributes:
    size: rows and columns that the network sees; None: not known.
    num_frames: seconds of the clips that it was trained on, see `prediction.hearing`; 0: unknown.
  """

  size: tuple[int, int] | None = None
  num_frames: int = 0

  def problem(self) -> str | None:
    """What is wrong with the values, if anything."""
    if self.size is not None and min(self.size) < 1:
      return f"size is {self.size}; expected rows and columns in pixels"
    return None


def task_name(card: Mapping[str, Any], origin: str) -> str:
  """The name of the task that a model was trained for.

  Args:
    card: of a bundle.
    origin: how the checkpoint is called in messages.

  Raises:
    UserError: if the card names no task, or an unknown one.
  """
  task = card.get("task")
  name = task.get("name") if isinstance(task, Mapping) else None
  if not isinstance(name, str):
    raise UserError(
      f"{origin}: the card has no task with a name; expected one of"
      f" {', '.join(task_table.TASKS)}. Write the bundle with effseg export_bundle or convert."
    )
  if name not in task_table.TASKS:
    raise UserError(
      f"{origin}: the card's task is {name!r}; expected one of {', '.join(task_table.TASKS)}."
      f"{suggestion(name, task_table.TASKS)}"
    )
  return name


def read_task(card: Mapping[str, Any], origin: str) -> Any:
  """The task that a card describes, an object of the task's own class.

  Raises:
    UserError: for a missing field, a wrong type, or colours that are not as many as the classes.
  """
  kind = task_table.find(task_name(card, origin), "task")
  task = read_fields(kind, card["task"], f"{origin}: the card's task")
  if not task.classes:
    raise UserError(f"{origin}: the card's task.classes is empty; expected the names of classes.")
  palette = getattr(task, "palette", None)
  if palette is not None and len(palette) < len(task.classes):
    raise UserError(
      f"{origin}: the card's task.palette has {len(palette)} colours for {len(task.classes)}"
      " classes; expected one for each."
    )
  things = getattr(task, "is_thing", None)
  if things is not None and len(things) != len(task.classes):
    raise UserError(
      f"{origin}: the card's task.is_thing has {len(things)} entries for {len(task.classes)}"
      " classes; expected one for each."
    )
  return task


def read_settings(kind: type[T], card: Mapping[str, Any], origin: str) -> T:
  """How a model was evaluated; a card without `inference` has the defaults.

  Raises:
    UserError: for a wrong type or value.
  """
  found = card.get("inference")
  settings = read_fields(kind, {} if found is None else found, f"{origin}: the card's inference")
  if (problem := settings.problem()) is not None:
    raise UserError(f"{origin}: the card's inference.{problem}.")
  return settings
