"""Writing clips: H.264, and AAC where there is sound, in an MP4 file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError, extra

with extra("audio"):
  import av

# Rates that AAC knows; others are resampled to the first one.
_RATES = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)

_CLOCK = 90_000  # ticks a second, the clock of MPEG


class ClipWriter:
  """Encodes frames and sound as they come; to be used as a context."""

  def __init__(
    self,
    path: Path,
    rate: Fraction,
    size: tuple[int, int],
    *,
    sample_rate: int = 0,
    channels: int = 0,
  ):
    """Creates the file.

    Args:
      path: of the MP4 file.
      rate: frames a second, for those that come without times.
      size: rows and columns; an odd last row or column is left out, which H.264 needs.
      sample_rate: of the sound in Hz; 0: there is none.
      channels: 1 or 2.
    """
    self._path = path
    self._container = av.open(str(path), "w", format="mp4")
    rate = min(max(Fraction(rate), Fraction(1, 100)), Fraction(1000)).limit_denominator(1001)
    self._video = self._container.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
    self._rows, self._cols = max(size[0] // 2 * 2, 2), max(size[1] // 2 * 2, 2)
    self._video.height, self._video.width = self._rows, self._cols
    self._video.pix_fmt = "yuv420p"
    self._video.codec_context.time_base = Fraction(1, _CLOCK)
    self._rate, self._last = rate, None
    self._sound = None
    if sample_rate:
      self._layout = "stereo" if channels == 2 else "mono"
      self._sample_rate = sample_rate
      rate_of_file = sample_rate if sample_rate in _RATES else _RATES[0]
      self._sound = self._container.add_stream("aac", rate=rate_of_file, layout=self._layout)
    self._samples = 0

  def add(
    self, frames: np.ndarray, waveform: np.ndarray | None = None, times: Sequence[float] = ()
  ) -> None:
    """Appends frames and the sound that goes with them.

    Args:
      frames: uint8 (n, H, W, 3).
      waveform: float32 (samples,) or (samples, 2).
      times: of the frames in seconds, increasing; without them one follows the other evenly.

    Raises:
      UserError: if they cannot be encoded or written.
    """
    with self._errors():
      for k, frame in enumerate(frames):
        # A picture of a single row or column is doubled: H.264 has even sides.
        part = np.pad(frame, ((0, 1), (0, 1), (0, 0)), mode="edge")[: self._rows, : self._cols]
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(part), format="rgb24")
        following = 0 if self._last is None else self._last + round(_CLOCK / self._rate)
        tick = round(_CLOCK * times[k]) if len(times) else following
        if self._last is not None:
          tick = max(tick, self._last + 1)
        picture.pts, picture.time_base, self._last = tick, Fraction(1, _CLOCK), tick
        self._container.mux(self._video.encode(picture))
      if self._sound is not None and waveform is not None and len(waveform):
        packed = np.ascontiguousarray(waveform, np.float32).reshape(1, -1)
        piece = av.AudioFrame.from_ndarray(packed, format="flt", layout=self._layout)
        piece.sample_rate, piece.pts = self._sample_rate, self._samples
        piece.time_base = Fraction(1, self._sample_rate)
        self._samples += len(waveform)
        self._container.mux(self._sound.encode(piece))

  def __enter__(self) -> ClipWriter:
    return self

  def __exit__(self, *error: object) -> None:
    try:
      if error[0] is None:
        with self._errors():
          for stream in (self._video, self._sound):
            if stream is not None:
              self._container.mux(stream.encode(None))
    finally:
      with contextlib.suppress(av.FFmpegError):
        self._container.close()

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except av.FFmpegError as error:
      raise UserError(f"{self._path} cannot be written ({error.strerror}).") from error
