"""The evaluation of audio-visual segmentation, by a model that answers what it is told."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from effseg_jax.evaluators import make_evaluator
from effseg_jax.input_pipeline.eval_audio_visual import audio_visual_eval_batches
from effseg_jax.metrics.audio_visual import SemanticScores, SoundingScores
from effseg_jax.tasks.audio_visual import AudioVisualTask
from effseg_jax.training import evaluation, sharding

SIZE, TIME, CLIPS = (8, 12), 4, 6
NAMES = ("background", "cat", "dog")
PALETTE = np.array([(0, 0, 0), (200, 0, 0), (0, 200, 0)], np.uint8)
OPTIONS = {"size": SIZE, "mask_size": SIZE, "clips_per_batch": 2, "pictures": 2}


class _Clips:
  """Random masks; the first pixels of a frame hold the clip's number and the frame's."""

  name, split, num_frames, prediction_size = "clips", "test", TIME, None

  def __init__(self, semantic):
    self.classes = NAMES if semantic else ("sounding",)
    self.palette = PALETTE if semantic else PALETTE[1:2]
    rng = np.random.default_rng(0)
    self.masks = rng.integers(0, 3 if semantic else 2, (CLIPS, TIME, *SIZE)).astype(np.uint8)
    self.masks[1, 2] = 0  # nothing sounds
    self.valid = np.ones((CLIPS, TIME), np.float32)
    self.valid[2, 2:] = self.valid[5, 3:] = 0
    self.supervised = self.valid.copy()
    self.supervised[4, 1:] = 0
    self.masks *= self.valid[..., None, None].astype(np.uint8)

  def __len__(self):
    return CLIPS

  def __getitem__(self, index):
    frames = np.zeros((TIME, *SIZE, 3), np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 0, 1] = index, np.arange(TIME)
    return {
      "frames": frames,
      "log_mel": np.zeros((TIME, 96, 64), np.float32),
      "masks": self.masks[index],
      "frame_weight": self.supervised[index],
      "valid_frames": self.valid[index],
      "name": str(index),
    }

  def group(self, index):
    return "even" if index % 2 == 0 else "odd"

  def prediction_path(self, index, frame):
    return Path(str(index)) / f"{index}_{frame}.png"


class _Oracle:
  """Answers with the variables, logits (CLIPS, TIME, *SIZE, K), at the clip's number."""

  def apply(self, variables, frames, log_mel, train):
    assert not train
    # Inputs are normalised: the number is found by undoing that.
    number = frames[:, 0, 0, 0, 0] * AudioVisualTask.std[0] + AudioVisualTask.mean[0]
    return variables["logits"][number.round().astype(int)]


def run(dataset, logits, options=OPTIONS):
  """Evaluates over two virtual devices, in batches of four: the last one has fillers."""
  task = AudioVisualTask.for_dataset(dataset)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  batches = audio_visual_eval_batches(dataset, options, batch_size=4)
  evaluate = evaluation.compile_evaluation(
    lambda: make_evaluator("audio_visual", _Oracle(), task, dataset, options), batches, mesh
  )
  return evaluate({"logits": logits})


@pytest.fixture(scope="module")
def sounding():
  dataset = _Clips(semantic=False)
  noise = np.random.default_rng(1).standard_normal((CLIPS, TIME, *SIZE, 1))
  logits = (2.0 * dataset.masks[..., None] - 1.0 + noise).astype(np.float32)
  return dataset, logits, run(dataset, logits)


@pytest.fixture(scope="module")
def semantic():
  dataset = _Clips(semantic=True)
  logits = np.random.default_rng(1).standard_normal((CLIPS, TIME, *SIZE, 3)).astype(np.float32)
  logits[dataset.masks == 1, 1] += 1
  return dataset, logits, run(dataset, logits)


def test_every_supervised_frame_counts_once(sounding):
  dataset, logits, result = sounding
  expected = SoundingScores(CLIPS)
  for index in range(CLIPS):
    shown = logits[index, ..., 0] * dataset.valid[index, :, None, None]
    expected.update(index, shown, dataset.masks[index], dataset.supervised[index])
  assert result.scalars == pytest.approx(expected.summary(2), abs=1e-6)
  assert result.scalars["M_F"] != pytest.approx(expected.summary(1)["M_F"], abs=1e-4)
  assert result.report["frames"] == dataset.supervised.sum()
  assert result.report["frames_with_sound"] == dataset.supervised.sum() - 1
  even = expected.select(np.array([0, 2, 4])).summary(2)
  assert result.report["groups"]["even"] == pytest.approx({**even, "clips": 3}, abs=1e-6)
  assert json.loads(json.dumps(result.report)) == result.report


def test_the_table_says_what_was_measured(sounding):
  lines = sounding[2].table.splitlines()
  assert lines[0].split() == ["M_J", "M_F", "F", "clips"]
  assert [line.split()[0] for line in lines[1:4]] == ["all", "even", "odd"]
  assert "2 clip(s) a batch" in lines[4]


def test_masks_of_another_size_are_compared_at_theirs(sounding):
  dataset, logits, result = sounding
  small = logits.repeat(2, axis=2).repeat(2, axis=3)
  again = run(dataset, small, {**OPTIONS, "mask_size": SIZE})
  assert again.scalars["M_J"] == pytest.approx(result.scalars["M_J"], abs=0.1)
  larger = run(dataset, logits, {**OPTIONS, "mask_size": (16, 24)})
  assert larger.scalars["M_J"] == pytest.approx(result.scalars["M_J"], abs=0.1)


def test_binary_predictions_are_written_as_the_benchmark_does(sounding, tmp_path):
  dataset, logits, result = sounding
  result.write_predictions(tmp_path)
  for index in range(CLIPS):
    for frame in range(int(dataset.valid[index].sum())):
      with Image.open(tmp_path / str(index) / f"{index}_{frame}.png") as picture:
        assert picture.mode == "L"
        expected = 255 * (logits[index, frame, ..., 0] > 0)
        np.testing.assert_array_equal(np.asarray(picture), expected)
  assert not (tmp_path / "2" / "2_3.png").exists()  # padding


def test_semantic_scores_with_and_without_padding(semantic):
  dataset, logits, result = semantic
  real, padded = SemanticScores(3), SemanticScores(3)
  for index in range(CLIPS):
    for frame in range(TIME):
      shown = logits[index, frame].argmax(-1) * int(dataset.valid[index, frame])
      if dataset.supervised[index, frame]:
        real.update(shown, dataset.masks[index, frame])
      if dataset.supervised[index, frame] or not dataset.valid[index, frame]:
        padded.update(shown, dataset.masks[index, frame])
  assert result.scalars["M_J"] == pytest.approx(padded.summary()["M_J"])
  assert result.scalars["M_F"] == pytest.approx(padded.summary()["M_F"])
  assert result.scalars["M_J_frames"] == pytest.approx(real.summary()["M_J"])
  assert result.scalars["M_J"] > result.scalars["M_J_frames"] + 0.01  # padding flatters
  report = result.report["real_frames"]["classes"]
  assert report["cat"]["frames"] == real.frames[1]
  assert set(result.report["sources"]) == {"even", "odd"}
  words = result.table.split()
  assert set(NAMES) | {"AVSBench", "even", "odd"} <= set(words)
  assert json.loads(json.dumps(result.report)) == result.report


def test_semantic_predictions_have_the_colours_and_the_size_of_the_benchmark(semantic, tmp_path):
  dataset, logits, result = semantic
  result.write_predictions(tmp_path)
  expected = PALETTE[logits[3, 1].argmax(-1)]
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "3" / "3_1.png")), expected)
  dataset.prediction_size = (16, 24)
  result.write_predictions(tmp_path)
  dataset.prediction_size = None
  enlarged = expected.repeat(2, axis=0).repeat(2, axis=1)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "3" / "3_1.png")), enlarged)


def test_samples_are_drawn(sounding, semantic):
  for _, _, result in (sounding, semantic):
    picture = result.pictures["samples"]
    assert picture.dtype == np.uint8 and picture.ndim == 3
    assert (picture == (200, 0, 0)).all(-1).any()
