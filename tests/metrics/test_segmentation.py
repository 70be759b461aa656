"""The confusion matrix equals a loop over pixels, adds up, and stays exact."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effseg_jax.metrics.segmentation import ConfusionMatrix, confusion_counts

SHAPE = (2, 3, 4)
count_on_device = jax.jit(confusion_counts, static_argnums=(2, 3))


def loop(prediction, label, num_classes, ignore_label, weight):
  counts = np.zeros((num_classes, num_classes), np.int64)
  for p, t, w in zip(prediction, label, weight, strict=True):
    for a, b in zip(p.ravel(), t.ravel(), strict=True):
      if w > 0 and b != ignore_label:
        counts[b, a] += 1
  return counts


@st.composite
def cases(draw):
  num_classes = draw(st.sampled_from((1, 3, 7)))
  rng = np.random.default_rng(draw(st.integers(0, 10_000)))
  ignore_label = draw(st.sampled_from((255, 2)))
  prediction = rng.integers(0, num_classes, SHAPE)
  label = rng.integers(0, num_classes, SHAPE)
  label[rng.random(SHAPE) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = ignore_label
  weight = rng.integers(0, 2, SHAPE[0]).astype(np.float32)
  return prediction, label, num_classes, ignore_label, weight


@settings(max_examples=60, deadline=None)
@given(cases())
def test_counts_equal_a_loop(case):
  prediction, label, num_classes, ignore_label, weight = case
  found = count_on_device(
    prediction.astype(np.int32), label.astype(np.uint8), num_classes, ignore_label, weight
  )
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, loop(*case))


def _matrix(seed):
  matrix = ConfusionMatrix(4)
  matrix.update(np.random.default_rng(seed).integers(0, 1000, (4, 4)))
  return matrix


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative(seeds):
  def merged(*order):
    total = ConfusionMatrix(4)
    for seed in order:
      total.counts += _matrix(seed).counts
    return total

  a, b, c = seeds
  right = merged(b, c)
  right.counts += _matrix(a).counts
  for other in (merged(a, b, c), merged(c, b, a)):
    np.testing.assert_array_equal(other.counts, right.counts)
    assert other.summary() == right.summary()


def test_sums_beyond_32_bits_are_exact():
  matrix, large = ConfusionMatrix(2), np.full((2, 2), 2**31 - 1, np.int32)
  for _ in range(5):
    matrix.update(large)
  assert matrix.counts.dtype == np.int64
  assert matrix.counts[0, 0] == 5 * (2**31 - 1)
  assert matrix.miou() == pytest.approx(1 / 3)


def test_means_by_hand():
  matrix = ConfusionMatrix(4)
  matrix.update([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 4, 0, 0]])
  np.testing.assert_allclose(matrix.iou(), [6 / 9, 3 / 10, np.nan, 0.0])
  np.testing.assert_allclose(matrix.accuracy(), [6 / 8, 3 / 4, np.nan, 0.0])
  assert matrix.miou() == pytest.approx((6 / 9 + 3 / 10) / 3)  # the absent class is left out
  assert matrix.mean_accuracy() == pytest.approx((6 / 8 + 3 / 4) / 3)
  assert matrix.pixel_accuracy() == pytest.approx(9 / 16)


def test_a_class_that_is_only_predicted_counts():
  matrix = ConfusionMatrix(2)
  matrix.update([[3, 1], [0, 0]])
  np.testing.assert_allclose(matrix.iou(), [0.75, 0.0])
  assert matrix.mean_accuracy() == 0.75  # and has no accuracy


def test_nothing_counted_is_zero_and_no_warning(recwarn):
  matrix = ConfusionMatrix(3)
  assert matrix.summary() == {"mIoU": 0.0, "mean_accuracy": 0.0, "pixel_accuracy": 0.0}
  assert not recwarn.list


def test_table_and_json():
  matrix = ConfusionMatrix(3)
  matrix.update([[8, 2, 0], [0, 10, 0], [0, 0, 0]])
  lines = matrix.table(("sky", "pedestrian", "car")).splitlines()
  assert lines[0].split() == ["class", "IoU", "acc", "share"]
  assert lines[1].split() == ["sky", "80.00", "80.00", "50.00"]
  assert lines[2].split() == ["pedestrian", "83.33", "100.00", "50.00"]
  assert lines[3].split() == ["car", "-", "-", "0.00"]
  assert lines[4].split() == ["mean", "81.67", "90.00", "pixel", "acc", "90.00"]
  assert len({line.index(".") for line in lines[1:3]}) == 1  # aligned
  json = matrix.to_json(("sky", "pedestrian", "car"))
  assert json["classes"]["car"] == {"iou": None, "accuracy": None}
  assert json["classes"]["sky"]["iou"] == pytest.approx(0.8)
  assert json["mIoU"] == matrix.miou()
