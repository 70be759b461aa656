"""Input of image classification: augmentations, training and evaluation batches."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import pipelines
from effseg_jax.input_pipeline import transforms_classification as tc
from effseg_jax.input_pipeline.datasets import open_dataset
from effseg_jax.input_pipeline.eval_classification import ClassificationEvalBatches
from effseg_jax.input_pipeline.loader import train_batches
from effseg_jax.tasks.classification import ClassificationTask

SEEDS = st.integers(0, 2**16)
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))
quick = settings(max_examples=25, deadline=None, derandomize=True)


def make_example(seed, size):
  image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
  image.flags.writeable = False
  return {"image": image, "label": np.int32(3), "valid_size": np.array(size, np.int32)}


def write_pictures(root, per_class=(4, 3), split="train", size=(20, 30)):
  """Pictures whose red channel is 100 times their class."""
  for index, count in enumerate(per_class):
    folder = root / split / f"class{index}"
    folder.mkdir(parents=True)
    for number in range(count):
      pixels = np.full((*size, 3), (100 * index, number, 0), np.uint8)
      Image.fromarray(pixels).save(folder / f"{number}.png")
  return root


@quick
@given(size=SIZES, seed=SEEDS)
def test_the_recipe_keeps_size_type_and_class(size, seed):
  example = make_example(seed, size)
  steps = pipelines.train_transforms(
    "classification", size=24, area=(0.08, 1.0), flip=0.5, randaugment=(2, 9.0), erasing=1.0
  )

  def run():
    rng, result = np.random.default_rng(seed), example
    for step in steps:
      result = step(result, rng)
    return result

  result = run()
  assert result["image"].shape == (24, 24, 3) and result["image"].dtype == np.uint8
  assert result["label"] == 3 and tuple(result["valid_size"]) == (24, 24)
  np.testing.assert_array_equal(result["image"], run()["image"])


@quick
@given(size=SIZES, seed=SEEDS)
def test_crops_lie_inside_and_have_the_drawn_area(size, seed):
  crop = tc.RandomResizedCrop(8, (0.25, 0.5))
  left, top, right, bottom = crop._box(size, np.random.default_rng(seed))
  assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
  if min(size) > 40 and max(size) < 1.3 * min(size):
    assert 0.22 < (right - left) * (bottom - top) / (size[0] * size[1]) < 0.55
    assert 0.7 < (right - left) / (bottom - top) < 1.4


@pytest.mark.parametrize("name", tc.OPERATIONS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_operations_keep_the_picture_a_picture(name, sign):
  rows, cols = np.mgrid[:30, :40]
  waves = 20 * ((rows // 3 + cols // 3) % 2)  # something to sharpen
  pixels = np.stack([rows * 5 + 40, cols * 4 + 30, (rows + cols) * 2], -1) + waves[..., None]
  pixels = pixels.astype(np.uint8)
  picture = Image.fromarray(pixels)
  changes = []
  for strength in (0.1, 0.9):
    result = np.asarray(tc.OPERATIONS[name](picture, strength, sign))
    assert result.shape == pixels.shape and result.dtype == np.uint8
    changes.append(np.abs(result.astype(int) - pixels).mean())
  assert changes[1] > 0
  assert changes[1] >= changes[0] - 1e-6  # a larger magnitude changes more
  np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_rotation_and_translation_go_where_they_say():
  pixels = np.zeros((21, 21, 3), np.uint8)
  pixels[10, 10] = 255
  picture = Image.fromarray(pixels)
  turned = np.asarray(tc.OPERATIONS["rotate"](picture, 1.0, 1.0))
  assert turned[10, 10].min() > 200  # the centre stays
  moved = np.asarray(tc.OPERATIONS["translate_x"](picture, 2 / (0.45 * 21), 1.0))
  assert moved[10, 12].min() > 200
  moved = np.asarray(tc.OPERATIONS["translate_y"](picture, 2 / (0.45 * 21), -1.0))
  assert moved[8, 10].min() > 200


def test_randaugment_takes_a_magnitude_of_ten_at_most():
  with pytest.raises(UserError, match="magnitude is 12; expected 0 to 10"):
    tc.RandAugment(2, 12.0)


def test_erasing_stays_within_its_area():
  example = make_example(0, (40, 40))
  rng = np.random.default_rng(0)
  for _ in range(20):
    result = tc.RandomErasing(1.0, area=(0.1, 0.3))(example, rng)
    changed = (result["image"] != example["image"]).any(-1)
    assert 0.05 < changed.mean() < 0.35
  assert tc.RandomErasing(0.0)(example, rng) is example


def test_training_batches_have_one_label_each(tmp_path):
  dataset = open_dataset("imagenet", root=write_pictures(tmp_path), split="train")
  steps = tc.classification_transforms(size=16)
  batch = next(train_batches(dataset, steps, batch_size=4, seed=0))
  shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
  assert shapes == {
    "image": ((4, 16, 16, 3), np.uint8),
    "label": ((4,), np.int32),
    "valid_size": ((4, 2), np.int32),
    "weight": ((4,), np.float32),
  }
  np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 100 * batch["label"])


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_evaluation_counts_every_picture_once(tmp_path, process_count):
  dataset = open_dataset("imagenet", root=write_pictures(tmp_path, (5, 6)), split="train")
  parts = [
    ClassificationEvalBatches(
      dataset,
      resize=12,
      crop=8,
      batch_size=6,
      process_index=index,
      process_count=process_count,
    )
    for index in range(process_count)
  ]
  assert {len(part) for part in parts} == {2}
  seen = []
  for part in parts:
    for batch in part:
      assert batch["image"].shape == (6 // process_count, 8, 8, 3)
      assert batch["label"].dtype == np.int32 and batch["label"].ndim == 1
      for image, label, weight in zip(
        *(batch[k] for k in ("image", "label", "weight")), strict=True
      ):
        if weight:
          assert image[0, 0, 0] == 100 * label
          seen.append((int(label), int(image[0, 0, 1])))
  assert sorted(seen) == [(0, n) for n in range(5)] + [(1, n) for n in range(6)]


def test_the_task_counts_an_evaluation_batch(tmp_path):
  dataset = open_dataset("imagenet", root=write_pictures(tmp_path, (2, 1)), split="train")
  task = ClassificationTask.for_dataset(dataset)
  (batch,) = ClassificationEvalBatches(dataset, resize=8, crop=8, batch_size=4)
  (images,) = task.model_inputs(batch)
  assert images.shape == (4, 8, 8, 3)
  outputs = np.array([(1, 0), (0, 1), (0, 1), (1, 0)], np.float32)
  counts = np.asarray(task.eval_counts(outputs, batch))
  np.testing.assert_array_equal(counts, [[1, 1], [0, 1]])


def test_a_broken_picture_of_an_evaluation(tmp_path):
  dataset = open_dataset("imagenet", root=write_pictures(tmp_path), split="train")
  (tmp_path / "train/class0/1.png").write_bytes(b"nothing")
  with pytest.raises(UserError, match=r"1\.png cannot be decoded"):
    list(ClassificationEvalBatches(dataset, resize=8, crop=8, batch_size=4))
  batches = ClassificationEvalBatches(dataset, resize=8, crop=8, batch_size=4, on_error="skip")
  with pytest.warns(UserWarning, match=r"1\.png"):
    assert sum(batch["weight"].sum() for batch in batches) == 6


def test_a_crop_larger_than_the_image_is_refused():
  with pytest.raises(UserError, match=r"eval\.resize is 8; expected at least the crop's side, 16"):
    ClassificationEvalBatches([], resize=8, crop=16, batch_size=1)


@quick
@given(size=st.tuples(st.integers(5, 80), st.integers(5, 80)))
def test_the_view_of_an_evaluation_is_the_centre(size):
  image = make_example(0, size)["image"]
  assert tc.resize_and_crop(image, 16, 12).shape == (12, 12, 3)


def test_the_centre_is_cut_out():
  image = np.zeros((32, 64, 3), np.uint8)
  image[:, 16:48] = 200
  view = tc.resize_and_crop(image, 32, 32)
  assert (view == 200).all()
