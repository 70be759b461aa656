"""From a data set to training batches: an endless shuffled stream, each batch known by its number.

The examples of a run form one sequence, a function of the seed alone: epoch after epoch, each in
an order of its own, every example once an epoch. Batch `n` is the examples `n * B` to
`(n + 1) * B`, and the random numbers of an example depend on the seed and its place in the
sequence. So neither the number of threads, workers or processes nor an interruption changes what a
step sees, and the position of a run in its data is the number of its steps.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import mixing
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.mixture import Mixture
from effseg_jax.input_pipeline.transforms import Transform

with extra("train"):
  import grain

Batch = dict[str, np.ndarray]


class Tolerant:
  """A data set whose broken examples are an error, or are replaced with a warning."""

  def __init__(self, dataset: Any, on_error: str):
    """Wraps a data set.

    Args:
      dataset: raises `UserError` for a broken example.
      on_error: "raise", or "skip": the next example that can be read takes the place.
    """
    if on_error not in ("raise", "skip"):
      raise UserError(f"data.on_error is {on_error!r}; expected 'raise' or 'skip'.")
    self._dataset, self._on_error = dataset, on_error
    self._skipped = 0

  def __len__(self) -> int:
    return len(self._dataset)

  def __getitem__(self, index: int) -> Example:
    for step in range(len(self)):
      try:
        return self._dataset[(index + step) % len(self)]
      except UserError as error:
        if self._on_error == "raise":
          raise
        self._skipped += 1
        warnings.warn(f"skipped a broken example ({self._skipped} so far): {error}", stacklevel=2)
    raise UserError(f"{self._dataset.name}: not one of {len(self)} examples can be read.")


@dataclasses.dataclass(frozen=True)
class Loader:
  """Makes an example of the sequence: reads it, and applies the transforms one after the other.

  Attributes:
    source: of the examples.
    transforms: from `tasks.train_transforms`; the arrays they end with are the batch's.
    seed: of everything random in them.
  """

  source: Any
  transforms: Sequence[Transform]
  seed: int

  def __call__(self, place: int, index: int) -> Example:
    """The example at a place in the sequence, which is number `index` of the data set.

    Every random number is drawn from a generator that (seed, place) determines.
    """
    rng = np.random.default_rng((self.seed, place))
    element = self.source[int(index)]
    for transform in self.transforms:
      element = transform(element, rng)
    example = {k: np.asarray(v, order="C") for k, v in element.items() if k != "name"}
    return {**example, "weight": np.float32(1.0)}


class TrainBatches:
  """The training batches of a run; see the module's description.

  Attributes:
    batch_size: over all processes.
  """

  def __init__(
    self,
    dataset: Any,
    transforms: Sequence[Transform],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    num_threads: int = 4,
    num_workers: int = 0,
    on_error: str = "raise",
  ):
    """Lays out the sequence; nothing is read.

    Args:
      dataset: see docs/architecture.md; or a `Mixture`.
      transforms: applied to each example with its own rng.
      batch_size: over all processes.
      seed: of order and augmentation.
      rows: which rows of each batch this process loads; None: all.
      num_threads: that read and decode in this process.
      num_workers: processes beside it; 0: none, which starts fastest.
      on_error: "raise" or "skip", see `Tolerant`.

    Raises:
      UserError: if the data set has no example.
    """
    if not len(dataset):
      raise UserError(f"{dataset.name} has no example to train on.")
    self.batch_size = batch_size
    self._rows = tuple(range(batch_size) if rows is None else rows)
    self._threads, self._workers = num_threads, num_workers
    source = Tolerant(dataset, on_error)
    self._load = Loader(source, mixing.bind(transforms, source), seed)
    self._order = _order(dataset, seed)

  def element_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array of an example, from the first one of the sequence."""
    example = self._load(0, self._order[0])
    return {key: (np.shape(value), np.asarray(value).dtype) for key, value in example.items()}

  def iterate(self, start: int = 0) -> Iterator[Batch]:
    """This process's rows of the batches from number `start` on, without end.

    Returns:
      A grain iterator, to be closed.
    """
    mine = _Rows(self._order, self._rows, self.batch_size)
    stream = mine.map_with_index(_AtPlace(self._load, self._rows, self.batch_size))
    stream = stream[start * len(self._rows) :]
    ahead = max(2 * len(self._rows), 4 * self._threads)
    threads = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
    examples = stream.to_iter_dataset(threads)
    if self._workers:
      if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags
        flags.FLAGS.mark_as_parsed()
      examples = examples.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
    return iter(examples.batch(len(self._rows), drop_remainder=True))


def train_batches(
  dataset: Any, transforms: Sequence[Transform], *, start: int = 0, **options: Any
) -> Iterator[Batch]:
  """`TrainBatches(dataset, transforms, **options).iterate(start)`."""
  return TrainBatches(dataset, transforms, **options).iterate(start)


def _order(dataset: Any, seed: int) -> grain.MapDataset:
  """Place in the sequence -> number of the example."""
  if not isinstance(dataset, Mixture):
    return grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat(None)
  parts, begin = [], 0
  for number, part in enumerate(dataset.parts):
    (own_seed,) = np.random.SeedSequence((seed, number)).generate_state(1)
    order = grain.MapDataset.range(len(part)).seed(int(own_seed)).shuffle().repeat(None)
    parts.append(order.map(_Add(begin)))
    begin += len(part)
  return grain.MapDataset.mix(parts, dataset.weights)


class _Rows(grain.MapDataset):
  """Those places of the sequence that a process loads, in their order."""

  def __init__(self, order: grain.MapDataset, rows: Sequence[int], batch_size: int):
    super().__init__(order)
    self._rows, self._batch_size = rows, batch_size

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    return self._parent[place_of(index, self._rows, self._batch_size)]


@dataclasses.dataclass(frozen=True)
class _AtPlace:
  """Loads by the number among this process's examples."""

  load: Loader
  rows: Sequence[int]
  batch_size: int

  def __call__(self, index: int, number: int) -> Example:
    return self.load(place_of(index, self.rows, self.batch_size), number)


@dataclasses.dataclass(frozen=True)
class _Add:
  begin: int

  def __call__(self, index: int) -> int:
    return self.begin + index


def place_of(index: int, rows: Sequence[int], batch_size: int) -> int:
  """The place in the whole sequence of the `index`-th example that a process loads."""
  batch, row = divmod(index, len(rows))
  return batch * batch_size + rows[row]
