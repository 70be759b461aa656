"""Data sets drawn from by weight."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from effseg_jax import experiment
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.loader import train_batches
from effseg_jax.input_pipeline.mixture import Mixture


class Numbered:
  """Examples that are their number, plus an offset."""

  palette = np.zeros((2, 3), np.uint8)

  def __init__(self, name, count, offset, classes=("a", "b")):
    self.name, self.count, self.offset, self.classes = name, count, offset, classes
    self.num_classes = len(classes)

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {"number": np.int32(index + self.offset)}

  def image_size(self, index):
    return (index, self.offset)


def draw(mixture, batches, **options):
  stream = train_batches(mixture, [], batch_size=8, seed=0, **options)
  found = [batch["number"].tolist() for batch in itertools.islice(stream, batches)]
  stream.close()
  return found


def test_every_batch_has_the_parts_in_the_ratio_of_their_weights():
  mixture = Mixture([Numbered("x", 30, 0), Numbered("y", 6, 1000)], [3, 1])
  batches = draw(mixture, 20)
  assert all(sum(number >= 1000 for number in batch) == 2 for batch in batches)
  numbers = [number for batch in batches for number in batch]
  small = [number for number in numbers if number >= 1000]
  for epoch in range(6):  # each part has epochs of its own
    assert sorted(small[6 * epoch : 6 * (epoch + 1)]) == list(range(1000, 1006))
  large = collections.Counter(number for number in numbers if number < 1000)
  assert set(large.values()) == {4}


def test_a_mixture_is_the_same_for_any_processes_and_after_a_restart():
  mixture = Mixture([Numbered("x", 30, 0), Numbered("y", 6, 1000)], [1, 1])
  whole = draw(mixture, 10)
  assert draw(mixture, 6, start=4) == whole[4:]
  halves = [draw(mixture, 10, rows=range(begin, begin + 4)) for begin in (0, 4)]
  assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_as_a_data_set_it_is_its_parts_one_after_the_other():
  mixture = Mixture([Numbered("x", 3, 0), Numbered("y", 2, 1000)], [1, 1])
  assert [int(mixture[index]["number"]) for index in range(len(mixture))] == [0, 1, 2, 1000, 1001]
  assert mixture.image_size(4) == (1, 1000)
  assert mixture.name == "x + y"
  assert mixture.classes == ("a", "b")
  assert mixture.num_classes == 2


def test_parts_that_do_not_go_together_are_explained():
  with pytest.raises(UserError, match=r"the classes of y \(1\) are not those of x \(2\)"):
    Mixture([Numbered("x", 3, 0), Numbered("y", 2, 0, classes=("a",))], [1, 1])
  with pytest.raises(UserError, match="the weight of y is 0"):
    Mixture([Numbered("x", 3, 0), Numbered("y", 2, 0)], [1, 0])


def test_a_configuration_names_the_parts():
  config = ConfigDict({"task": {"name": "semantic"}, "data": {"name": "synthetic"}})
  config.data.mixture = (("synthetic", "", "train", 2.0), ("synthetic", "", "val", 1.0))
  mixture = experiment.open_training_data(config)
  assert [part.split for part in mixture.parts] == ["train", "val"]
  assert mixture.weights == (2.0, 1.0)
  config.data.mixture = (("synthetic", "train"),)
  with pytest.raises(UserError, match=r"expected \(name, root, split, weight\)"):
    experiment.open_training_data(config)
