"""Batches: the same for the same (seed, step), each example once where it counts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import loader
from effseg_jax.input_pipeline import transforms_semantic as transforms
from effseg_jax.input_pipeline.datasets import open_dataset
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL
from effseg_jax.input_pipeline.eval_batches import SizeRule
from effseg_jax.input_pipeline.eval_semantic import SemanticEvalBatches
from effseg_jax.input_pipeline.loader import Tolerant, TrainBatches, train_batches

# Threads read ahead of a test, and may warn when it is over.
pytestmark = pytest.mark.filterwarnings("ignore:skipped a broken example")


class Numbered:
  """Images whose pixels all hold the example's number; some of them broken."""

  name = "numbered"

  def __init__(self, count, sizes=((8, 8),), broken=()):
    self.count, self.sizes, self.broken = count, sizes, broken

  def __len__(self):
    return self.count

  def image_size(self, index):
    return self.sizes[index % len(self.sizes)]

  def __getitem__(self, index):
    if index in self.broken:
      raise UserError(f"number {index} is broken")
    size = self.image_size(index)
    return {
      "image": np.full((*size, 3), index, np.uint8),
      "label": np.full(size, index % 7, np.uint8),
      "valid_size": np.array(size, np.int32),
      "name": str(index),
    }


def numbers(batch):
  """The examples of a batch, those of weight 0 left out."""
  return [int(image[0, 0, 0]) for image in batch["image"][batch["weight"] > 0]]


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_equal(first, second):
  assert len(first) == len(second)
  for one, other in zip(first, second, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def scenes(**options):
  """Batches of augmented scenes: everything random takes part."""
  steps = transforms.semantic_transforms(
    scale=(32, 32),
    ratio=(0.75, 1.5),
    crop=(32, 32),
    max_class_share=0.9,
    flip=0.5,
    photometric=True,
  )
  dataset = open_dataset("synthetic", split="val", size=(32, 32))
  return train_batches(dataset, steps, batch_size=4, seed=3, **options)


def test_a_training_batch_has_its_types():
  batch = next(scenes())
  shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
  assert shapes == {
    "image": ((4, 32, 32, 3), np.uint8),
    "label": ((4, 32, 32), np.uint8),
    "valid_size": ((4, 2), np.int32),
    "weight": ((4,), np.float32),
  }


def test_threads_do_not_change_the_batches():
  assert_equal(take(scenes(num_threads=1), 6), take(scenes(num_threads=4), 6))


def test_the_stream_goes_on_anywhere():
  whole = take(scenes(), 33)  # over the end of an epoch
  assert_equal(take(scenes(start=3, num_threads=1), 30), whole[3:])


def test_workers_do_not_change_the_batches():
  batches = scenes(num_workers=2, num_threads=1, start=2)
  found = take(batches, 5)
  batches.close()
  assert_equal(found, take(scenes(), 7)[2:])


def test_shapes_are_those_of_an_example():
  dataset = open_dataset("synthetic", split="val", size=(32, 32))
  batches = TrainBatches(dataset, [], batch_size=4, seed=0)
  (batch,) = take(batches.iterate(), 1)
  found = {key: ((4, *shape), dtype) for key, (shape, dtype) in batches.element_shapes().items()}
  assert found == {key: (value.shape, value.dtype) for key, value in batch.items()}


def test_every_epoch_holds_everything_in_another_order():
  batches = train_batches(Numbered(20), [], batch_size=5, seed=0)
  epochs = [[n for batch in take(batches, 4) for n in numbers(batch)] for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(epoch) for epoch in epochs}) == 3
  other = train_batches(Numbered(20), [], batch_size=5, seed=1)
  assert [n for batch in take(other, 4) for n in numbers(batch)] != epochs[0]


def test_augmentation_differs_between_epochs():
  batches = scenes()  # 96 scenes, 24 batches an epoch
  seen = {image.tobytes() for batch in take(batches, 48) for image in batch["image"]}
  assert len(seen) > 185


@pytest.mark.parametrize("rows", [[(0, 1, 2), (3, 4, 5)], [(0, 3), (1, 4), (2, 5)]])
def test_processes_load_their_rows_of_the_same_batches(rows):
  """Augmentation included: what a step sees does not depend on the number of processes."""
  dataset = open_dataset("synthetic", split="val", size=(32, 32))
  options = {"batch_size": 6, "seed": 3}
  steps = [transforms.HorizontalFlip(0.5), transforms.PhotometricDistortion()]
  whole = take(train_batches(dataset, steps, **options), 5)
  parts = [take(train_batches(dataset, steps, rows=own, **options), 5) for own in rows]
  for number, batch in enumerate(whole):
    for own, part in zip(rows, parts, strict=True):
      expected = {key: value[list(own)] for key, value in batch.items()}
      assert_equal([part[number]], [expected])


def test_an_epoch_holds_everything_where_batches_do_not_divide_it():
  batches = train_batches(Numbered(10), [], batch_size=4, seed=0)
  seen = [n for batch in take(batches, 15) for n in numbers(batch)]
  for epoch in range(6):
    assert sorted(seen[10 * epoch : 10 * (epoch + 1)]) == list(range(10))


def test_a_batch_may_be_larger_than_the_data_set():
  (batch,) = take(train_batches(Numbered(2), [], batch_size=5, seed=0), 1)
  assert sorted(numbers(batch)[:4]) == [0, 0, 1, 1]


def test_an_empty_data_set_says_so():
  with pytest.raises(UserError, match="numbered has no example"):
    TrainBatches(Numbered(0), [], batch_size=3, seed=0)


def test_a_broken_example_stops_or_is_replaced():
  broken = Numbered(12, broken=(4, 5))
  batches = train_batches(broken, [], batch_size=4, seed=0)
  with pytest.raises(UserError, match="is broken"):
    take(batches, 3)
  batches.close()
  with pytest.warns(UserWarning, match="skipped a broken example"):
    batches = train_batches(broken, [], batch_size=4, seed=0, on_error="skip")
    seen = sorted(n for batch in take(batches, 3) for n in numbers(batch))
    batches.close()
  assert seen == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 11]


def test_the_warning_counts_skipped_examples():
  source = Tolerant(Numbered(4, broken=(1, 2)), "skip")
  with pytest.warns(UserWarning, match="skipped a broken example") as warned:
    assert source[1]["name"] == "3"
  assert "(2 so far)" in str(warned[-1].message)
  with pytest.raises(UserError, match="not one of 2 examples"), pytest.warns(UserWarning):
    Tolerant(Numbered(2, broken=(0, 1)), "skip")[0]
  with pytest.raises(UserError, match="expected 'raise' or 'skip'"):
    Tolerant(Numbered(1), "ignore")


# Evaluation.

MIXED = ((8, 8), (8, 12), (70, 8))


@pytest.mark.parametrize("process_count", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 6, 17])
def test_evaluation_counts_every_example_once(process_count, count):
  parts = [
    SemanticEvalBatches(
      Numbered(count, MIXED),
      SizeRule(),
      batch_size=6,
      process_index=index,
      process_count=process_count,
    )
    for index in range(process_count)
  ]
  assert len({len(part) for part in parts}) == 1
  seen = []
  for together in zip(*parts, strict=True):
    shapes = [{key: value.shape for key, value in batch.items()} for batch in together]
    assert all(shape == shapes[0] for shape in shapes)
    assert len(shapes[0]) == 6 and shapes[0]["image"][0] == 6 // process_count
    for batch in together:
      assert all(side % 64 == 0 for side in batch["label"].shape[1:])
      assert (batch["label"][batch["weight"] == 0] == IGNORE_LABEL).all()
      seen += numbers(batch)
  assert sorted(seen) == list(range(count))


def test_evaluation_keeps_the_label_and_resizes_the_image():
  rule = SizeRule(scale=(24, 12), multiple=8)
  (batch,) = SemanticEvalBatches(Numbered(1, ((10, 16),)), rule, batch_size=2)
  assert batch["image"].shape == (2, 16, 24, 3)  # 12 x 19, stretched to a multiple of 8
  assert batch["label"].shape == (2, 64, 64)
  assert tuple(batch["label_size"][0]) == (10, 16)
  assert (batch["label"][0, :10, :16] == 0).all()
  assert (batch["label"][0, 10:] == IGNORE_LABEL).all()
  np.testing.assert_array_equal(batch["weight"], [1, 0])


@pytest.mark.parametrize(
  ("size", "scale", "multiple", "expected"),
  [
    ((1024, 2048), (2048, 1024), 32, (1024, 2048)),
    ((512, 683), (2048, 512), 32, (512, 704)),
    ((512, 683), (2048, 512), 1, (512, 683)),
    ((360, 480), (0, 0), 1, (360, 480)),
  ],
)
def test_network_sizes_of_the_recipes(size, scale, multiple, expected):
  assert SizeRule(scale, multiple)(size) == expected


def test_a_broken_example_of_an_evaluation():
  broken = Numbered(9, broken=(2,))
  with pytest.raises(UserError, match="number 2 is broken"):
    list(SemanticEvalBatches(broken, SizeRule(), batch_size=4))
  batches = SemanticEvalBatches(broken, SizeRule(), batch_size=4, on_error="skip")
  with pytest.warns(UserWarning, match="number 2 is broken"):
    seen = [n for batch in batches for n in numbers(batch)]
  assert sorted(seen) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_a_corrupt_file_can_be_skipped(tmp_path):
  (tmp_path / "classes.txt").write_text("a\nb\n")
  for kind, shape in (("images", (8, 8, 3)), ("labels", (8, 8))):
    (tmp_path / kind / "val").mkdir(parents=True)
    for index in range(3):
      picture = Image.fromarray(np.ones(shape, np.uint8))
      picture.save(tmp_path / kind / "val" / f"{index}.png")
  dataset = open_dataset("folder", root=tmp_path, split="val")
  picture = tmp_path / "images/val/1.png"
  picture.write_bytes(picture.read_bytes()[:-30])  # the header is intact
  batches = SemanticEvalBatches(dataset, SizeRule(), batch_size=2, on_error="skip")
  with pytest.warns(UserWarning, match=r"1\.png"):
    weights = np.concatenate([batch["weight"] for batch in batches])
  assert weights.sum() == 2


def test_augment_makes_contiguous_arrays():
  example = Numbered(2)[1]
  example["image"] = example["image"][:, ::-1]
  result = loader.Loader([example], (), seed=0)(place=0, index=0)
  assert all(value.flags.c_contiguous for value in result.values())
  assert set(result) == {"image", "label", "valid_size", "weight"}
