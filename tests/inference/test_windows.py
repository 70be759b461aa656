"""EoMT's evaluation against the official one: sizes, windows, class maps, panoptic, instances."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from effseg_jax.errors import UserError
from effseg_jax.inference.mask_readout import MaskInference
from effseg_jax.inference.segments import instance_result, panoptic_result, segment_on_host
from effseg_jax.inference.windows import window_scores
from effseg_jax.input_pipeline.eval_universal import FitRule, WindowRule, size_rule
from effseg_jax.input_pipeline.transforms_universal import resize_image
from tests.vit_models import golden

SIDE = 64
SEMANTIC = ("70x150", "150x71", "64x64", "48x50")
PANOPTIC = ("90x130", "131x61")


def reference(kind, size):
  """Arrays of an image; images in (H, W, 3)."""
  found = {
    key.rpartition("/")[2]: value
    for key, value in golden("eomt_inference").items()
    if key.startswith(f"{kind}/{size}/")
  }
  return {**found, "image": found["image"].transpose(1, 2, 0)}


def size_of(size):
  rows, cols = map(int, size.split("x"))
  return rows, cols


@pytest.mark.parametrize("size", SEMANTIC)
def test_windows_are_the_official_ones(size):
  expected, rule = reference("semantic", size), WindowRule(SIDE)
  shape = size_of(size)
  assert rule.image(shape) == tuple(expected["resized_size"])
  grid = rule.array(shape)
  assert grid[0] * grid[1] == len(expected["windows"]) and grid[2:] == (SIDE, SIDE)
  axis = 0 if shape[0] > shape[1] else 1
  starts = rule.starts(shape).reshape(-1, 2)
  np.testing.assert_array_equal(starts[:, axis], expected["starts_ends"][:, 0])
  np.testing.assert_array_equal(starts[:, 1 - axis], 0)
  image = resize_image(np.ascontiguousarray(expected["image"]), rule.image(shape))
  windows = rule.cut(image, shape).reshape(-1, SIDE, SIDE, 3)
  difference = windows.astype(int) - expected["windows"].transpose(0, 2, 3, 1)
  assert np.abs(difference).max() <= 1


def windowed_outputs(size):
  """Outputs of one image in its grid, with a batch axis."""
  expected = reference("semantic", size)
  starts = WindowRule(SIDE).starts(size_of(size))
  grid = starts.shape[:2]
  outputs = {
    name: expected[name].reshape(1, *grid, *expected[name].shape[1:])
    for name in ("class_logits", "mask_logits")
  }
  return {**outputs, "starts": starts[None]}


@pytest.mark.parametrize("size", SEMANTIC)
def test_class_maps_are_the_official_ones(size):
  expected, outputs = reference("semantic", size), windowed_outputs(size)
  inference = MaskInference((True,) * 6, panoptic=False, instance=False)
  found = segment_on_host(outputs, [size_of(size)], [tuple(expected["resized_size"])], inference)
  rows, cols = size_of(size)
  # Where two classes have nearly the same score, the last digit decides.
  same = found.semantic[0, :rows, :cols] == expected["classes"]
  assert same.mean() > 0.999
  assert not found.semantic[0, rows:].any() and not found.semantic[0, :, cols:].any()
  if size == "64x64":  # one window, and the picture's own size: the scores themselves
    probabilities = jax.nn.softmax(outputs["class_logits"][0])[..., :-1]
    scores = window_scores(probabilities, outputs["mask_logits"][0], outputs["starts"][0], 4)
    scores = np.moveaxis(np.asarray(scores), 1, 0)[:, ::5, ::5]
    np.testing.assert_allclose(scores, expected["scores_sub"], atol=2e-5)


@functools.cache
def things(panoptic):
  """Classes 4 and 5 are stuff; the official instances do not look at that."""
  is_thing = (True,) * 4 + (False,) * 2 if panoptic else (True,) * 6
  return MaskInference(
    is_thing, panoptic=panoptic, instance=not panoptic, semantic=False, detections=20
  )


def segmented(size, panoptic):
  expected = reference("panoptic", size)
  outputs = {name: expected[name] for name in ("class_logits", "mask_logits")}
  sizes = [size_of(size)], [tuple(expected["resized_size"])]
  return expected, segment_on_host(outputs, *sizes, things(panoptic))


@pytest.mark.parametrize("size", PANOPTIC)
def test_pictures_are_fitted_and_padded_with_black_as_officially(size):
  expected, rule = reference("panoptic", size), FitRule((SIDE, SIDE))
  assert rule.image(size_of(size)) == tuple(expected["resized_size"])
  assert rule.array(size_of(size)) == (SIDE, SIDE)
  rows, cols = expected["resized_size"]
  padded = np.zeros((SIDE, SIDE, 3), int)
  padded[:rows, :cols] = resize_image(np.ascontiguousarray(expected["image"]), (rows, cols))
  assert np.abs(padded - expected["padded"][0].transpose(1, 2, 0)).max() <= 1


@pytest.mark.parametrize("size", PANOPTIC)
def test_panoptic_segments_are_the_official_ones(size):
  expected, found = segmented(size, panoptic=True)
  result = panoptic_result(found, 0, size_of(size), things(True).is_thing)
  classes = np.array([6, *(segment["label_id"] for segment in result["segments_info"])])
  assert (classes[result["segmentation"]] == expected["class_of_pixel"]).mean() > 0.999
  # The same partition, whatever the numbers.
  pairs = np.stack([result["segmentation"].ravel(), expected["segment_of_pixel"].ravel()])
  counts = np.unique(pairs, axis=1, return_counts=True)[1]
  assert np.sort(counts)[-len(classes) :].sum() > 0.999 * pairs.shape[1]


@pytest.mark.parametrize("size", PANOPTIC)
def test_instances_are_the_official_ones(size):
  expected, found = segmented(size, panoptic=False)
  result = instance_result(found, 0, size_of(size))
  order = np.argsort(-result["scores"], kind="stable")[:20]
  np.testing.assert_allclose(result["scores"][order], expected["instance_scores"], atol=2e-5)
  np.testing.assert_array_equal(result["labels"][order], expected["instance_labels"])
  cols = size_of(size)[1]
  masks = np.unpackbits(expected["instance_masks_packed"], axis=-1, count=cols).astype(bool)
  assert (result["masks"][order] == masks).mean() > 0.9999


@pytest.mark.parametrize(("options", "message"), [
  ({"fit": (64, 64), "window_side": 64}, "expected one of them"),
  ({"fit": (64, 0)}, r"eval\.fit is \(64, 0\); expected rows and columns"),
  ({"window_side": -3}, r"eval\.window_side is -3; expected a length"),
  ({"window_side": 64, "panoptic": True}, "class maps alone can be put together"),
])  # fmt: skip
def test_sizes_that_make_no_sense_are_one_line(options, message):
  with pytest.raises(UserError, match=message) as caught:
    size_rule({"short_side": 0, "max_size": 0, "multiple": 1, **options})
  assert "\n" not in str(caught.value)
