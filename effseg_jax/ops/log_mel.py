"""VGGish's log-mel front-end on the device, so that waveform to mask is one compiled call."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

_SAMPLE_RATE = 16_000  # Hz
_WINDOW, _HOP, _FFT = 400, 160, 512  # samples
_BANDS, _PATCH_FRAMES = 64, 96


def log_mel(waveform: jax.Array) -> jax.Array:
  """Log-mel patches of 0.96 s: `input_pipeline.audio.log_mel` in float32 (equal to 1e-4).

  Hershey et al., ICASSP 2017: Hann windows of 25 ms every 10 ms, magnitudes of a transform of
  length 512, 64 mel bands from 125 to 7500 Hz, `log(mel + 0.01)`.

  Args:
    waveform: (..., samples) floating, mono at 16 kHz, between -1 and 1.

  Returns:
    float32 (..., n, 96, 64) with `n = floor((1 + floor((samples - 400) / 160)) / 96)`; what is left
    at the end is dropped.
  """
  samples = waveform.shape[-1]
  count = max(0, (1 + (samples - _WINDOW) // _HOP) // _PATCH_FRAMES)
  lead = waveform.shape[:-1]
  if not count:
    return jnp.zeros((*lead, 0, _PATCH_FRAMES, _BANDS), jnp.float32)
  frames = count * _PATCH_FRAMES
  # A window is two and a half hops: slices of the hops instead of a gather.
  hops = waveform.astype(jnp.float32)[..., : min(samples, (frames + 2) * _HOP)]
  hops = jnp.pad(hops, [(0, 0)] * len(lead) + [(0, (frames + 2) * _HOP - hops.shape[-1])])
  hops = hops.reshape(*lead, frames + 2, _HOP)
  rest = _WINDOW - 2 * _HOP
  windows = [hops[..., :-2, :], hops[..., 1:-1, :], hops[..., 2:, :rest]]
  windows = jnp.concatenate(windows, axis=-1) * jnp.asarray(hann_window(), jnp.float32)
  magnitudes = jnp.abs(jnp.fft.rfft(windows, _FFT))
  mel = jnp.matmul(
    magnitudes, jnp.asarray(mel_matrix(), jnp.float32), precision=jax.lax.Precision.HIGHEST
  )
  return jnp.log(mel + 0.01).reshape(*lead, count, _PATCH_FRAMES, _BANDS)


@functools.cache
def hann_window() -> np.ndarray:
  """The periodic Hann window, float64 (400,)."""
  return np.square(np.sin(np.pi * np.arange(_WINDOW) / _WINDOW))


@functools.cache
def mel_matrix() -> np.ndarray:
  """From 257 magnitudes to 64 bands, float64 (257, 64): triangles in mel, not normalised."""
  mel = lambda hertz: 1127.0 * np.log1p(hertz / 700.0)  # noqa: E731
  edges = np.linspace(mel(125.0), mel(7500.0), _BANDS + 2)
  bins = mel(np.linspace(0.0, _SAMPLE_RATE / 2, _FFT // 2 + 1))
  width = edges[1] - edges[0]  # all bands are equally wide in mel
  matrix = np.maximum(0.0, 1.0 - np.abs(bins[:, None] - edges[1:-1]) / width)
  matrix[0] = 0.0
  return matrix
