"""M_J and M_F: the rules by hand, and the reference's own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from effseg_jax.metrics import audio_visual as av

SIZE = (6, 8)


def answer(mask):
  """Confident logits for a mask."""
  return np.where(mask, 8.0, -8.0)


def box(rows, cols):
  mask = np.zeros(SIZE, np.uint8)
  mask[:rows, :cols] = 1
  return mask


def scored(*clips):
  """Scores of (logits, masks) per clip, every frame counted."""
  scores = av.SoundingScores(len(clips))
  for index, (logits, masks) in enumerate(clips):
    scores.update(index, logits, masks, np.ones(len(masks)))
  return scores


def test_jaccard_by_hand():
  assert av.frame_jaccard(answer(box(2, 4)), box(2, 8)) == pytest.approx(0.5)
  assert av.frame_jaccard(np.zeros(SIZE), box(2, 8)) == 0.0  # a logit of 0 is silent
  assert av.frame_jaccard(answer(box(3, 8)), box(0, 0)) == 0.5  # half the pixels rightly silent
  assert av.frame_jaccard(answer(box(0, 0)), box(0, 0)) == 1.0


def test_curves_equal_a_loop():
  rng = np.random.default_rng(0)
  logits, mask = 4 * rng.standard_normal(SIZE).astype(np.float32), box(3, 5)
  precision, recall = av.frame_curves(logits, mask)
  p = 1 / (1 + np.exp(-logits))
  for k in range(0, 255, 17):
    predicted = p >= av.THRESHOLDS[k]
    hits = (predicted & (mask > 0)).sum()
    assert precision[k] == pytest.approx(hits / max(predicted.sum(), 1e-20))
    assert recall[k] == pytest.approx(hits / mask.sum())


def test_f_leaves_out_frames_in_which_nothing_sounds():
  silent, loud = box(0, 0), box(2, 8)
  half = (np.stack([answer(box(2, 4)), answer(loud)]), np.stack([loud, silent]))
  summary = scored(half).summary()
  # Precision 1 and recall 1/2 in the one frame that counts.
  assert summary["M_F"] == pytest.approx(1.3 * 0.5 / (0.3 + 0.5))
  assert summary["M_J"] == pytest.approx((0.5 + (1 - 16 / 48)) / 2)
  nothing = (np.stack([answer(silent)] * 2), np.stack([silent] * 2))
  # A batch in which nothing sounds has an F of 0, however right the answer is.
  assert scored(nothing).summary() == {"M_J": 1.0, "M_F": 0.0, "F_dataset": 0.0, "J_frames": 1.0}
  both = scored(half, nothing)
  assert both.summary()["M_F"] == pytest.approx(summary["M_F"] / 2)
  assert both.summary(2)["M_F"] == pytest.approx(summary["M_F"])
  assert both.summary()["F_dataset"] == both.summary(2)["F_dataset"]


def test_one_threshold_serves_a_whole_batch():
  """Two clips that need different thresholds: alone each has an F of 1, together they have not."""
  mask = box(2, 8)
  low, high = np.where(mask, -1.0, -2.0)[None], np.where(mask, 2.0, 1.0)[None]
  scores = scored((low, mask[None]), (high, mask[None]))
  assert scores.summary(1)["M_F"] == pytest.approx(1.0)
  assert scores.summary(2)["M_F"] < 0.8
  assert scores.summary(1)["F_dataset"] == scores.summary(2)["M_F"]


def test_the_last_batch_weighs_as_much_as_any():
  good, bad = (answer(box(2, 8))[None], box(2, 8)[None]), (answer(box(0, 0))[None], box(2, 8)[None])
  scores = scored(good, good, bad)
  assert scores.summary(2)["M_J"] == pytest.approx(1 / 2)
  assert scores.summary(1)["M_J"] == scores.summary(2)["J_frames"] == pytest.approx(2 / 3)


def test_frames_and_clips_that_do_not_count():
  scores = av.SoundingScores(3)
  logits, masks = np.stack([answer(box(2, 8)), answer(box(0, 0))]), np.stack([box(2, 8)] * 2)
  scores.update(1, logits, masks, np.array([1, 0]))
  assert scores.summary()["M_J"] == pytest.approx(1.0)
  np.testing.assert_array_equal(scores.frames, [0, 1, 0])
  assert scores.select(np.array([0, 2])).summary()["M_J"] == 0.0
  assert scores.select(np.array([1])).summary() == scores.summary()


def test_probabilities_do_not_overflow(recwarn):
  found = av.probabilities(np.array([-1e4, -1.0, 0.0, 1.0, 1e4]))
  np.testing.assert_allclose(found, [0, 0.26894143, 0.5, 0.7310586, 1], rtol=1e-6)
  assert found.dtype == np.float32 and not recwarn.list


def test_semantic_scores_by_hand():
  scores = av.SemanticScores(4)
  label, prediction = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 2]])
  scores.update(prediction, label)
  scores.update(np.zeros((1, 4), int), np.zeros((1, 4), int))
  jaccard, f = scores.per_class()
  np.testing.assert_allclose(jaccard, [(0.5 + 1) / 2, 1 / 3, 0.0, 0.0])
  np.testing.assert_array_equal(scores.frames, [2, 1, 1, 0])
  f_background = 1.3 * 1 * 0.5 / (0.3 + 0.5)
  np.testing.assert_allclose(f, [(f_background + 1) / 2, 0.5, 0.0, 0.0])
  numbers = scores.summary()
  assert numbers["M_J"] == pytest.approx((0.75 + 1 / 3) / 4)
  assert numbers["M_J_seen"] == pytest.approx((0.75 + 1 / 3) / 3)
  assert numbers["M_J_without_last"] == numbers["M_J_seen"]  # here the last one is the unseen one
  table = scores.table(("background", "cat", "dog", "cow")).splitlines()
  assert table[2].split() == ["cat", "33.33", "50.00", "1"]
  assert len(table) == 5 and table[-1].split()[0] == "mean"  # the unseen class has no line
  assert scores.to_json(("background", "cat", "dog", "cow"))["classes"]["cow"] == {
    "jaccard": None,
    "f": None,
    "frames": 0,
  }


def test_merged_semantic_scores_are_those_of_all_frames():
  rng = np.random.default_rng(0)
  whole, parts = av.SemanticScores(5), [av.SemanticScores(5), av.SemanticScores(5)]
  for index in range(6):
    prediction, label = rng.integers(0, 5, (2, *SIZE))
    whole.update(prediction, label)
    parts[index % 2].update(prediction, label)
  parts[0].merge(parts[1])
  assert parts[0].summary() == pytest.approx(whole.summary())


@pytest.fixture(scope="module")
def golden():
  """Trimmed outputs of the reference."""
  with np.load(Path(__file__).parents[1] / "golden" / "audio_visual_metrics.npz") as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def whole_golden(shared):
  """All of them."""
  with np.load(shared / "golden/avesformer/avs_metrics.npz") as arrays:
    return dict(arrays)


def check_cases(golden):
  for case in golden["cases"]:
    logits, masks = golden[f"{case}/pred"], golden[f"{case}/gt"]
    summary = scored((logits, masks)).summary()
    assert summary["M_J"] == pytest.approx(float(golden[f"{case}/miou"]), abs=1e-6), case
    assert summary["M_F"] == pytest.approx(float(golden[f"{case}/fscore"]), abs=1e-6), case
    frames = list(zip(logits, masks, strict=True))
    each = [av.frame_jaccard(*frame) for frame in frames]
    np.testing.assert_allclose(each, golden[f"{case}/iou_each"], atol=1e-6)
    stored = golden[f"{case}/prec"].shape[1]
    for k, curves in enumerate(av.frame_curves(*frame) for frame in frames):
      for curve, name in zip(curves, ("prec", "recall"), strict=True):
        every = -(-255 // stored)
        np.testing.assert_allclose(curve[::every], golden[f"{case}/{name}"][k], atol=1e-6)


def check_semantic(golden):
  scores = av.SemanticScores(71)
  for frame in zip(golden["avss/argmax"], golden["avss/target"], strict=True):
    scores.update(*frame)
  np.testing.assert_allclose(scores.jaccard, golden["avss/iou_sum"], atol=2e-6)
  np.testing.assert_allclose(scores.f, golden["avss/fscore_sum"], atol=2e-6)
  np.testing.assert_array_equal(scores.frames, golden["avss/cls_count"])
  numbers = scores.summary()
  for name, key in (
    ("M_J", "miou_all71__miou_dropLast__miou_presentOnly"),
    ("M_F", "f_all71__f_dropLast__f_presentOnly"),
  ):
    found = [numbers[name], numbers[f"{name}_without_last"], numbers[f"{name}_seen"]]
    np.testing.assert_allclose(found, golden[f"avss/{key}"], atol=1e-6)


def test_thresholds_are_the_reference_ones(golden):
  np.testing.assert_array_equal(av.THRESHOLDS, golden["thresholds255_f32"])


def test_scores_are_the_reference_ones(golden):
  check_cases(golden)


def test_semantic_scores_are_the_reference_ones(golden):
  check_semantic(golden)


def test_all_scores_are_the_reference_ones(whole_golden):
  check_cases(whole_golden)
  check_semantic(whole_golden)


def test_scores_of_one_clip_a_batch_and_of_four(whole_golden):
  clips = [whole_golden[f"batch4x5/{key}"].reshape(4, 5, 48, 56) for key in ("pred", "gt")]
  scores = scored(*zip(*clips, strict=True))
  assert scores.summary(4)["M_F"] == pytest.approx(float(whole_golden["batch4x5/fscore"]), abs=1e-6)
  mean = whole_golden["batch4x5/per_video_fscore"].mean()
  assert scores.summary(1)["M_F"] == pytest.approx(float(mean), abs=1e-6)
  assert scores.summary(1)["M_F"] < scores.summary(4)["M_F"] - 0.1
