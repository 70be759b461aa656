"""From a data set to training batches: an endless shuffled stream."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from effseg_jax.errors import UserError
from input_pipeline.datasets.base import Example
from input_pipeline.transforms import Transform


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
  """Applies transforms one after the other; the arrays they end with are the batch's.

  Attributes:
    transforms: from `tasks.train_transforms`.
  """

  transforms: Sequence[Transform]

  def random_map(self, element: Example, rng: np.random.Generator) -> Example:
    """Every random number comes from `rng`, which depends on (seed, position) alone."""
    for transform in self.transforms:
      element = transform(element, rng)
    example = {k: np.asarray(v, order="C") for k, v in element.items() if k != "name"}
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
