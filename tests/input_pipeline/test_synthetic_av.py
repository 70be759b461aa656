"""The embedded clips: what sounds is masked, and only the sound tells what it is."""

from __future__ import annotations

import numpy as np
import pytest

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio
from effseg_jax.input_pipeline.datasets import open_dataset, synthetic_av
from effseg_jax.metrics.audio_visual import SoundingScores


@pytest.fixture(scope="module")
def clips():
  return open_dataset("synthetic_av", split="val", num_frames=3)


@pytest.fixture(scope="module")
def semantic():
  return open_dataset("synthetic_av", split="val", num_frames=3, semantic=True)


def test_a_clip_is_a_function_of_its_number(clips):
  again = open_dataset("synthetic_av", split="val", num_frames=3)
  first, same = clips[5], again[5]
  for key, value in first.items():
    np.testing.assert_array_equal(value, same[key])
  other_split = open_dataset("synthetic_av", split="train", num_frames=3)[5]
  other_seed = open_dataset("synthetic_av", split="val", num_frames=3, seed=1)[5]
  for other in (clips[6], other_split, other_seed):
    assert (first["frames"] != other["frames"]).mean() > 0.5
    assert np.abs(first["log_mel"] - other["log_mel"]).mean() > 0.1
  with pytest.raises(IndexError):
    clips[len(clips)]


def test_an_example_has_the_arrays_of_a_clip(clips):
  example = clips[0]
  assert example["frames"].shape == (3, 64, 64, 3) and example["frames"].dtype == np.uint8
  assert example["log_mel"].shape == (3, 96, 64) and example["log_mel"].dtype == np.float32
  assert example["masks"].shape == (3, 64, 64) and example["masks"].dtype == np.uint8
  np.testing.assert_array_equal(example["frame_weight"], np.ones(3))
  np.testing.assert_array_equal(example["valid_frames"], np.ones(3))
  assert clips.prediction_path(0, 2).as_posix() == "val_0000/val_0000_2.png"


def test_masks_hold_the_kinds_that_are_heard(clips, semantic):
  assert semantic.classes == ("background", *synthetic_av.KINDS)
  plans = set()
  for index in range(len(semantic)):
    plan = semantic._plan(index)
    masks, binary = semantic.clip(index)[2], clips.clip(index)[2]
    np.testing.assert_array_equal(binary, masks > 0)
    for frame, heard in enumerate(plan.heard):
      found = {synthetic_av.KINDS[k - 1] for k in np.unique(masks[frame]) if k}
      assert found <= set(heard)
      if len(heard) == 1 and plan.visible[1] == heard[0]:  # drawn last: nothing hides it
        assert found == set(heard)
    plans.add(plan.name)
  assert plans == {"one", "switch", "both", "none"}


def test_the_picture_does_not_tell_what_sounds(clips):
  """Another plan of who is heard, with the same two kinds, leaves every pixel as it is."""
  plan = clips._plan(0)
  silent = synthetic_av._Plan("none", plan.visible, ((),) * 3)
  frames, _ = synthetic_av._draw_frames(clips._rng(0, 1), silent, clips.size)
  np.testing.assert_array_equal(frames, clips.clip(0)[0])


def test_kinds_sound_unlike_one_another():
  """The nearest of other voices' mean spectra is one of the same kind."""
  spectra, kinds = [], []
  for kind in synthetic_av.KINDS:
    for seed in range(4):
      rng = np.random.default_rng((seed, len(kinds)))
      plan = synthetic_av._Plan("one", (kind, "drum"), ((kind,),) * 2)
      spectra.append(audio.log_mel(synthetic_av._soundtrack(rng, plan)).mean((0, 1)))
      kinds.append(kind)
  spectra = np.stack(spectra) - np.mean(spectra, axis=1, keepdims=True)
  distance = np.linalg.norm(spectra[:, None] - spectra[None], axis=-1)
  np.fill_diagonal(distance, np.inf)
  right = [kinds[j] == kind for kind, j in zip(kinds, distance.argmin(1), strict=True)]
  assert np.mean(right) > 0.9


def test_silence_is_quiet_and_sound_is_not_clipped(clips):
  peaks = {"none": [], "one": []}
  for index in range(32):
    if clips.group(index) in peaks:
      peaks[clips.group(index)].append(np.abs(clips.clip(index)[1]).max())
  assert max(peaks["none"]) < 0.05 < min(peaks["one"])
  assert max(peaks["one"]) < 1.0


def test_answers_that_do_not_hear_stay_low(clips):
  """Both objects, or one of them: what a model without ears can answer at best."""
  both, larger = SoundingScores(len(clips)), SoundingScores(len(clips))
  for index in range(len(clips)):
    _, kinds = synthetic_av._draw_frames(clips._rng(index, 1), clips._plan(index), clips.size)
    masks = clips.clip(index)[2]
    counts = np.bincount(kinds[kinds > 0])
    for scores, answer in ((both, kinds > 0), (larger, kinds == counts.argmax())):
      scores.update(index, np.where(answer, 9.0, -9.0), masks, np.ones(3))
  assert 0.4 < both.summary()["M_J"] < 0.6
  assert larger.summary()["M_J"] < 0.6


def test_options_are_checked():
  with pytest.raises(UserError, match=r"options\.size is \(16, 64\); expected"):
    open_dataset("synthetic_av", split="val", size=(16, 64))
  with pytest.raises(UserError, match=r"num_frames is 0; expected 1 at least"):
    open_dataset("synthetic_av", split="val", num_frames=0)
  with pytest.raises(UserError, match="no split 'validation'"):
    open_dataset("synthetic_av", split="validation")
