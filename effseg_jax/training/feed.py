"""Batches on their way to the devices while the step before them runs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from effseg_jax.training import sharding

Batch = dict[str, jax.Array]


class DeviceBatches:
  """The batches of a training, on the devices; each pass may begin at any step.

  Attributes:
    shapes: of a global batch, with its sharding.
  """

  def __init__(
    self,
    iterate: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
  ):
    """Loads nothing yet.

    Args:
      iterate: step -> this process's rows of the batches from there on, without end.
      shapes: of a global batch.
      mesh: from `sharding.make_mesh`.
    """
    self.shapes = shapes
    self._iterate, self._mesh = iterate, mesh

  def iterate(self, start: int = 0) -> DeviceFeed:
    """Batches from a step on; `close` the result when done."""
    return DeviceFeed(self._iterate(start), self._mesh)

  def __iter__(self) -> DeviceFeed:
    """Batches from the first step on."""
    return self.iterate()


class DeviceFeed:
  """Loads batches and moves them to the devices in a thread, a few ahead of the consumer.

  Prefetched batches that were not consumed are not lost: the position of a run in its data is the
  number of its steps (see `input_pipeline.loader`), so that nothing here needs to be saved.
  """

  def __init__(self, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2):
    """Starts loading.

    Args:
      batches: this process's rows of the global batches; closed by `close`.
      mesh: from `sharding.make_mesh`.
      ahead: how many batches wait on the devices.
    """
    self._batches, self._mesh = batches, mesh
    self._ready: queue.Queue[Any] = queue.Queue(ahead)
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._load, name="device-feed", daemon=True)
    self._thread.start()

  def __iter__(self) -> DeviceFeed:
    return self

  def __next__(self) -> Batch:
    """The next global batch, sharded over the mesh.

    Raises:
      Exception: an error of loading, raised in the consumer.
    """
    batch = self._ready.get()
    if isinstance(batch, BaseException):
      self._ready.put(batch)  # raised again on each further call
      raise batch
    return batch

  def close(self) -> None:
    """Stops loading and gives the threads back."""
    self._closing.set()
    with contextlib.suppress(queue.Empty):
      while True:
        self._ready.get_nowait()
    self._thread.join(timeout=10)
    if hasattr(self._batches, "close"):
      self._batches.close()

  def _load(self) -> None:
    try:
      while not self._closing.is_set():
        self._hand_over(sharding.put_batch(next(self._batches), self._mesh))
    except BaseException as error:  # of any kind: it belongs to the consumer
      self._hand_over(error)

  def _hand_over(self, item: Any) -> None:
    while not self._closing.is_set():
      with contextlib.suppress(queue.Full):
        self._ready.put(item, timeout=0.2)
        return
