"""Writing clips: H.264 and AAC in an MP4 file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from effseg_jax.errors import extra

with extra("audio"):
  import av

# Rates that AAC knows; others are resampled to the first one.
_RATES = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)


class ClipWriter:
  """Encodes frames and sound as they come; to be used as a context."""

  def __init__(
    self, path: Path, rate: Fraction, size: tuple[int, int], *, sample_rate: int, channels: int
  ):
    """Creates the file.

    Args:
      path: of the MP4 file.
      rate: frames a second.
      size: rows and columns; an odd last row or column is left out, which H.264 needs.
      sample_rate: of the sound in Hz.
      channels: 1 or 2.
    """
    self._container = av.open(str(path), "w", format="mp4")
    self._video = self._container.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
    self._rows, self._cols = size[0] // 2 * 2, size[1] // 2 * 2
    self._video.height, self._video.width = self._rows, self._cols
    self._video.pix_fmt = "yuv420p"
    self._layout = "stereo" if channels == 2 else "mono"
    self._sample_rate = sample_rate
    rate_of_file = sample_rate if sample_rate in _RATES else _RATES[0]
    self._sound = self._container.add_stream("aac", rate=rate_of_file, layout=self._layout)
    self._samples = 0

  def add(self, frames: np.ndarray, waveform: np.ndarray) -> None:
    """Appends frames, uint8 (n, H, W, 3), and the sound that goes with them."""
    for frame in frames[:, : self._rows, : self._cols]:
      picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
      self._container.mux(self._video.encode(picture))
    if len(waveform):
      packed = np.ascontiguousarray(waveform, np.float32).reshape(1, -1)
      piece = av.AudioFrame.from_ndarray(packed, format="flt", layout=self._layout)
      piece.sample_rate, piece.pts = self._sample_rate, self._samples
      self._samples += len(waveform)
      self._container.mux(self._sound.encode(piece))

  def __enter__(self) -> ClipWriter:
    return self

  def __exit__(self, *error: object) -> None:
    if error[0] is None:
      for stream in (self._video, self._sound):
        self._container.mux(stream.encode(None))
    self._container.close()
