"""From a data set to batches: an endless shuffled stream for training, a plan for evaluation."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from effseg_jax.errors import UserError
from input_pipeline.datasets.base import IGNORE_LABEL, Example
from input_pipeline.transforms import Transform, keep_ratio_size
from input_pipeline.transforms_classification import resize_and_crop

Batch = dict[str, np.ndarray]

_BATCH_KEYS = ("image", "label", "valid_size")

# Labels of an evaluation batch are padded to a multiple of this, so that few shapes compile.
_LABEL_BUCKET = 64


class Tolerant:
  """A data set whose broken examples are an error, or are replaced and counted.

  Attributes:
    skipped: number of reads that met a broken example, in this process.
  """

  def __init__(self, dataset: Any, on_error: str):
    """Wraps a data set.

    Args:
      dataset: raises `UserError` for a broken example.
      on_error: "raise", or "skip": the next example that can be read takes the place.
    """
    if on_error not in ("raise", "skip"):
      raise UserError(f"data.on_error is {on_error!r}; expected 'raise' or 'skip'.")
    self._dataset, self._on_error = dataset, on_error
    self.skipped = 0

  def __len__(self) -> int:
    return len(self._dataset)

  def __getitem__(self, index: int) -> Example:
    for step in range(len(self)):
      try:
        return self._dataset[(index + step) % len(self)]
      except UserError as error:
        if self._on_error == "raise":
          raise
        self.skipped += 1
        warnings.warn(f"skipped a broken example ({self.skipped} so far): {error}", stacklevel=2)
    raise UserError(f"{self._dataset.name}: not one of {len(self)} examples can be read.")

  def __repr__(self) -> str:  # grain names the pipeline in its checkpoints by this
    return f"Tolerant({getattr(self._dataset, 'name', 'dataset')}, {len(self)})"


@dataclasses.dataclass(frozen=True)
class Augment(grain.transforms.RandomMap):
  """Applies transforms one after the other and keeps what a batch holds.

  Attributes:
    transforms: from `transforms.train_transforms`.
  """

  transforms: Sequence[Transform]

  def random_map(self, element: Example, rng: np.random.Generator) -> Example:
    """Every random number comes from `rng`, which depends on (seed, position) alone."""
    for transform in self.transforms:
      element = transform(element, rng)
    example = {key: np.asarray(element[key], order="C") for key in _BATCH_KEYS}
    return {**example, "weight": np.float32(1.0)}


def train_batches(
  dataset: Any,
  transforms: Sequence[Transform],
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 4,
  num_workers: int = 0,
  on_error: str = "raise",
) -> grain.DatasetIterator:
  """Streams training batches without end: seed, shuffle, shard, repeat, decode, augment, batch.

  The same (seed, step) gives the same batch, whatever the number of threads and workers, and after
  the iterator's state was saved and restored. Each epoch has an order of its own.

  Args:
    dataset: see docs/architecture.md.
    transforms: applied to each example with its own rng.
    batch_size: over all processes.
    seed: of order and augmentation.
    process_index: of this host.
    process_count: number of hosts.
    num_threads: that read and decode in this process.
    num_workers: processes beside it; 0: none, which starts fastest.
    on_error: "raise" or "skip", see `Tolerant`.

  Returns:
    A grain iterator over batches of `batch_size / process_count` examples.

  Raises:
    UserError: if a process would have no full batch of distinct examples to begin with.
  """
  examples = len(dataset) // process_count
  if not examples:
    raise UserError(f"{dataset.name} has {len(dataset)} examples for {process_count} processes.")
  order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle()
  order = order[: examples * process_count][process_index::process_count].repeat(None)
  source = Tolerant(dataset, on_error)
  stream = order.map(source.__getitem__).random_map(Augment(tuple(transforms)))
  stream = stream.batch(batch_size // process_count, drop_remainder=True)
  threads = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
  batches = stream.to_iter_dataset(threads)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
  return iter(batches)


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


class EvalBatches:
  """Every example once, in batches whose images share one network size.

  All processes compute the same plan from the images' headers; each loads its own slice of each
  batch. The last batch of a size is filled with examples of weight 0.
  """

  def __init__(
    self,
    dataset: Any,
    size_rule: SizeRule,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    on_error: str = "raise",
  ):
    """Plans the batches.

    Args:
      dataset: with `image_size(index)`.
      size_rule: of the network's input.
      batch_size: over all processes.
      process_index: of this host.
      process_count: number of hosts.
      num_threads: that read and decode.
      on_error: "raise", or "skip": a broken example gets the weight 0 and is counted in `skipped`.
    """
    self._dataset, self._rule, self._threads = dataset, size_rule, num_threads
    self._local = batch_size // process_count
    self._on_error = on_error
    self.skipped = 0
    groups: dict[tuple[Any, Any], list[int]] = collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
      sizes = list(pool.map(dataset.image_size, range(len(dataset))))
    for index, size in enumerate(sizes):
      bucket = tuple(-(-length // _LABEL_BUCKET) * _LABEL_BUCKET for length in size)
      groups[size_rule(size), bucket].append(index)
    begin = process_index * self._local
    self._plan = [
      (size, bucket, indices[i : i + batch_size][begin : begin + self._local])
      for (size, bucket), indices in sorted(groups.items())
      for i in range(0, len(indices), batch_size)
    ]

  def __len__(self) -> int:
    """Number of batches, the same on every process."""
    return len(self._plan)

  def __iter__(self) -> Iterator[Batch]:
    """Loads two batches ahead in threads."""
    with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
      ahead: collections.deque[Any] = collections.deque()
      for size, bucket, indices in self._plan:
        filler = self._filler(size, bucket)
        loads = [pool.submit(self._load, index, size, bucket) for index in indices]
        ahead.append((loads, filler))
        if len(ahead) > 2:
          yield self._stack(*ahead.popleft())
      while ahead:
        yield self._stack(*ahead.popleft())

  def _stack(self, loads: Sequence[concurrent.futures.Future[Batch]], filler: Batch) -> Batch:
    examples = [load.result() for load in loads]
    examples += [filler] * (self._local - len(examples))
    return {key: np.stack([example[key] for example in examples]) for key in filler}

  def _load(self, index: int, size: tuple[int, int], bucket: tuple[int, int]) -> Batch:
    try:
      example = self._dataset[index]
    except UserError as error:
      if self._on_error == "raise":
        raise
      self.skipped += 1
      warnings.warn(f"skipped a broken example ({self.skipped} so far): {error}", stacklevel=2)
      return self._filler(size, bucket)
    return self._prepare(example, size, bucket)

  def _filler(self, size: tuple[int, int], bucket: tuple[int, int]) -> Batch:
    return empty_example(size, bucket)

  def _prepare(self, example: Example, size: tuple[int, int], bucket: tuple[int, int]) -> Batch:
    image = cv2.resize(example["image"], (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    label = np.full(bucket, IGNORE_LABEL, np.uint8)
    rows, cols = example["label"].shape
    label[:rows, :cols] = example["label"]
    return {
      "image": image,
      "label": label,
      "valid_size": np.array(size, np.int32),
      "label_size": np.array((rows, cols), np.int32),
      "weight": np.float32(1.0),
    }


class ClassificationEvalBatches(EvalBatches):
  """Every example once: the short side resized, the centre cut out; one size for all.

  A batch holds `image` uint8 (B, crop, crop, 3), `label` int32 (B,), `valid_size` int32 (B, 2) and
  `weight` float32 (B,). No image is opened to plan the batches.
  """

  def __init__(
    self,
    dataset: Any,
    *,
    resize: int,
    crop: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    on_error: str = "raise",
  ):
    """Plans the batches.

    Args:
      dataset: of a classification task.
      resize: length of the short side.
      crop: side of the square that the network sees, `resize` at most.
      batch_size: over all processes.
      process_index: of this host.
      process_count: number of hosts.
      num_threads: that read and decode.
      on_error: "raise", or "skip": a broken example gets the weight 0 and is counted in `skipped`.

    Raises:
      UserError: if the crop does not fit.
    """
    if crop > resize:
      raise UserError(f"eval.resize is {resize}; expected at least the crop's side, {crop}.")
    self._dataset, self._threads, self._on_error = dataset, num_threads, on_error
    self._resize = resize
    self._local = batch_size // process_count
    self.skipped = 0
    begin = process_index * self._local
    indices = range(len(dataset))
    self._plan = [
      ((crop, crop), (), indices[i : i + batch_size][begin : begin + self._local])
      for i in range(0, len(dataset), batch_size)
    ]

  def _filler(self, size: tuple[int, int], bucket: tuple[int, int]) -> Batch:
    del bucket
    return {
      "image": np.zeros((*size, 3), np.uint8),
      "label": np.int32(0),
      "valid_size": np.array(size, np.int32),
      "weight": np.float32(0.0),
    }

  def _prepare(self, example: Example, size: tuple[int, int], bucket: tuple[int, int]) -> Batch:
    return {
      **self._filler(size, bucket),
      "image": resize_and_crop(example["image"], self._resize, size[0]),
      "label": example["label"],
      "weight": np.float32(1.0),
    }


def empty_example(size: tuple[int, int], bucket: tuple[int, int]) -> Batch:
  """An evaluation example that counts nothing: weight 0, everything ignored."""
  return {
    "image": np.zeros((*size, 3), np.uint8),
    "label": np.full(bucket, IGNORE_LABEL, np.uint8),
    "valid_size": np.array(size, np.int32),
    "label_size": np.array(size, np.int32),
    "weight": np.float32(0.0),
  }
