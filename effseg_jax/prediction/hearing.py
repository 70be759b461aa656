"""What an audio-visual model hears with the frames of a second: the patch of its training.

VGGish's patches of 0.96 s follow one another without a gap, and training pairs patch k with second
k of a clip: it begins at 0.96 k s, a little before the second. Clips of training have five seconds
(S4, MS3) or ten (AVSS); a longer clip is heard as clips of that length, one after the other, so
that sound and picture never drift apart by more.
"""

from __future__ import annotations

import numpy as np

from effseg_jax.input_pipeline import audio

SECONDS_OF_TRAINING = 5


def hear(
  waveform: np.ndarray, sample_rate: int, before: np.ndarray | None = None, number: int = 0
) -> np.ndarray:
  """The log-mel patch of a second.

  Args:
    waveform: (samples,) or (samples, channels), the second's sound; a shorter one is continued with
      silence.
    sample_rate: in Hz.
    before: the second before it, for all but the first second of a clip.
    number: of the second in its clip of training, from 0 on; 24 at most.

  Returns:
    float32 (96, 64).
  """
  waveform = _second(waveform, sample_rate)
  if not number:
    return audio.fit_patches(audio.log_mel(waveform, sample_rate), 1)[0]
  before = np.zeros_like(waveform) if before is None else _second(before, sample_rate)
  both = audio.resample(audio.to_mono(np.concatenate([before, waveform])), sample_rate)
  begin = audio.SAMPLE_RATE - number * (audio.SAMPLE_RATE - audio.PATCH_HOP)
  patch = both[begin : begin + audio.PATCH_SAMPLES]
  return audio.fit_patches(audio.log_mel(patch), 1)[0]


class Ear:
  """`hear` for the seconds of a clip, one after the other."""

  def __init__(self, sample_rate: int, seconds: int = SECONDS_OF_TRAINING):
    """Starts at a clip's beginning.

    Args:
      sample_rate: of the clip in Hz.
      seconds: of the clips of training.
    """
    self._sample_rate, self._seconds = sample_rate, max(seconds, 1)
    self._number, self._before = 0, None

  def __call__(self, waveform: np.ndarray) -> np.ndarray:
    """The patch of the next second, float32 (96, 64)."""
    number = self._number % self._seconds
    patch = hear(waveform, self._sample_rate, self._before, number)
    self._number, self._before = self._number + 1, waveform
    return patch


def _second(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
  """Exactly a second, silence added or the rest left out."""
  waveform = np.asarray(waveform)[:sample_rate]
  missing = sample_rate - len(waveform)
  return np.pad(waveform, ((0, missing), *((0, 0),) * (waveform.ndim - 1)))
