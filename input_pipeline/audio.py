"""Sound: reading files, and the log-mel patches of VGGish.

The front-end is VGGish's (Hershey et al., ICASSP 2017; the numerics of torchvggish), in float64:
magnitude spectra of 25 ms every 10 ms, 64 mel bands, a natural logarithm, patches of 96 frames.
`effseg_jax.ops.log_mel` is the same function for the device.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError, extra, suggestion

with extra("audio"):
  import soundfile
  import soxr

SAMPLE_RATE = 16_000  # Hz
PATCH_FRAMES, BANDS = 96, 64

_WINDOW, _HOP, _FFT = 400, 160, 512  # samples: 25 ms, 10 ms, and the transform's length
_EDGES = (125.0, 7500.0)  # Hz, of the lowest and the highest band
_OFFSET = 0.01  # added before the logarithm

# Length of a patch and hop to the next one: 0.975 s and 0.96 s.
PATCH_SAMPLES = (PATCH_FRAMES - 1) * _HOP + _WINDOW
PATCH_HOP = PATCH_FRAMES * _HOP

_BLOCK = 8192  # frames transformed at once: an hour of sound would not fit otherwise
_MOST_CHANNELS = 32
_LOUDEST = 16.0  # float files may exceed 1 a little; integers that were not scaled exceed it by far


def read_waveform(path: str | Path) -> tuple[np.ndarray, int]:
  """Reads a sound file (WAV, FLAC, OGG, MP3 and other formats of libsndfile).

  Args:
    path: of the file.

  Returns:
    float32 (samples,) or (samples, channels), integers scaled to [-1, 1) (int16 divided by 32768),
    and the sample rate in Hz. A file without a sample gives an empty array.

  Raises:
    UserError: if the file is missing or is no sound.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path} is missing; expected a sound file.")
  try:
    waveform, sample_rate = soundfile.read(path, dtype="float32")
  except (soundfile.LibsndfileError, RuntimeError) as error:
    reason = str(error).rpartition(": ")[2].rstrip(".")
    raise UserError(
      f"{path} cannot be read as sound ({path.stat().st_size} bytes: {reason}); expected WAV,"
      " FLAC, OGG or MP3."
    ) from None
  return waveform, sample_rate


def to_mono(waveform: np.ndarray) -> np.ndarray:
  """The mean over channels, between -1 and 1.

  Args:
    waveform: (samples,) or (samples, channels); integers of any width, or floating in [-1, 1].

  Returns:
    float64 (samples,).

  Raises:
    UserError: for another shape or dtype, or values that are no samples.
  """
  waveform = np.asarray(waveform)
  if waveform.ndim not in (1, 2) or (waveform.ndim == 2 and waveform.shape[1] > _MOST_CHANNELS):
    raise UserError(
      f"the waveform is {waveform.shape}; expected (samples,) or (samples, channels)."
    )
  kind = waveform.dtype
  if kind.kind == "u":
    middle = 2.0 ** (8 * kind.itemsize - 1)
    waveform = waveform / middle - 1.0
  elif kind.kind == "i":
    waveform = waveform / 2.0 ** (8 * kind.itemsize - 1)
  elif kind.kind == "f":
    waveform = waveform.astype(np.float64)
  else:
    raise UserError(f"the waveform is of type {kind}; expected integers or floating numbers.")
  peak = np.max(np.abs(waveform), initial=0.0)
  if not peak <= _LOUDEST:  # true for NaN
    raise UserError(
      f"the waveform reaches {peak:g}; expected samples in [-1, 1] (integer arrays are scaled here,"
      " so hand them over as integers)."
    )
  return waveform.mean(axis=1) if waveform.ndim == 2 else waveform


def resample(waveform: np.ndarray, sample_rate: float) -> np.ndarray:
  """Resamples mono sound to 16 kHz.

  Args:
    waveform: float64 (samples,).
    sample_rate: in Hz.

  Returns:
    float64 (round(samples * 16000 / sample_rate),).

  Raises:
    UserError: for a sample rate that is none.
  """
  _check_rate(sample_rate)
  if sample_rate == SAMPLE_RATE or not waveform.size:
    return waveform
  return soxr.resample(waveform, sample_rate, SAMPLE_RATE, quality="VHQ")


def log_mel_spectrogram(waveform: np.ndarray, sample_rate: float = SAMPLE_RATE) -> np.ndarray:
  """The log-mel spectrogram, 100 frames a second; frame i begins at 10 i ms.

  Args:
    waveform: see `to_mono`.
    sample_rate: in Hz.

  Returns:
    float64 (frames, 64) with `1 + floor((samples - 400) / 160)` frames at 16 kHz, 0 for less sound.
  """
  return _spectrogram(resample(to_mono(waveform), sample_rate))


def log_mel(waveform: np.ndarray, sample_rate: float = SAMPLE_RATE) -> np.ndarray:
  """The input of VGGish: consecutive log-mel patches of 0.96 s without overlap.

  Args:
    waveform: (samples,) or (samples, channels), see `to_mono`.
    sample_rate: in Hz; other rates than 16 kHz are resampled.

  Returns:
    float32 (n, 96, 64); the remainder at the end is dropped (5 s give 5 patches, 4.7 s give 4, less
    than 0.975 s none: see `fit_patches`).

  Raises:
    UserError: see `to_mono` and `resample`.
  """
  return _patches(log_mel_spectrogram(waveform, sample_rate))


def fit_patches(patches: np.ndarray, count: int, mode: str = "repeat") -> np.ndarray:
  """Makes a clip's patches as many as its frames.

  Args:
    patches: float32 (n, 96, 64).
    count: required number; excess patches are dropped.
    mode: what follows the last patch: "repeat": the same again (S4 and MS3), or silence where there
      is none at all; "zeros": zeros (AVSS).

  Returns:
    float32 (count, 96, 64).

  Raises:
    UserError: for another mode.
  """
  modes = ("repeat", "zeros")
  if mode not in modes:
    raise UserError(
      f"mode is {mode!r}; expected one of {', '.join(modes)}.{suggestion(mode, modes)}"
    )
  patches = patches[:count]
  if mode == "zeros":
    filling = np.zeros(patches.shape[1:], patches.dtype)
  else:
    filling = patches[-1] if len(patches) else silence()
  missing = np.broadcast_to(filling, (count - len(patches), *filling.shape))
  return np.concatenate([patches, missing.astype(patches.dtype)])


def silence() -> np.ndarray:
  """The patch of digital silence, float32 (96, 64)."""
  return np.full((PATCH_FRAMES, BANDS), np.log(_OFFSET), np.float32)


@functools.cache
def mel_matrix() -> np.ndarray:
  """From 257 magnitudes to 64 bands: triangles in mel, not normalised; float64 (257, 64)."""
  mel = lambda hertz: 1127.0 * np.log1p(hertz / 700.0)  # noqa: E731
  edges = np.linspace(*mel(np.asarray(_EDGES)), BANDS + 2)
  lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
  bins = mel(np.linspace(0.0, SAMPLE_RATE / 2, _FFT // 2 + 1))[:, None]
  rising, falling = (bins - lower) / (centre - lower), (upper - bins) / (upper - centre)
  matrix = np.maximum(0.0, np.minimum(rising, falling))
  matrix[0] = 0.0  # the constant is not heard
  return matrix


@functools.cache
def window() -> np.ndarray:
  """The periodic Hann window, float64 (400,)."""
  return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(_WINDOW) / _WINDOW)


def _spectrogram(samples: np.ndarray) -> np.ndarray:
  """Mono at 16 kHz -> float64 (frames, 64)."""
  if len(samples) < _WINDOW:
    return np.zeros((0, BANDS))
  frames = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_HOP]
  blocks = []
  for begin in range(0, len(frames), _BLOCK):
    magnitudes = np.abs(np.fft.rfft(frames[begin : begin + _BLOCK] * window(), _FFT))
    blocks.append(np.log(magnitudes @ mel_matrix() + _OFFSET))
  return np.concatenate(blocks)


def _patches(spectrogram: np.ndarray) -> np.ndarray:
  """(frames, 64) -> float32 (frames // 96, 96, 64)."""
  count = len(spectrogram) // PATCH_FRAMES
  whole = spectrogram[: count * PATCH_FRAMES].astype(np.float32)
  return whole.reshape(count, PATCH_FRAMES, BANDS)


def _check_rate(sample_rate: float) -> None:
  if not 1000 <= sample_rate <= 1_000_000:
    raise UserError(f"the sample rate is {sample_rate}; expected Hz, 16000 or 44100 for example.")
