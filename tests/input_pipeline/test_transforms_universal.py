"""The augmentations of universal segmentation: image and segments together, in fixed shapes."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import transforms_universal as transforms
from effseg_jax.input_pipeline.datasets import open_dataset
from effseg_jax.input_pipeline.datasets.panoptic import NO_SEGMENT
from effseg_jax.input_pipeline.eval_universal import ShortestEdgeRule, universal_eval_batches
from effseg_jax.input_pipeline.loader import train_batches

# A colour per segment, far apart, so that the image says which segment belongs to it.
COLOURS = np.random.default_rng(0).permutation(256).astype(np.uint8)[:, None] * np.ones(3, np.uint8)
SIZES = st.tuples(st.integers(8, 70), st.integers(8, 70))
SEEDS = st.integers(0, 2**16)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def make_example(seed, size, block=8, count=6, layers=1):
  """Blocks of one segment (or none) each, in that segment's colour; the arrays are read-only."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, count + 1, [layers, *(-(-length // block) for length in size)])
  coarse = np.where(coarse == count, NO_SEGMENT, coarse).astype(np.uint8)
  segments = np.kron(coarse, np.ones((1, block, block), np.uint8))[:, : size[0], : size[1]]
  example = {
    "image": COLOURS[segments[0]],
    "segments": segments,
    "labels": rng.integers(0, 9, count).astype(np.int32),
    "dropped_segments": np.int32(0),
    "valid_size": np.array(size, np.int32),
    "name": "made up",
  }
  for value in example.values():
    if isinstance(value, np.ndarray):
      value.flags.writeable = False
  return example


def apply(steps, example, seed):
  rng = np.random.default_rng(seed)
  for step in steps:
    example = step(example, rng)
  return example


def recipe(**changes):
  options = {"kind": "lsj", "crop": (40, 56), "max_segments": 8} | changes
  if options["kind"] == "shortest_edge":
    options.setdefault("short_side", 32)
  return transforms.universal_transforms(**options)


def masks_of(result):
  """Target masks of a packed example: bool (n, H, W)."""
  count = np.count_nonzero(result["labels"] >= 0)
  return (result["segments"] == np.arange(count)[:, None, None, None]).any(axis=1)


# Whole recipes.


@quick
@given(size=SIZES, seed=SEEDS, kind=st.sampled_from(["lsj", "shortest_edge"]))
def test_the_recipes_give_the_batch_its_shapes(size, seed, kind):
  example = make_example(seed, size, layers=2)
  steps = recipe(kind=kind, layers=2)
  result = apply(steps, example, seed)
  shapes = {key: (value.shape, value.dtype) for key, value in result.items()}
  assert shapes == {
    "image": ((40, 56, 3), np.uint8),
    "valid_size": ((2,), np.int32),
    "segments": ((2, 40, 56), np.uint8),
    "labels": ((8,), np.int32),
    "dropped_segments": ((), np.int32),
  }
  assert result["valid_size"].tolist() == [40, 56] and result["dropped_segments"] == 0
  masks = masks_of(result)
  assert masks.any(axis=(1, 2)).all()  # whoever lost all pixels is no target
  assert (result["labels"][len(masks) :] == -1).all()
  assert set(result["labels"][: len(masks)]) <= set(example["labels"])
  again = apply(steps, example, seed)
  assert all(np.array_equal(result[key], again[key]) for key in result)


@quick
@given(size=SIZES, crop=SIZES, seed=SEEDS, one_draw=st.booleans())
def test_image_and_segments_stay_together(size, crop, seed, one_draw):
  example = make_example(seed, size)
  steps = [
    transforms.HorizontalFlip(0.5, transforms.MIRRORED),
    transforms.Crop(crop, one_draw),
    transforms.PadTo(crop),
    transforms.PackSegments(6, 1, keep_empty=True),
  ]
  result = apply(steps, example, seed)
  rows, cols = (min(a, b) for a, b in zip(size, crop, strict=True))
  (segments,), image = result["segments"], result["image"]
  assert (image[rows:] == 128).all() and (image[:, cols:] == 128).all()
  assert (segments[rows:] == NO_SEGMENT).all() and (segments[:, cols:] == NO_SEGMENT).all()
  np.testing.assert_array_equal(image[:rows, :cols], COLOURS[segments[:rows, :cols]])
  np.testing.assert_array_equal(result["labels"], example["labels"])


@pytest.mark.parametrize("as_picture, valid", [(True, [16, 24]), (False, [16, 10])])
def test_padding_is_picture_or_not(as_picture, valid):
  steps = [transforms.PadTo((16, 24), as_picture), transforms.PackSegments(6, 1, keep_empty=True)]
  result = apply(steps, make_example(0, (16, 10)), 0)
  assert result["valid_size"].tolist() == valid and result["image"].shape == (16, 24, 3)


def test_the_order_of_the_recipes():
  names = [type(step).__name__ for step in recipe()]
  assert names == ["HorizontalFlip", "LargeScaleJitter", "Crop", "PadTo", "PackSegments"]
  names = [type(step).__name__ for step in recipe(kind="shortest_edge")]
  assert names == [
    *(
      "ResizeShortestEdge",
      "Crop",
      "PhotometricDistortion",
      "HorizontalFlip",
      "PadTo",
      "PackSegments",
    )
  ]
  steps = recipe(kind="shortest_edge", short_side=512, photometric=False)
  assert steps[0].lengths[:3] == (256, 307, 358) and steps[0].lengths[-1] == 1024
  assert len(steps[0].lengths) == 16 and steps[0].max_size == 2048 and len(steps) == 5


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kind": "lsi"}, "Did you mean 'lsj'"),
    ({"max_segments": 256}, "expected 1 to 255"),
    ({"layers": 0}, "expected 1 at least"),
    ({"kind": "shortest_edge", "short_side": 0}, "short_side is 0"),
  ],
)
def test_options_that_make_no_sense(changes, message):
  with pytest.raises(UserError, match=message):
    recipe(**changes)


# Sizes.


def test_large_scale_jitter_fits_a_scaled_frame():
  example, seen = make_example(0, (60, 40)), []
  jitter = transforms.LargeScaleJitter((80, 80), (0.1, 2.0))
  for seed in range(200):
    scale = np.random.default_rng(seed).uniform(0.1, 2.0)
    rows, cols = apply([jitter], example, seed)["segments"].shape[1:]
    assert rows == round(80 * scale) and abs(cols - rows * 2 / 3) < 1
    seen.append(rows)
  assert min(seen) < 12 and max(seen) > 155


@pytest.mark.parametrize(
  ("size", "short_side", "max_size", "expected"),
  [
    ((480, 640), 800, 1333, (800, 1067)),
    ((640, 480), 800, 1333, (1067, 800)),
    ((427, 640), 800, 1333, (800, 1199)),
    ((240, 640), 800, 1333, (500, 1333)),
    ((500, 500), 800, 1333, (800, 800)),
    ((1024, 2048), 1024, 2048, (1024, 2048)),
    ((683, 512), 512, 2048, (683, 512)),
  ],
)
def test_shortest_edge_sizes(size, short_side, max_size, expected):
  assert transforms.shortest_edge_size(size, short_side, max_size) == expected


def test_the_crop_of_large_scale_jitter_moves_on_the_diagonal():
  example = make_example(0, (60, 60))
  example["image"] = np.indices((60, 60, 1))[:2].transpose(1, 2, 3, 0)[:, :, 0].astype(np.uint8)
  corners = {True: set(), False: set()}
  for seed in range(60):
    for one_draw, found in corners.items():
      result = transforms.Crop((20, 40), one_draw)(example, np.random.default_rng(seed))
      assert result["segments"].shape == (1, 20, 40)
      found.add(tuple(result["image"][0, 0].tolist()))
  # Room of 40 rows and 20 columns: one number places both.
  assert all(abs(top - 2 * left) <= 1 for top, left in corners[True])
  assert not all(abs(top - 2 * left) <= 3 for top, left in corners[False])
  tops, lefts = zip(*corners[False], strict=True)
  assert min(tops) < 5 and max(tops) > 35 and min(lefts) < 3 and max(lefts) > 17


def test_resizing_is_that_of_pillow():
  example = make_example(3, (40, 50), layers=2)
  result = transforms.resize(example, (13, 17))
  image = Image.fromarray(example["image"]).resize((17, 13), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(result["image"], image)
  for layer, found in zip(example["segments"], result["segments"], strict=True):
    # The nearest pixel to the middle of each new one.
    rows = ((np.arange(13) + 0.5) * 40 / 13).astype(int)
    cols = ((np.arange(17) + 0.5) * 50 / 17).astype(int)
    np.testing.assert_array_equal(found, layer[rows[:, None], cols])
  assert transforms.resize(example, (40, 50)) is example


# Packing.


def packed(example, max_segments=8, layers=1, keep_empty=False):
  step = transforms.PackSegments(max_segments, layers, keep_empty)
  return step(example, np.random.default_rng(0))


def stripes(*widths):
  """Segments side by side with these widths, 4 rows high, labelled 10, 11, ..."""
  segments = np.repeat(np.arange(len(widths), dtype=np.uint8), widths)
  return {
    "image": np.zeros((4, len(segments), 3), np.uint8),
    "segments": np.tile(segments, (1, 4, 1)),
    "labels": np.arange(10, 10 + len(widths), dtype=np.int32),
  }


def test_the_largest_segments_are_kept_and_the_others_counted():
  result = packed(stripes(3, 1, 5, 2, 4), max_segments=3)
  assert result["labels"].tolist() == [10, 12, 14] and result["dropped_segments"] == 2
  assert masks_of(result).sum(axis=(1, 2)).tolist() == [12, 20, 16]
  before = {**stripes(3, 1, 5), "dropped_segments": np.int32(4)}  # by the data set
  assert packed(before, max_segments=1)["dropped_segments"] == 6


def test_segments_without_a_pixel():
  example = stripes(3, 0, 5)
  result = packed(example)
  assert result["labels"].tolist() == [10, 12] + [-1] * 6 and result["dropped_segments"] == 0
  result = packed(example, keep_empty=True)
  assert result["labels"].tolist() == [10, 11, 12] + [-1] * 5
  assert masks_of(result).sum(axis=(1, 2)).tolist() == [12, 0, 20]
  # Where room is short, they go first.
  result = packed(example, max_segments=2, keep_empty=True)
  assert result["labels"].tolist() == [10, 12] and result["dropped_segments"] == 1


def test_no_segment_at_all():
  example = stripes(2, 2)
  example["segments"][:] = NO_SEGMENT
  for layers in (1, 2):
    result = packed(example, layers=layers)
    assert (result["labels"] == -1).all() and result["dropped_segments"] == 0
    assert (result["segments"] == NO_SEGMENT).all() and result["segments"].shape[0] == layers
  nobody = {**example, "labels": example["labels"][:0]}
  assert (packed(nobody)["labels"] == -1).all()
  # A crop beside the only segment.
  example["segments"][0, :, :1] = 0
  cropped = apply([transforms.Crop((4, 2)), transforms.PackSegments(3, 1, False)], example, 1)
  assert cropped["segments"].shape == (1, 4, 2)


def test_overlapping_segments_get_as_many_layers_as_there_are():
  """Three layers: 0 (large) over 1 (middle) over 2 (small), and 3 apart, in the third layer."""
  segments = np.full((3, 6, 10), NO_SEGMENT, np.uint8)
  segments[0, :, :6], segments[1, :4, :5], segments[2, :2, :4], segments[2, :, 8:] = 0, 1, 2, 3
  example = {
    "image": np.zeros((6, 10, 3), np.uint8),
    "segments": segments,
    "labels": np.array([10, 11, 12, 13], np.int32),
  }
  before = [(segments == row).any(axis=0) for row in range(4)]
  for layers, kept in ((3, [0, 1, 2, 3]), (2, [0, 1, 3]), (1, [0, 3]), (4, [0, 1, 2, 3])):
    result = packed(example, layers=layers)
    assert result["segments"].shape == (layers, 6, 10)
    assert result["labels"][: len(kept)].tolist() == [10 + row for row in kept]
    assert result["dropped_segments"] == 4 - len(kept)
    np.testing.assert_array_equal(masks_of(result), [before[row] for row in kept])
  # Fewer layers are enough where segments have gone.
  example["segments"] = np.where(segments == 1, NO_SEGMENT, segments).astype(np.uint8)
  result = packed(example, layers=2)
  assert result["labels"][:3].tolist() == [10, 12, 13] and result["dropped_segments"] == 0
  result = packed(example, layers=2, keep_empty=True)
  assert result["labels"][:4].tolist() == [10, 11, 12, 13]


# Batches.


def test_training_batches_of_scenes():
  scenes = open_dataset("synthetic_instances", split="train", size=(48, 64))
  steps = recipe(crop=(48, 64), scale=(0.5, 2.0), max_segments=12)
  batches = train_batches(scenes, steps, batch_size=3, seed=1, num_threads=1)
  batch = next(batches)
  assert batch["image"].shape == (3, 48, 64, 3) and batch["weight"].tolist() == [1.0] * 3
  assert batch["segments"].shape == (3, 1, 48, 64) and batch["labels"].shape == (3, 12)
  assert batch["valid_size"].tolist() == [[48, 64]] * 3
  assert (batch["labels"].max(axis=1) >= 0).all()
  if hasattr(batches, "close"):
    batches.close()


class Pictures:
  """Plain pictures of given sizes."""

  name = "pictures"

  def __init__(self, *sizes):
    self.sizes = sizes

  def __len__(self):
    return len(self.sizes)

  def image_size(self, index):
    return self.sizes[index]

  def __getitem__(self, index):
    return {"image": np.full((*self.sizes[index], 3), 10 + index, np.uint8)}


def test_evaluation_pads_to_few_sizes():
  sizes = [(48, 64), (64, 48), (47, 64), (30, 90), (50, 64), (48, 64), (48, 64)]
  options = {"short_side": 24, "max_size": 40, "multiple": 16}
  batches = universal_eval_batches(Pictures(*sizes), options, batch_size=2)
  seen = {}
  for batch in batches:
    assert batch.keys() == {"image", "valid_size", "label_size", "index", "weight"}
    assert batch["image"].dtype == np.uint8 and not any(n % 16 for n in batch["image"].shape[1:3])
    for row in range(2):
      index, (rows, cols) = int(batch["index"][row]), batch["valid_size"][row]
      if not batch["weight"][row]:
        assert index == -1 and not batch["image"][row].any()
        continue
      seen[index] = rows, cols
      assert tuple(batch["label_size"][row]) == sizes[index]
      assert (batch["image"][row, :rows, :cols] == 10 + index).all()
      assert not batch["image"][row, rows:].any() and not batch["image"][row, :, cols:].any()
  expected = [(24, 32), (32, 24), (24, 33), (13, 40), (24, 31), (24, 32), (24, 32)]
  assert [seen[index] for index in range(7)] == expected
  assert len({batch["image"].shape for batch in batches}) == 3


def test_evaluation_sizes():
  assert ShortestEdgeRule(800, 1333, 32).array((480, 640)) == (800, 1088)
  assert ShortestEdgeRule(0, 0, 32).image((37, 64)) == (37, 64)
  assert ShortestEdgeRule(0, 0, 32).array((37, 64)) == (64, 64)
  for wrong in ({"multiple": 0}, {"short_side": -1}, {"max_size": 0}):
    options = {"short_side": 24, "max_size": 40, "multiple": 16} | wrong
    with pytest.raises(UserError, match="expected lengths in pixels"):
      universal_eval_batches(Pictures((8, 8)), options, batch_size=1)
