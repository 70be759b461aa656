"""Augmentations of clips: frames and masks stay together, and the sound stays a sound."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio
from effseg_jax.input_pipeline import transforms_audio_visual as ta
from effseg_jax.input_pipeline.transforms import PhotometricDistortion

SEEDS = st.integers(0, 2**16)
SIZES = st.tuples(st.integers(2, 40), st.integers(2, 40))
quick = settings(max_examples=25, deadline=None, derandomize=True)
TIME = 3


def make_example(seed, size):
  """Frames that are white where the mask is 1 and black elsewhere."""
  rng = np.random.default_rng(seed)
  masks = np.zeros((TIME, *size), np.uint8)
  for mask in masks:
    mask[: rng.integers(1, size[0] + 1), : rng.integers(1, size[1] + 1)] = 1
  wave = 0.1 * rng.standard_normal(TIME * 16_000)
  example = {
    "frames": 255 * np.repeat(masks[..., None], 3, axis=-1),
    "log_mel": audio.fit_patches(audio.log_mel(wave), TIME),
    "masks": masks,
    "frame_weight": np.ones(TIME, np.float32),
    "valid_frames": np.ones(TIME, np.float32),
  }
  for value in example.values():
    value.flags.writeable = False
  return example


@quick
@given(seed=SEEDS, size=SIZES, fit=st.sampled_from(("stretch", "centre", "random")))
def test_masks_follow_the_frames(seed, size, fit):
  example = make_example(seed, size)
  steps = ta.audio_visual_transforms(
    size=(16, 24),
    fit=fit,
    ratio=(0.6, 1.6),
    flip=0.5,
    photometric=False,
    gain=6,
    pitch=3,
    stripes=(8, 16),
  )

  def run():
    rng, result = np.random.default_rng(seed), example
    for step in steps:
      result = step(result, rng)
    return result

  result = run()
  assert result["frames"].shape == (TIME, 16, 24, 3) and result["frames"].dtype == np.uint8
  assert result["masks"].shape == (TIME, 16, 24) and set(np.unique(result["masks"])) <= {0, 1}
  # Bilinear and nearest differ at borders alone: what is white or black is masked or not.
  frames = result["frames"][..., 0]
  assert result["masks"][frames == 255].all()
  assert not result["masks"][frames == 0].any()
  for key, value in result.items():
    np.testing.assert_array_equal(value, run()[key])


def test_a_window_is_the_centre_or_anywhere():
  frames = np.broadcast_to(np.arange(12, dtype=np.uint8)[None, None, :, None], (TIME, 4, 12, 3))
  example = {**make_example(0, (4, 12)), "frames": frames}
  centre = ta.FitFrames((4, 4), "centre")(example, np.random.default_rng(0))
  np.testing.assert_array_equal(centre["frames"][0, 0, :, 0], [4, 5, 6, 7])
  window, begins = ta.FitFrames((4, 4), "random"), set()
  for seed in range(40):
    row = window(example, np.random.default_rng(seed))["frames"][:, 0, :, 0]
    assert (np.diff(row, axis=1) == 1).all() and len(np.unique(row[:, 0])) == 1
    begins.add(int(row[0, 0]))
  assert begins >= {0, 8} and len(begins) > 6


def test_a_picture_made_smaller_is_surrounded_by_nothing():
  example = {**make_example(0, (8, 8)), "masks": np.ones((TIME, 8, 8), np.uint8)}
  result = ta.FitFrames((8, 8), "centre", (0.5, 0.5))(example, np.random.default_rng(0))
  assert result["masks"].sum() == TIME * 16
  assert result["masks"][:, 2:6, 2:6].all()
  assert (result["frames"][:, 0] == (124, 116, 104)).all()


def test_an_unknown_fit_is_refused():
  with pytest.raises(UserError, match=r"fit is 'center'; .*Did you mean 'centre'"):
    ta.audio_visual_transforms(size=(4, 4), fit="center")


def test_mirroring_keeps_pairs_together():
  example = make_example(1, (4, 6))
  mirrored = ta.HorizontalFlip(1.0, ta.MIRRORED)(example, np.random.default_rng(0))
  np.testing.assert_array_equal(mirrored["frames"], example["frames"][:, :, ::-1])
  np.testing.assert_array_equal(mirrored["masks"], example["masks"][:, :, ::-1])
  assert ta.HorizontalFlip(0.0, ta.MIRRORED)(example, np.random.default_rng(0)) is example


def test_all_frames_of_a_clip_are_distorted_alike():
  frame = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
  example = {"frames": np.stack([frame] * TIME)}
  distort, changed = ta.DistortFrames(PhotometricDistortion()), 0
  for seed in range(8):
    result = distort(example, np.random.default_rng(seed))["frames"]
    assert (result == result[:1]).all()
    changed += (result != example["frames"]).any()
  assert changed > 4


def drawn(example, count, seed):
  return ta.DrawFrames(count)(example, np.random.default_rng(seed))


def test_drawn_frames_keep_their_sound_and_masks():
  example = make_example(0, (8, 12))
  chosen = set()
  for seed in range(40):
    result = drawn(example, 2, seed)
    places = [
      next(k for k in range(TIME) if (example["log_mel"][k] == patch).all())
      for patch in result["log_mel"]
    ]
    assert places == sorted(set(places))
    for key in ("frames", "masks", "frame_weight", "valid_frames"):
      np.testing.assert_array_equal(result[key], example[key][places])
    chosen |= set(places)
  assert chosen == set(range(TIME))


def test_frames_with_a_mask_are_drawn_first():
  example = {**make_example(0, (8, 12)), "frame_weight": np.array([0, 1, 0], np.float32)}
  others = set()
  for seed in range(10):
    assert drawn(example, 1, seed)["frame_weight"].tolist() == [1]
    others.add(tuple(drawn(example, 2, seed)["frame_weight"].tolist()))
  assert others == {(0, 1), (1, 0)}
  with pytest.raises(UserError, match="is 4; clip has 3"):
    drawn({**example, "name": "clip"}, 4, 0)


def test_gain_is_that_of_the_waveform():
  wave = 0.05 * np.random.default_rng(0).standard_normal(TIME * 16_000)
  example = {"log_mel": audio.fit_patches(audio.log_mel(wave), 5, "zeros")}
  result = ta.SoundGain(12.0)(example, np.random.default_rng(3))["log_mel"]
  gain = 10 ** (np.random.default_rng(3).uniform(-12, 12) / 20)
  assert abs(gain - 1) > 0.1
  np.testing.assert_allclose(result[:3], audio.log_mel(gain * wave)[:3], atol=1e-4)
  assert not result[3:].any()  # padding stays


def test_stripes_are_silent_and_padding_stays():
  example = {"log_mel": np.ones((4, 96, 64), np.float32)}
  example["log_mel"][3] = 0
  mute = ta.MuteStripes(20, 30)
  seen = set()
  for seed in range(30):
    result = mute(example, np.random.default_rng(seed))["log_mel"]
    silent = result[:3] == np.float32(np.log(0.01))
    assert set(np.unique(result[:3][~silent])) <= {1.0}
    bands, steps = silent.all(axis=1), silent.all(axis=2)
    assert (bands == bands[:1]).all()  # the same bands in every patch
    assert bands[0].sum() <= 20 and steps.sum(axis=1).max() <= 30
    assert (silent == (bands[:, None, :] | steps[:, :, None])).all()
    assert not result[3].any()
    seen.add((int(bands[0].sum()), int(steps[0].sum())))
  assert len(seen) > 15


def test_pitch_moves_whole_bands_of_all_patches_alike():
  bands = np.arange(64, dtype=np.float32) + 1
  example = {"log_mel": np.tile(bands, (4, 96, 1))}
  example["log_mel"][3] = 0
  shifts = set()
  for seed in range(40):
    result = ta.ShiftPitch(2)(example, np.random.default_rng(seed))["log_mel"]
    shift = int(bands[32] - result[0, 0, 32])
    expected = np.clip(bands - shift, 1, 64)  # the outermost band fills the gap
    assert (result[:3] == expected).all()
    assert not result[3].any()  # padding stays
    shifts.add(shift)
  assert shifts == {-2, -1, 0, 1, 2}
