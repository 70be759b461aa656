"""Panoptic quality: each rule by hand, all of them against a loop, and on real annotations."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from effseg_jax.metrics.panoptic import PanopticQuality, image_counts

# Classes 0 and 1 are things, class 2 is stuff.
THINGS = (True, True, False)
UNIT = 2**40


def row(*spans):
  """One row of pixels from (value, length) pairs."""
  return np.concatenate([np.full(length, value) for value, length in spans])[None]


def counted(prediction, labels, truth, truth_labels, **more):
  """IoU sum, TP, FP and FN per class."""
  counts = image_counts(prediction, labels, truth, truth_labels, len(THINGS), **more)
  assert counts.dtype == np.int64
  return [(entry[0] / UNIT, *entry[1:].tolist()) for entry in counts]


NOTHING = (0.0, 0, 0, 0)


# The rules, one by one.


def test_more_than_half_matches():
  found = counted(row((0, 6), (-1, 4)), [0], row((0, 10)), [0])
  assert found == [(pytest.approx(0.6), 1, 0, 0), NOTHING, NOTHING]


def test_exactly_half_does_not_match():
  found = counted(row((0, 5), (-1, 5)), [0], row((0, 10)), [0])
  assert found == [(0.0, 0, 1, 1), NOTHING, NOTHING]


def test_another_class_does_not_match():
  found = counted(row((0, 10)), [1], row((0, 10)), [0])
  assert found == [(0.0, 0, 0, 1), (0.0, 0, 1, 0), NOTHING]


def test_void_is_left_out_of_the_union():
  # 6 of 10 predicted pixels are right and 4 are void: IoU 6 / (10 + 6 - 6 - 4).
  found = counted(row((0, 10)), [0], row((0, 6), (-1, 4)), [0])
  assert found == [(1.0, 1, 0, 0), NOTHING, NOTHING]


def test_a_prediction_mostly_on_void_is_no_mistake():
  for on_void, invented in ((6, 0), (5, 1)):  # more than half, not half
    truth = row((-1, on_void), (0, 10 - on_void), (0, 20))
    found = counted(row((0, 10), (-1, 20)), [0], truth, [0])
    assert found[0] == (0.0, 0, invented, 1)


def test_a_prediction_mostly_on_the_crowd_of_its_class_is_no_mistake():
  truth = row((0, 6), (1, 4), (1, 20))
  prediction = row((0, 10), (-1, 20))
  more = {"crowd": np.array([True, False])}
  assert counted(prediction, [0], truth, [0, 2], **more)[0] == NOTHING
  assert counted(prediction, [1], truth, [0, 2], **more)[1] == (0.0, 0, 1, 0)
  # Void and crowd count together.
  truth = row((0, 3), (-1, 3), (1, 4), (1, 20))
  assert counted(prediction, [0], truth, [0, 2], **more)[0] == NOTHING


def test_a_crowd_is_neither_matched_nor_missed():
  found = counted(row((-1, 10)), [], row((0, 10)), [0], crowd=np.array([True]))
  assert found == [NOTHING] * 3
  found = counted(row((0, 10)), [0], row((0, 10)), [0], crowd=np.array([True]))
  assert found == [NOTHING] * 3


def test_what_is_missed_and_what_is_invented():
  found = counted(row((0, 5), (1, 5)), [0, 2], row((0, 5), (1, 5)), [1, 2])
  assert found == [(0.0, 0, 1, 0), (0.0, 0, 0, 1), (1.0, 1, 0, 0)]


def test_instances_of_a_class_are_told_apart():
  truth = row((0, 5), (1, 5))
  assert counted(truth, [0, 0], truth, [0, 0])[0] == (2.0, 2, 0, 0)
  # One segment over both has half of each.
  assert counted(row((0, 10)), [0], truth, [0, 0])[0] == (0.0, 0, 1, 2)


def test_annotated_areas_count_where_things_cover_stuff():
  truth, prediction = row((0, 6), (1, 4)), row((0, 6), (1, 4))
  found = counted(prediction, [2, 0], truth, [2, 0], areas=np.array([8, 4]))
  assert found[2] == (pytest.approx(6 / 8), 1, 0, 0) and found[0] == (1.0, 1, 0, 0)


def test_an_annotated_segment_without_pixels_is_missed_and_a_predicted_one_is_nothing():
  assert counted(row((0, 4)), [0, 1], row((0, 4)), [0, 2])[1:] == [NOTHING, (0.0, 0, 0, 1)]


def test_empty_images():
  assert counted(row((-1, 4)), [], row((-1, 4)), []) == [NOTHING] * 3
  assert counted(row((-1, 4)), [], row((0, 4)), [1])[1] == (0.0, 0, 0, 1)
  assert counted(row((0, 4)), [1], row((-1, 4)), []) == [NOTHING] * 3


# All of them together.


def loop(prediction, labels, truth, truth_labels, crowd):
  """The rules of panopticapi, segment by segment."""
  counts = np.zeros((len(THINGS), 4))
  predicted = [prediction == i for i in range(len(labels))]
  true = [truth == j for j in range(len(truth_labels))]
  matched_true, matched_predicted = set(), set()
  for j, mask in enumerate(true):
    for i, guess in enumerate(predicted):
      common = np.sum(mask & guess)
      if crowd[j] or truth_labels[j] != labels[i] or not common:
        continue
      iou = common / (mask.sum() + guess.sum() - common - np.sum(guess & (truth < 0)))
      if iou > 0.5:
        counts[labels[i], :2] += iou, 1
        matched_true.add(j)
        matched_predicted.add(i)
  crowd_of = {}
  for j, label in enumerate(truth_labels):
    if crowd[j]:
      crowd_of[label] = j
    elif j not in matched_true:
      counts[label, 3] += 1
  for i, label in enumerate(labels):
    excused = np.sum(predicted[i] & (truth < 0))
    if label in crowd_of:
      excused += np.sum(predicted[i] & true[crowd_of[label]])
    area = predicted[i].sum()
    if i not in matched_predicted and area and not excused / area > 0.5:
      counts[label, 2] += 1
  return counts


@st.composite
def images(draw):
  rng = np.random.default_rng(draw(st.integers(0, 2**20)))
  num_true, num_predicted = rng.integers(0, 6, 2)
  block = int(rng.integers(1, 4))
  coarse = rng.integers(-1, max(num_true, 1), (6, 6)) if num_true else np.full((6, 6), -1)
  truth = np.kron(coarse, np.ones((block, block), int))
  # The prediction is the truth with some pixels changed, so that there are matches.
  prediction = np.minimum(truth, num_predicted - 1)
  changed = rng.random(truth.shape) < rng.choice([0.05, 0.3, 0.8])
  prediction = np.where(changed, rng.integers(-1, num_predicted, truth.shape), prediction)
  truth_labels = rng.integers(0, 3, num_true)
  labels = rng.integers(0, 3, num_predicted)
  same = min(num_true, num_predicted)
  if rng.random() < 0.7:
    labels[:same] = truth_labels[:same]
  return prediction, labels, truth, truth_labels, rng.random(num_true) < 0.3


@settings(max_examples=150, deadline=None, derandomize=True)
@given(images())
def test_counts_equal_a_loop(image):
  *arguments, crowd = image
  found = image_counts(*arguments, len(THINGS), crowd=crowd).astype(float)
  found[:, 0] /= UNIT
  np.testing.assert_allclose(found, loop(*image), rtol=0, atol=1e-11)


def accumulated(seeds):
  quality = PanopticQuality(THINGS)
  for seed in seeds:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (9, 9))
    prediction = np.where(rng.random((9, 9)) < 0.2, rng.integers(-1, 3, (9, 9)), truth)
    quality.update(prediction, np.arange(3), truth, np.arange(3))
  return quality


def test_adding_counts_is_exact_in_any_order():
  together = accumulated(range(20))
  for cut in (1, 7, 19):
    one, other = accumulated(reversed(range(cut, 20))), accumulated(range(cut))
    one.counts += other.counts
    np.testing.assert_array_equal(one.counts, together.counts)
    assert one.summary() == together.summary()
  assert together.counts.dtype == np.int64 and (together.counts[:, 1] > 10).all()


# Means and tables.


def test_means_by_hand():
  quality = PanopticQuality(THINGS)
  # Class 0: two matches of IoU 0.8 and 0.6, one invented, one missed. Class 1 never occurs.
  quality.counts[0] = int(1.4 * UNIT), 2, 1, 1
  quality.counts[2] = UNIT, 1, 0, 2
  means = quality.summary()
  assert means["PQ_th"] == pytest.approx(1.4 / 3) and means["PQ_st"] == pytest.approx(0.5)
  assert means["SQ_th"] == pytest.approx(0.7) and means["RQ_th"] == pytest.approx(2 / 3)
  assert means["SQ_st"] == 1.0 and means["RQ_st"] == pytest.approx(0.5)
  assert means["PQ"] == pytest.approx((1.4 / 3 + 0.5) / 2)
  lines = quality.table(("person", "car", "sky")).splitlines()
  assert lines[0].split() == ["class", "PQ", "SQ", "RQ", "TP", "FP", "FN"]
  assert lines[1].split() == ["person", "46.67", "70.00", "66.67", "2", "1", "1"]
  assert lines[2].split() == ["car", "-", "-", "-", "0", "0", "0"]
  assert lines[4].split()[:2] == ["things", "46.67"] and lines[6].split()[4:] == ["3", "1", "3"]
  report = quality.to_json(("person", "car", "sky"))
  assert report["classes"]["car"] == {"PQ": None, "SQ": None, "RQ": None, "TP": 0, "FP": 0, "FN": 0}
  assert report["PQ"] == means["PQ"] and report["classes"]["sky"]["FN"] == 2


def test_a_class_without_a_match_has_quality_zero():
  quality = PanopticQuality(THINGS)
  quality.counts[0] = 0, 0, 3, 0
  assert quality.quality()[0].tolist() == [0.0, 0.0, 0.0]
  assert PanopticQuality(THINGS).summary()["PQ"] == 0.0


def test_real_annotations_against_themselves(shared):
  from effseg_jax.input_pipeline.datasets import open_dataset

  root = shared / "data/coco_panoptic_sample"
  dataset = open_dataset("coco_panoptic", root=root, split="val2017")
  quality = PanopticQuality(dataset.thing_mask)
  crowds = 0
  for index in range(len(dataset)):
    truth = dataset.ground_truth(index)
    (segment_map,) = truth.segments
    kept = np.flatnonzero(~truth.crowd)
    rows = np.full(len(truth.labels) + 1, -1)
    rows[kept] = np.arange(len(kept))
    quality.update(
      rows[segment_map],
      truth.labels[kept],
      segment_map,
      truth.labels,
      crowd=truth.crowd,
      areas=truth.areas,
    )
    crowds += truth.crowd.sum()
  assert set(quality.summary().values()) == {1.0}
  assert quality.counts[:, 1].sum() == 523 and crowds == 3
