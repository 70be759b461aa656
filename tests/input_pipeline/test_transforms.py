"""The segmentation augmentations: image and label stay together, and nothing else changes."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import pipelines
from effseg_jax.input_pipeline import transforms_semantic as transforms
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL
from effseg_jax.input_pipeline.transforms import linear_table

# A colour per label value, far apart, so that the image says which label belongs to it.
COLOURS = np.random.default_rng(0).permutation(256).astype(np.uint8)[:, None] * np.ones(3, np.uint8)

SIZES = st.tuples(st.integers(8, 70), st.integers(8, 70))
SEEDS = st.integers(0, 2**16)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def make_example(seed, size, block=8, num_classes=5):
  """Blocks of one class (or void) each, in that class's colour; the arrays are read-only."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, num_classes + 1, [-(-length // block) for length in size])
  coarse = np.where(coarse == num_classes, IGNORE_LABEL, coarse).astype(np.uint8)
  label = np.kron(coarse, np.ones((block, block), np.uint8))[: size[0], : size[1]]
  example = {"image": COLOURS[label], "label": label, "valid_size": np.array(size, np.int32)}
  for array in example.values():
    array.flags.writeable = False
  return example


def apply(steps, example, seed):
  rng = np.random.default_rng(seed)
  for step in steps:
    example = step(example, rng)
  return example


@quick
@given(size=SIZES, crop=SIZES, seed=SEEDS)
def test_crop_flip_and_pad_keep_image_and_label_together(size, crop, seed):
  example = make_example(seed, size)
  steps = [
    transforms.ClassBalancedCrop(crop, 0.75),
    transforms.HorizontalFlip(0.5),
    transforms.PadTo(crop),
  ]
  result = apply(steps, example, seed)
  rows, cols = result["valid_size"]
  assert result["image"].shape == (*crop, 3) and result["label"].shape == crop
  assert (rows, cols) == (min(size[0], crop[0]), min(size[1], crop[1]))
  inside = result["label"][:rows, :cols]
  np.testing.assert_array_equal(result["image"][:rows, :cols], COLOURS[inside])
  assert (result["label"][rows:] == IGNORE_LABEL).all()
  assert (result["label"][:, cols:] == IGNORE_LABEL).all()


@quick
@given(size=SIZES, crop=SIZES, seed=SEEDS, photometric=st.booleans())
def test_the_recipe_keeps_sizes_types_and_classes(size, crop, seed, photometric):
  example = make_example(seed, size)
  steps = transforms.semantic_transforms(
    scale=(80, 60),
    ratio=(0.5, 2.0),
    crop=crop,
    max_class_share=0.75,
    flip=0.5,
    photometric=photometric,
  )
  result = apply(steps, example, seed)
  assert result["image"].shape == (*crop, 3) and result["image"].dtype == np.uint8
  assert result["label"].shape == crop and result["label"].dtype == np.uint8
  assert set(np.unique(result["label"])) <= {*np.unique(example["label"]), IGNORE_LABEL}
  rows, cols = result["valid_size"]
  assert 0 < rows <= crop[0] and 0 < cols <= crop[1]
  assert (result["label"][rows:] == IGNORE_LABEL).all()
  again = apply(steps, example, seed)
  for key in ("image", "label", "valid_size"):
    np.testing.assert_array_equal(result[key], again[key])


@quick
@given(size=st.tuples(st.integers(48, 90), st.integers(48, 90)), seed=SEEDS)
def test_scaling_moves_image_and_label_alike(size, seed):
  example = make_example(seed, size, block=24)
  result = apply([transforms.RandomScale((90, 90), (0.75, 1.5))], example, seed)
  label, image = result["label"], result["image"]
  assert label.shape == image.shape[:2] == tuple(result["valid_size"])
  same = (image == COLOURS[label]).all(-1)
  assert same.mean() > 0.75  # the others lie between two blocks, where the image is blurred


@quick
@given(size=SIZES, frame=st.tuples(st.integers(16, 300), st.integers(16, 300)))
def test_a_resized_image_fits_its_frame(size, frame):
  rows, cols = transforms.keep_ratio_size(size, frame)
  assert max(rows, cols) <= max(frame) and min(rows, cols) <= min(frame)
  touches = abs(max(rows, cols) - max(frame)) < 1 or abs(min(rows, cols) - min(frame)) < 1
  assert touches
  factor = max(rows, cols) / max(size)
  assert abs(min(rows, cols) - min(size) * factor) <= 0.5 + 0.5 * min(size) / max(size) + 1e-6


def test_sizes_of_the_published_recipes():
  assert transforms.keep_ratio_size((512, 683), (2048, 512)) == (512, 683)
  assert transforms.keep_ratio_size((1024, 2048), (2048, 1024)) == (1024, 2048)
  assert transforms.keep_ratio_size((480, 640), (2048, 512)) == (512, 683)


def test_the_crop_avoids_a_class_that_takes_too_much():
  label = np.zeros((64, 64), np.uint8)
  label[:, 40:] = 1
  example = {"image": COLOURS[label], "label": label, "valid_size": np.array((64, 64), np.int32)}

  def balanced(max_share):
    crop = transforms.ClassBalancedCrop((24, 24), max_share)
    rng = np.random.default_rng(0)
    shares = [np.mean(crop(example, rng)["label"]) for _ in range(60)]
    return np.mean([0.25 < share < 0.75 for share in shares])

  assert balanced(0.75) > 0.95
  assert balanced(1.0) < 0.5


def test_a_crop_of_void_alone_does_not_fail():
  label = np.full((16, 16), IGNORE_LABEL, np.uint8)
  example = {"image": COLOURS[label], "label": label, "valid_size": np.array((16, 16), np.int32)}
  result = transforms.ClassBalancedCrop((8, 8), 0.75)(example, np.random.default_rng(0))
  assert result["label"].shape == (8, 8)


@quick
@given(seed=SEEDS)
def test_photometric_distortion_changes_colours_alone(seed):
  rng = np.random.default_rng(seed)
  example = make_example(seed, (24, 32))
  example["image"] = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
  example["image"].flags.writeable = False
  result = transforms.PhotometricDistortion()(example, np.random.default_rng(seed))
  assert result["label"] is example["label"]
  assert result["image"].shape == (24, 32, 3) and result["image"].dtype == np.uint8


def test_brightness_is_clipped_and_rounded_down():
  image = np.arange(256, dtype=np.uint8).reshape(1, 256).repeat(3, 0)[..., None].repeat(3, -1)
  for factor, offset in ((1.0, 31.7), (1.0, -31.7), (1.43, 0.0), (0.5, 0.0)):
    expected = np.clip(image.astype(np.float32) * np.float32(factor) + np.float32(offset), 0, 255)
    actual = linear_table(factor, offset)[image]
    np.testing.assert_array_equal(actual, expected.astype(np.uint8))


def test_every_pass_of_the_recipe_differs():
  example = make_example(0, (64, 64))
  steps = transforms.semantic_transforms(
    scale=(64, 64), ratio=(0.5, 2.0), crop=(32, 32), max_class_share=1.0, flip=0.5, photometric=True
  )
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(10):
    result = example
    for step in steps:
      result = step(result, rng)
    seen.add(result["image"].tobytes())
  assert len(seen) == 10


def test_an_unknown_task_suggests_one():
  with pytest.raises(UserError, match="Did you mean 'semantic'"):
    pipelines.train_transforms("semantics")
