"""The front-end against the reference's patches; sound of every rate, width and length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio

GOLDEN = Path(__file__).parents[1] / "golden" / "vggish.npz"


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as file:
    return dict(file)


def tones(sample_rate, seconds=2.0):
  """Two tones, float64 (samples,)."""
  time = np.arange(round(seconds * sample_rate)) / sample_rate
  return 0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 1234 * time)


def noise(seconds, seed=0):
  return np.random.default_rng(seed).uniform(-0.5, 0.5, round(16_000 * seconds))


def test_reference_patches(golden):
  np.testing.assert_allclose(audio.mel_matrix(), golden["mel_matrix"], atol=1e-12)
  patches = audio.log_mel(golden["waveform"])
  assert patches.dtype == np.float32
  np.testing.assert_allclose(patches, golden["log_mel"], rtol=0, atol=2e-7)


def test_every_reference_case(shared):
  with np.load(shared / "golden" / "avesformer" / "vggish_frontend.npz") as golden:
    np.testing.assert_allclose(audio.window(), golden["hann_periodic_400"], atol=1e-14)
    spectrogram = audio.log_mel_spectrogram(golden["waveform_int16"])
    assert len(spectrogram) == 498
    np.testing.assert_allclose(spectrogram[:96], golden["log_mel_f64_first"], atol=1e-12)
    short = audio.log_mel(golden["short_int16"])
    whole = audio.log_mel(golden["waveform_int16"])
    for found, name in (
      (whole, "log_mel"),
      (audio.log_mel(golden["stereo_int16"]), "log_mel_stereo"),
      (audio.log_mel(golden["waveform10_int16"]), "log_mel10"),
      (short, "log_mel_short"),
      (audio.fit_patches(short, 5), "log_mel_short_s4pad"),
      (audio.fit_patches(whole, 10, "zeros"), "log_mel_avss_pad10"),
    ):
      np.testing.assert_allclose(found, golden[name], rtol=0, atol=2e-7, err_msg=name)


@pytest.mark.parametrize(
  ("samples", "patches"),
  [(0, 0), (1, 0), (399, 0), (15_599, 0), (15_600, 1), (30_959, 1), (30_960, 2), (75_200, 4)],
)
def test_number_of_patches(samples, patches):
  assert audio.log_mel(np.zeros(samples)).shape == (patches, 96, 64)


def test_long_sound_is_transformed_in_blocks(monkeypatch):
  expected = audio.log_mel_spectrogram(noise(2))
  monkeypatch.setattr(audio, "_BLOCK", 7)
  np.testing.assert_allclose(audio.log_mel_spectrogram(noise(2)), expected, atol=1e-13)


def test_integers_of_every_width_and_floats_are_the_same():
  wave = np.round(100 * tones(16_000)) / 128  # exact in 8 bits
  expected = audio.log_mel(wave)
  assert expected.std() > 0.5
  for same in (
    (wave * 128).astype(np.int8),
    (wave * 2**15).astype(np.int16),
    (wave * 2**31).astype(np.int32),
    (wave * 128 + 128).astype(np.uint8),
    wave.astype(np.float32),
    np.stack([wave, wave], axis=1),
    np.stack([2 * wave, np.zeros_like(wave)], axis=1),
  ):
    np.testing.assert_array_equal(audio.log_mel(same), expected)


@pytest.mark.parametrize("sample_rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(sample_rate):
  samples = audio.resample(tones(sample_rate), sample_rate)
  assert samples.shape == (32_000,)
  inside = slice(500, -500)
  np.testing.assert_allclose(samples[inside], tones(16_000)[inside], atol=1e-5)


def test_what_is_above_8_khz_does_not_come_back():
  loud = np.sin(2 * np.pi * 12_000 * np.arange(96_000) / 48_000)
  np.testing.assert_allclose(audio.resample(loud, 48_000)[500:-500], 0, atol=1e-4)


def test_clipped_and_silent_sound():
  clipped = np.clip(8 * tones(16_000), -1, 1)
  assert np.isfinite(audio.log_mel(clipped)).all()
  np.testing.assert_array_equal(audio.log_mel(np.zeros(15_600, np.int16))[0], audio.silence())


def test_fitting_to_the_frames():
  patches = np.arange(3, dtype=np.float32)[:, None, None] + audio.silence()
  for count in (0, 1, 3, 5):
    for mode in ("repeat", "zeros"):
      fitted = audio.fit_patches(patches, count, mode)
      assert fitted.shape == (count, 96, 64)
      assert fitted.dtype == np.float32
      np.testing.assert_array_equal(fitted[:3], patches[:count])
      last = patches[-1] if mode == "repeat" else 0 * patches[-1]
      assert all(np.array_equal(patch, last) for patch in fitted[3:])
  nothing = np.zeros((0, 96, 64), np.float32)
  np.testing.assert_array_equal(audio.fit_patches(nothing, 2)[1], audio.silence())
  assert not audio.fit_patches(nothing, 2, "zeros").any()
  with pytest.raises(UserError, match=r"'repaet'.*Did you mean 'repeat'"):
    audio.fit_patches(patches, 5, "repaet")


@pytest.mark.parametrize(
  ("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", None)]
)
def test_files(tmp_path, suffix, subtype):
  wave = np.round(1000 * tones(44_100)[:, None] * [1, 0.5]) / 2**15
  path = tmp_path / f"a.{suffix}"
  soundfile.write(path, wave, 44_100, subtype=subtype)
  found, sample_rate = audio.read_waveform(path)
  assert (found.dtype, sample_rate) == (np.float32, 44_100)
  np.testing.assert_array_equal(found, wave.astype(np.float32))


def test_files_without_sound(tmp_path):
  empty = tmp_path / "empty.wav"
  soundfile.write(empty, np.zeros(0), 16_000)
  wave, sample_rate = audio.read_waveform(empty)
  assert audio.log_mel(wave, sample_rate).shape == (0, 96, 64)
  broken = tmp_path / "broken.wav"
  for content in (b"", b"no sound at all"):
    broken.write_bytes(content)
    with pytest.raises(UserError, match=rf"broken\.wav cannot be read as sound \({len(content)} b"):
      audio.read_waveform(broken)
  with pytest.raises(UserError, match=r"none\.wav is missing"):
    audio.read_waveform(tmp_path / "none.wav")


@pytest.mark.parametrize(
  ("wave", "message"),
  [
    (np.zeros((2, 16_000)), r"\(2, 16000\); expected \(samples,\)"),
    (np.zeros((1, 2, 3)), "expected"),
    (np.full(10, 12_345.0), "reaches 12345"),
    (np.full(10, np.nan), "reaches nan"),
    (np.zeros(10, complex), "of type complex128"),
  ],
)
def test_what_is_no_waveform(wave, message):
  with pytest.raises(UserError, match=message):
    audio.log_mel(wave)


@pytest.mark.parametrize("sample_rate", [0, -1, 16, float("nan")])
def test_what_is_no_sample_rate(sample_rate):
  with pytest.raises(UserError, match="sample rate"):
    audio.log_mel(np.zeros(100), sample_rate)
