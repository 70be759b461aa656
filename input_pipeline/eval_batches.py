"""Evaluation batches: every example once, on any number of processes."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import dataclasses
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.transforms import keep_ratio_size

Batch = dict[str, np.ndarray]


class EvalBatches(abc.ABC):
  """Every example once, in batches whose arrays share one shape.

  All processes make the same plan; each loads its own slice of each batch. The last batch of a
  shape is filled with examples of weight 0. A task's batches say what an example looks like in
  `filler` and `prepare`; `index` (the example's position in the data set, -1 for a filler) and
  `weight` are added here.
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
      on_error: "raise", or "skip": a broken example gets the weight 0, with a warning.
    """
    self._dataset, self._threads, self._on_error = dataset, num_threads, on_error
    self._local = batch_size // process_count
    self._skipped = 0
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
      self._skipped += 1
      warnings.warn(f"skipped a broken example ({self._skipped} so far): {error}", stacklevel=2)
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
