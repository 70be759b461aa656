"""The pictures and the sound of a video file on one clock, in seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from effseg_jax.errors import UserError

# Sound that is this much off its clock is moved; less is rounding of a container's clock.
_SOUND_SLACK = 0.05  # s

# How far one stream may be ahead before the other counts as silent or still. Frames are large;
# and a decoder keeps some back, which are many seconds where there is one a second.
_FRAMES_AHEAD, _SOUND_AHEAD = 1.0, 120.0  # s

# A clock that jumps back by more than this starts anew: recordings that were put together.
_BACKWARDS = 1.0  # s

# A file that ends this much before the length that it states ends early.
_EARLY = 0.5  # s

# FFmpeg's numbers of colour matrices -> the names that PyAV's reformatter has.
_MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020"}
_HIGH_DEFINITION = 720  # rows from which players take unstated colours for BT.709


def describe(path: str | Path, sound: bool) -> tuple[Fraction, tuple[int, int], int, int, float]:
  """Opens a video and looks at its first frame.

  Args:
    path: of the file, or a URL.
    sound: whether it must have sound.

  Returns:
    Frames a second, (rows, cols) upright, sample rate and channels (0 without sound), and the
    duration in seconds, 0 if unknown.

  Raises:
    UserError: if it cannot be opened, has no picture, or lacks a needed sound.
  """
  expected = "a video with sound" if sound else "a video"
  with opened(path, expected) as container:
    video, track = _streams(container)
    if video is None:
      raise UserError(f"{path} has no picture; expected {expected}.")
    if track is None and sound:
      raise UserError(f"{path} has no sound; expected {expected}.")
    rate = Fraction(video.average_rate or video.base_rate or 25)
    duration = float(container.duration or 0) / 1e6
    if "matroska" in container.format.name:  # which counts from 0, wherever the streams begin
      duration = max(duration - _origin([s for s in (video, track) if s is not None]), 0.0)
    try:
      first = next(iter(container.decode(video)), None)
    except av.FFmpegError as error:
      raise UserError(
        f"{path} cannot be decoded ({error.strerror}); expected {expected}."
      ) from None
    if first is None:
      raise UserError(f"{path} has no frame that can be decoded; expected {expected}.")
    rows, cols = first.height, first.width
    size = (cols, rows) if _quarter_turns(first) % 2 else (rows, cols)
    if track is None:
      return rate, size, 0, 0, duration
    channels = 2 if track.codec_context.channels == 2 else 1
    return rate, size, track.codec_context.sample_rate, channels, duration


def seconds(clip: Any, make: Any, notes: list[str]) -> Iterator[Any]:
  """Demultiplexes until both picture and sound of a second are there.

  Args:
    clip: see `clip_reader.Clip`.
    make: of frames, times and a waveform.
    notes: gets a line if the file ends early.
  """
  with opened(clip.path, "a video") as container:
    video, track = _streams(container, with_sound=bool(clip.sample_rate))
    video.thread_type = "AUTO"
    streams = [stream for stream in (video, track) if stream is not None]
    waiting = _Waiting(clip, _origin(streams))
    second = 0
    try:
      for packet in container.demux(*streams):
        for frame in packet.decode():
          if isinstance(frame, av.VideoFrame):
            waiting.add_picture(frame)
          else:
            waiting.add_sound(frame)
        while waiting.complete(second):
          yield make(*waiting.cut(second))
          second += 1
    except av.FFmpegError as error:
      if not waiting.end:
        raise UserError(f"{clip.path} cannot be decoded ({error.strerror}).") from None
      notes.append(f"the file is broken after {waiting.end:.1f} s ({error.strerror})")
  while waiting.remains():
    yield make(*waiting.cut(second))
    second += 1
  if not notes and clip.duration and waiting.end < clip.duration - _EARLY:
    notes.append(f"the file ends at {waiting.end:.1f} of {clip.duration:.1f} s")


class _Waiting:
  """Decoded frames and sound that belong to seconds that are not complete yet."""

  def __init__(self, clip: Any, origin: float):
    self._clip, self._origin = clip, origin
    self._step = 1 / float(clip.rate)
    self._frames: list[tuple[float, np.ndarray]] = []
    self._pieces: list[tuple[int, np.ndarray]] = []  # with the place of the first sample
    self._shifts = [0.0, 0.0]  # of picture and sound, where a file's clock starts anew
    self._last: float | None = None  # time of a frame
    self._heard = 0  # place behind the last sample

  @property
  def end(self) -> float:
    """The end of the decoded part in seconds; 0 if there is none."""
    sound = self._heard / self._clip.sample_rate if self._clip.sample_rate else 0.0
    return max(sound, 0.0 if self._last is None else self._last + self._step)

  def add_picture(self, frame: av.VideoFrame) -> None:
    """Takes a frame; it comes after the last one, however wrong its time is."""
    following = 0.0 if self._last is None else self._last + self._step
    if frame.time is None:
      time = following
    else:
      time = float(frame.time) - self._origin + self._shifts[0]
      if time < following - _BACKWARDS:
        self._shifts[0] += following - time
        time = following
    if self._last is not None and time <= self._last:
      time = self._last + min(self._step, 1e-3)
    self._last = max(time, 0.0)
    self._frames.append((self._last, _upright(frame, self._clip.size)))

  def add_sound(self, frame: av.AudioFrame) -> None:
    """Takes a piece of sound, where its clock says; a gap is silent."""
    rate, samples = self._clip.sample_rate, _samples(frame, self._clip.channels)
    place = self._heard
    if frame.time is not None:
      time = float(frame.time) - self._origin + self._shifts[1]
      if time < self._heard / rate - _BACKWARDS:
        self._shifts[1] += self._heard / rate - time
      elif abs(ahead := round(time * rate) - self._heard) > _SOUND_SLACK * rate or not self._heard:
        place += max(ahead, 0)
        samples = samples[max(-ahead, 0) :]
    if len(samples):
      self._pieces.append((place, samples))
      self._heard = place + len(samples)

  def complete(self, second: int) -> bool:
    """Whether nothing more can come for a second."""
    end, seen = second + 1, self._last or 0.0
    heard = self._heard / self._clip.sample_rate if self._clip.sample_rate else seen
    if seen >= end and heard >= end:
      return True
    return seen >= end + _FRAMES_AHEAD or heard >= end + _SOUND_AHEAD

  def remains(self) -> bool:
    """Whether a frame waits; what sounds after the last one is left out."""
    return bool(self._frames)

  def cut(self, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Takes out a second: frames, their times, and the sound."""
    now = [pair for pair in self._frames if pair[0] < second + 1]
    self._frames = self._frames[len(now) :]
    frames = [picture for _, picture in now]
    empty = np.zeros((0, *self._clip.size, 3), np.uint8)
    times = np.array([time for time, _ in now], np.float64)
    return np.stack(frames) if frames else empty, times, self._cut_sound(second)

  def _cut_sound(self, second: int) -> np.ndarray:
    rate = self._clip.sample_rate
    begin, end = second * rate, (second + 1) * rate
    length = min(max(self._heard - begin, 0), rate)
    sound = np.zeros((length, 2) if self._clip.channels == 2 else length, np.float32)
    waiting = []
    for place, samples in self._pieces:
      first, last = max(place, begin), min(place + len(samples), end)
      if first < last:
        sound[first - begin : last - begin] = samples[first - place : last - place]
      if place + len(samples) > end:
        waiting.append((place, samples))
    self._pieces = waiting
    return sound


def opened(path: str | Path, expected: str) -> Any:
  """Opens a container.

  Raises:
    UserError: if it is none.
  """
  try:
    return av.open(str(path))
  except (av.FFmpegError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path} cannot be opened ({reason}); expected {expected}.") from None


def _streams(container: Any, with_sound: bool = True) -> tuple[Any, Any]:
  """The moving picture, which is not a cover, and the first sound; None where there is none."""
  covers = [stream for stream in container.streams.video if _is_cover(stream)]
  moving = [stream for stream in container.streams.video if stream not in covers]
  video = next(iter([*moving, *covers]), None)
  sounds = [stream for stream in container.streams.audio if stream.codec_context is not None]
  return video, sounds[0] if sounds and with_sound else None


def _is_cover(stream: Any) -> bool:
  return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _origin(streams: list[Any]) -> float:
  """When the first stream begins, in seconds; an encoder's delay before 0 is none."""
  starts = [
    float(stream.start_time * stream.time_base)
    for stream in streams
    if stream.start_time is not None
  ]
  return max(min(starts, default=0.0), 0.0)


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
  """uint8 RGB (rows, cols, 3), turned as its rotation says and scaled to the clip's size."""
  turns = _quarter_turns(frame)
  rows, cols = size[::-1] if turns % 2 else size
  matrix = int(frame.colorspace)
  unstated = "ITU709" if frame.height >= _HIGH_DEFINITION else "ITU601"
  options = {}
  if not frame.format.is_rgb:
    options["src_colorspace"] = _MATRICES.get(matrix, unstated)
  if (frame.height, frame.width) != (rows, cols):
    options |= {"width": cols, "height": rows}
  picture = frame.reformat(format="rgb24", **options).to_ndarray()
  return np.rot90(picture, turns).copy() if turns else picture


def _quarter_turns(frame: av.VideoFrame) -> int:
  """Quarter turns against the clock that make a frame upright."""
  with contextlib.suppress(AttributeError):
    return round(frame.rotation / 90) % 4
  return 0


def _samples(frame: av.AudioFrame, channels: int) -> np.ndarray:
  """A decoded piece of sound: float32 (samples,) or (samples, 2)."""
  values = frame.to_ndarray()
  if not frame.format.is_planar:
    values = values.reshape(-1, frame.layout.nb_channels).T
  if values.dtype.kind == "i":
    values = values / 2.0 ** (8 * values.dtype.itemsize - 1)
  elif values.dtype.kind == "u":
    values = values / 2.0 ** (8 * values.dtype.itemsize - 1) - 1.0
  values = values.astype(np.float32).T
  return values if channels == 2 and values.shape[1] == 2 else _mixed(values, channels)


def _mixed(values: np.ndarray, channels: int) -> np.ndarray:
  mono = values.mean(axis=1)
  return np.stack([mono, mono], axis=1) if channels == 2 else mono
