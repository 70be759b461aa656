"""Evaluation batches of universal segmentation: resized by the short side, padded to few sizes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.eval_batches import Batch, EvalBatches, image_sizes
from effseg_jax.input_pipeline.transforms_universal import resize_image, shortest_edge_size


@dataclasses.dataclass(frozen=True)
class ShortestEdgeRule:
  """The size at which the network sees an image, and that of the array it comes in.

  Attributes:
    short_side: length of the short side; 0: the image stays as it is.
    max_size: limit of the long side.
    multiple: the sides of the array are multiples of this.
  """

  short_side: int
  max_size: int
  multiple: int

  def image(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the image -> (rows, cols) it is resized to."""
    if not self.short_side:
      return size
    return shortest_edge_size(size, self.short_side, self.max_size)

  def array(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the image -> (rows, cols) of the padded array."""
    rows, cols = (-(-side // self.multiple) * self.multiple for side in self.image(size))
    return rows, cols


@dataclasses.dataclass(frozen=True)
class FitRule:
  """An image is fitted into a frame, keeping its ratio, and the array is the frame.

  Attributes:
    frame: rows and columns of the array.
  """

  frame: tuple[int, int]

  def image(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the image -> (rows, cols) it is resized to."""
    factor = min(side / length for side, length in zip(self.frame, size, strict=True))
    rows, cols = (max(round(length * factor), 1) for length in size)
    return rows, cols

  def array(self, size: tuple[int, int]) -> tuple[int, int]:
    """The frame."""
    del size
    return self.frame


@dataclasses.dataclass(frozen=True)
class WindowRule:
  """The short side gets a length, and square windows of it cover the long side.

  Attributes:
    side: of the windows.
  """

  side: int

  def image(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the image -> (rows, cols) it is resized to."""
    factor = self.side / min(size)
    rows, cols = (max(round(length * factor), self.side) for length in size)
    return rows, cols

  def array(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(rows, cols) of the image -> rows and columns of the grid of windows, and their sides."""
    rows, cols = (-(-length // self.side) for length in self.image(size))
    return rows, cols, self.side, self.side

  def starts(self, size: tuple[int, int]) -> np.ndarray:
    """Where the windows begin in the resized image, int32 (grid rows, grid columns, 2)."""
    lines = []
    for length in self.image(size):
      count = -(-length // self.side)
      overlap = (count * self.side - length) / max(count - 1, 1)
      lines.append([int(i * (self.side - overlap)) for i in range(count)])
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).astype(np.int32)

  def cut(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The windows of a resized image, uint8 (grid rows, grid columns, side, side, 3).

    Args:
      image: uint8 (H, W, 3), resized.
      size: rows and columns that it had before.
    """
    starts = self.starts(size)
    windows = [
      image[top : top + self.side, left : left + self.side] for top, left in starts.reshape(-1, 2)
    ]
    return np.stack(windows).reshape(*starts.shape[:2], *windows[0].shape)


PictureRule = ShortestEdgeRule | FitRule | WindowRule


class UniversalEvalBatches(EvalBatches):
  """Whole images in batches of one padded size; the ground truth stays in the data set.

  A batch holds `image` uint8 (B, H, W, 3), padded right and bottom with 0; `valid_size` int32
  (B, 2), the rows and columns that are picture; `label_size` int32 (B, 2), the original ones;
  `index` int32 (B,), for the data set's `ground_truth`; and `weight` float32 (B,). With a
  `WindowRule`, `image` is uint8 (B, r, c, S, S, 3), a grid of windows, and `starts` int32
  (B, r, c, 2) says where each begins in the resized image, whose size is `valid_size`.
  """

  def __init__(self, dataset: Any, rule: PictureRule, *, num_threads: int = 4, **loading: Any):
    """Plans the batches from the images' sizes.

    Args:
      dataset: with `image_size(index)`.
      rule: of sizes.
      num_threads: that read and decode.
      **loading: see `EvalBatches`.
    """
    self._rule = rule
    groups: dict[Hashable, list[int]] = collections.defaultdict(list)
    for index, size in enumerate(image_sizes(dataset, num_threads)):
      groups[rule.array(size)].append(index)
    super().__init__(dataset, groups, num_threads=num_threads, **loading)

  def filler(self, shape: Any) -> Batch:
    """Black; its sizes are those of the array."""
    size = shape
    batch = {"image": np.zeros((*shape, 3), np.uint8)}
    if len(shape) > 2:
      size = (shape[0] * shape[2], shape[1] * shape[3])
      batch["starts"] = np.zeros((*shape[:2], 2), np.int32)
    batch["valid_size"] = batch["label_size"] = np.array(size, np.int32)
    return batch

  def prepare(self, example: Example, shape: Any) -> Batch:
    """The image resized, and padded or cut into windows."""
    batch = self.filler(shape)
    size = example["image"].shape[:2]
    rows, cols = self._rule.image(size)
    image = resize_image(example["image"], (rows, cols))
    if isinstance(self._rule, WindowRule):
      batch["image"], batch["starts"] = self._rule.cut(image, size), self._rule.starts(size)
    else:
      batch["image"][:rows, :cols] = image
    batch["valid_size"] = np.array((rows, cols), np.int32)
    batch["label_size"] = np.array(size, np.int32)
    return batch


def universal_eval_batches(
  dataset: Any, options: Mapping[str, Any], **loading: Any
) -> UniversalEvalBatches:
  """Batches of the sizes that `size_rule` finds in the options.

  Raises:
    UserError: for sizes that make no sense.
  """
  return UniversalEvalBatches(dataset, size_rule(options), **loading)


def size_rule(options: Mapping[str, Any]) -> PictureRule:
  """How large images are evaluated.

  Args:
    options: `fit`, (rows, cols) of the frame of a `FitRule`, if that is not (0, 0); else
      `window_side` of a `WindowRule`, if that is not 0; else `short_side`, `max_size` and
      `multiple` of a `ShortestEdgeRule`.

  Raises:
    UserError: for sizes that make no sense.
  """
  fit, side = tuple(options.get("fit", (0, 0))), options.get("window_side", 0)
  if any(fit) and side:
    raise UserError(
      f"eval.fit is {fit} and eval.window_side {side}; expected one of them, the other 0."
    )
  if any(fit):
    if len(fit) != 2 or min(fit) < 1:
      raise UserError(f"eval.fit is {fit}; expected rows and columns in pixels.")
    return FitRule(fit)
  if side:
    if side < 1:
      raise UserError(f"eval.window_side is {side}; expected a length in pixels.")
    if options.get("panoptic") or options.get("instance"):
      raise UserError(
        "eval.window_side cuts pictures into windows, of which class maps alone can be put"
        " together; set eval.panoptic=False and eval.instance=False, or eval.fit instead."
      )
    return WindowRule(side)
  rule = ShortestEdgeRule(options["short_side"], options["max_size"], options["multiple"])
  if rule.multiple < 1 or rule.short_side < 0 or (rule.short_side and rule.max_size < 1):
    raise UserError(
      f"eval.short_side, max_size and multiple are {rule.short_side}, {rule.max_size} and"
      f" {rule.multiple}; expected lengths in pixels, a short_side of 0 for images as they are."
    )
  return rule
