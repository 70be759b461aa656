"""Evaluation batches: every example once, on any number of processes."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import dataclasses
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL, Example
from effseg_jax.input_pipeline.transforms import keep_ratio_size
from effseg_jax.input_pipeline.transforms_classification import resize_and_crop

Batch = dict[str, np.ndarray]

# Labels of an evaluation batch are padded to a multiple of this, so that few shapes compile.
_LABEL_BUCKET = 64


class EvalBatches(abc.ABC):
  """Every example once, in batches whose arrays share one shape.

  All processes make the same plan; each loads its own slice of each batch. The last batch of a
  shape is filled with examples of weight 0. A task's batches say what an example looks like in
  `filler` and `prepare`; `index` (the example's position in the data set, -1 for a filler) and
  `weight` are added here.

  Attributes:
    skipped: number of broken examples that were left out, in this process.
  """

  def __init__(
    self,
    dataset: Any,
    groups: Mapping[Hashable, Sequence[int]],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    on_error: str = "raise",
  ):
    """Plans the batches.

    Args:
      dataset: raises `UserError` for a broken example.
      groups: shape key -> the examples whose arrays have that shape, the same on every process.
      batch_size: over all processes.
      process_index: of this host.
      process_count: number of hosts.
      num_threads: that read and decode.
      on_error: "raise", or "skip": a broken example gets the weight 0 and is counted in `skipped`.
    """
    self._dataset, self._threads, self._on_error = dataset, num_threads, on_error
    self._local = batch_size // process_count
    self.skipped = 0
    begin = process_index * self._local
    self._plan = [
      (shape, indices[i : i + batch_size][begin : begin + self._local])
      for shape, indices in sorted(groups.items())
      for i in range(0, len(indices), batch_size)
    ]

  @abc.abstractmethod
  def filler(self, shape: Any) -> Batch:
    """The arrays of an example that counts nothing."""

  @abc.abstractmethod
  def prepare(self, example: Example, shape: Any) -> Batch:
    """The arrays of an example, of the same keys and shapes as the filler's."""

  def __len__(self) -> int:
    """Number of batches, the same on every process."""
    return len(self._plan)

  def __iter__(self) -> Iterator[Batch]:
    """Loads two batches ahead in threads."""
    with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
      ahead: collections.deque[Any] = collections.deque()
      for shape, indices in self._plan:
        ahead.append((shape, [pool.submit(self._load, index, shape) for index in indices]))
        if len(ahead) > 2:
          yield self._stack(*ahead.popleft())
      while ahead:
        yield self._stack(*ahead.popleft())

  def _stack(self, shape: Any, loads: Sequence[concurrent.futures.Future[Batch]]) -> Batch:
    examples = [load.result() for load in loads]
    examples += [self._empty(shape)] * (self._local - len(examples))
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

  def _empty(self, shape: Any) -> Batch:
    return {**self.filler(shape), "index": np.int32(-1), "weight": np.float32(0.0)}

  def _load(self, index: int, shape: Any) -> Batch:
    try:
      example = self._dataset[index]
    except UserError as error:
      if self._on_error == "raise":
        raise
      self.skipped += 1
      warnings.warn(f"skipped a broken example ({self.skipped} so far): {error}", stacklevel=2)
      return self._empty(shape)
    return {
      **self.prepare(example, shape),
      "index": np.int32(index),
      "weight": np.float32(1.0),
    }


def image_sizes(dataset: Any, num_threads: int) -> list[tuple[int, int]]:
  """(rows, cols) of every image of a data set, from the files' headers."""
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    return list(pool.map(dataset.image_size, range(len(dataset))))


@dataclasses.dataclass(frozen=True)
class SizeRule:
  """The size at which the network sees an image: a function of the image's size alone.

  Attributes:
    scale: (long, short) frame the image is fitted into, keeping its ratio; (0, 0): as it is.
    multiple: both sides are then stretched up to a multiple of this.
  """

  scale: tuple[int, int] = (0, 0)
  multiple: int = 1

  def __call__(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the image -> (rows, cols) for the network."""
    if any(self.scale):
      size = keep_ratio_size(size, self.scale)
    rows, cols = (-(-length // self.multiple) * self.multiple for length in size)
    return rows, cols


class SemanticEvalBatches(EvalBatches):
  """Whole images in batches of one network size, labels at their own size.

  A batch holds `image` uint8 (B, H, W, 3), `label` uint8 (B, Hb, Wb), `valid_size` and `label_size`
  int32 (B, 2), `index` int32 (B,) and `weight` float32 (B,); see docs/architecture.md.
  """

  def __init__(self, dataset: Any, size_rule: SizeRule, *, num_threads: int = 4, **loading: Any):
    """Plans the batches from the images' headers.

    Args:
      dataset: with `image_size(index)`.
      size_rule: of the network's input.
      num_threads: that read and decode.
      **loading: see `EvalBatches`.
    """
    groups: dict[Hashable, list[int]] = collections.defaultdict(list)
    for index, size in enumerate(image_sizes(dataset, num_threads)):
      bucket = tuple(-(-length // _LABEL_BUCKET) * _LABEL_BUCKET for length in size)
      groups[size_rule(size), bucket].append(index)
    super().__init__(dataset, groups, num_threads=num_threads, **loading)

  def filler(self, shape: Any) -> Batch:
    """Black, everything ignored."""
    size, bucket = shape
    return {
      "image": np.zeros((*size, 3), np.uint8),
      "label": np.full(bucket, IGNORE_LABEL, np.uint8),
      "valid_size": np.array(size, np.int32),
      "label_size": np.array(size, np.int32),
    }

  def prepare(self, example: Example, shape: Any) -> Batch:
    """The image resized (bilinear), the label as it is."""
    size, _ = shape
    batch = self.filler(shape)
    rows, cols = example["label"].shape
    batch["image"] = cv2.resize(example["image"], size[::-1], interpolation=cv2.INTER_LINEAR)
    batch["label"][:rows, :cols] = example["label"]
    batch["label_size"] = np.array((rows, cols), np.int32)
    return batch


def semantic_eval_batches(
  dataset: Any, options: Mapping[str, Any], **loading: Any
) -> SemanticEvalBatches:
  """Batches for `options.scale` and `options.multiple`, see `SizeRule`."""
  rule = SizeRule(tuple(options["scale"]), options["multiple"])
  return SemanticEvalBatches(dataset, rule, **loading)


class ClassificationEvalBatches(EvalBatches):
  """The short side resized, the centre cut out; one size for all, so no image is opened to plan.

  A batch holds `image` uint8 (B, crop, crop, 3), `label` int32 (B,), `valid_size` int32 (B, 2),
  `index` int32 (B,) and `weight` float32 (B,).
  """

  def __init__(self, dataset: Any, *, resize: int, crop: int, **loading: Any):
    """Plans the batches.

    Args:
      dataset: of a classification task.
      resize: length of the short side.
      crop: side of the square that the network sees, `resize` at most.
      **loading: see `EvalBatches`.

    Raises:
      UserError: if the crop does not fit.
    """
    if crop > resize:
      raise UserError(f"eval.resize is {resize}; expected at least the crop's side, {crop}.")
    self._resize = resize
    super().__init__(dataset, {(crop, crop): range(len(dataset))}, **loading)

  def filler(self, shape: Any) -> Batch:
    """Black, of class 0."""
    return {
      "image": np.zeros((*shape, 3), np.uint8),
      "label": np.int32(0),
      "valid_size": np.array(shape, np.int32),
    }

  def prepare(self, example: Example, shape: Any) -> Batch:
    """The centre of the resized image."""
    image = resize_and_crop(example["image"], self._resize, shape[0])
    return {**self.filler(shape), "image": image, "label": example["label"]}


def classification_eval_batches(
  dataset: Any, options: Mapping[str, Any], **loading: Any
) -> ClassificationEvalBatches:
  """Batches for `options.resize` and `options.crop`."""
  return ClassificationEvalBatches(
    dataset, resize=options["resize"], crop=options["crop"], **loading
  )
