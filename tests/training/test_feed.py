"""Batches reach the devices in order, a few ahead, and mistakes reach the consumer."""

from __future__ import annotations

import itertools
import threading
import time

import jax
import numpy as np
import pytest

from effseg_jax.errors import UserError
from effseg_jax.training import sharding
from effseg_jax.training.feed import DeviceFeed


class Counting:
  """Batches 0, 1, 2, ...; knows how many were asked for."""

  def __init__(self, end=None):
    self.asked, self.end, self.closed = 0, end, False

  def __iter__(self):
    return self

  def __next__(self):
    if self.asked == self.end:
      raise UserError("a broken example")
    self.asked += 1
    return {"x": np.full((4, 2), self.asked - 1, np.int32)}

  def close(self):
    self.closed = True


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh({"data": 4, "fsdp": 1, "model": 1})


def test_batches_come_in_order_and_sharded(mesh):
  batches = Counting()
  feed = DeviceFeed(batches, mesh)
  for number, batch in enumerate(itertools.islice(feed, 20)):
    assert int(batch["x"][0, 0]) == number
    assert batch["x"].sharding == sharding.batch_sharding(mesh)
  feed.close()
  assert batches.closed


def test_no_more_are_read_ahead_than_asked(mesh):
  batches = Counting()
  feed = DeviceFeed(batches, mesh, ahead=2)
  next(feed)
  end = time.monotonic() + 10
  while batches.asked < 4 and time.monotonic() < end:
    time.sleep(0.01)
  time.sleep(0.1)
  assert batches.asked == 4  # one consumed, two waiting, one in the loader's hand
  threads = threading.active_count()
  feed.close()
  assert threading.active_count() == threads - 1


def test_what_loading_raises_is_raised_where_the_batch_is_wanted(mesh):
  feed = DeviceFeed(Counting(end=2), mesh)
  assert [int(next(feed)["x"][0, 0]) for _ in range(2)] == [0, 1]
  for _ in range(2):
    with pytest.raises(UserError, match="a broken example"):
      next(feed)
  feed.close()


def test_rows_of_this_process_are_all_where_there_is_one(mesh):
  assert sharding.process_rows(8, mesh) == tuple(range(8))
  shapes = {"x": jax.ShapeDtypeStruct((8, 2), np.float32)}
  assert sharding.batch_shapes(shapes, mesh)["x"].sharding == sharding.batch_sharding(mesh)
