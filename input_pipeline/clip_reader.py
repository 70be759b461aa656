"""Clips from files, second by second: videos with sound, or frames beside a sound file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import audio, codecs

with extra("audio"):
  import av

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Second:
  """A second of a clip.

  Attributes:
    frames: uint8 (n, H, W, 3); there may be none.
    waveform: float32 (samples,) or (samples, channels), its sound; less than a second where the
      sound of the clip ends.
  """

  frames: np.ndarray
  waveform: np.ndarray


@dataclasses.dataclass(frozen=True)
class Clip:
  """An opened clip.

  Attributes:
    path: of the video or the folder.
    rate: frames a second.
    size: rows and columns.
    sample_rate: of the sound in Hz.
    channels: of the sound, 1 or 2.
  """

  path: Path
  rate: Fraction
  size: tuple[int, int]
  sample_rate: int
  channels: int

  def seconds(self) -> Iterator[Second]:
    """Reads the clip from its beginning; only about a second of it is in memory.

    Raises:
      UserError: if it is broken.
    """
    if self.path.is_dir():
      return _seconds_of_folder(self)
    return _seconds_of_video(self)


def is_clip(path: Path) -> bool:
  """Whether a path is a video, or a folder of frames with one sound file."""
  if path.is_file():
    return path.suffix.lower() in VIDEO_SUFFIXES
  return path.is_dir() and bool(_frames_in(path)) and len(_with_suffix(path, SOUND_SUFFIXES)) == 1


def open_clip(path: str | Path) -> Clip:
  """Opens a video with sound, or a folder of frames (perhaps in `frames`) and one sound file.

  In a folder the frames are spread evenly over the sound: five frames and five seconds, as in
  AVSBench, are one frame a second.

  Raises:
    UserError: for a video that cannot be decoded or has no sound, or a folder without frames or
      without exactly one sound file.
  """
  path = Path(path)
  if path.is_dir():
    return _open_folder(path)
  if not path.is_file():
    raise UserError(f"{path} is missing; expected a video with sound.")
  with _container(path) as container:
    if not container.streams.video:
      raise UserError(f"{path} has no picture; expected a video with sound.")
    if not container.streams.audio:
      raise UserError(f"{path} has no sound; expected a video with sound.")
    video, sound = container.streams.video[0], container.streams.audio[0]
    rate = Fraction(video.average_rate or video.base_rate or 25)
    channels = 2 if sound.codec_context.channels == 2 else 1
    size = (video.codec_context.height, video.codec_context.width)
    return Clip(path, rate, size, sound.codec_context.sample_rate, channels)


def _open_folder(path: Path) -> Clip:
  frames, sounds = _frames_in(path), _with_suffix(path, SOUND_SUFFIXES)
  if not frames:
    raise UserError(f"{path} holds no frame ({', '.join(_PICTURE_SUFFIXES)}).")
  if len(sounds) != 1:
    raise UserError(
      f"{path} holds {len(sounds)} sound files; expected one beside the frames"
      f" ({', '.join(SOUND_SUFFIXES)})."
    )
  waveform, sample_rate = audio.read_waveform(sounds[0])
  duration = len(waveform) / sample_rate
  rate = max(Fraction(round(len(frames) / duration)), Fraction(1)) if duration else Fraction(1)
  channels = 2 if waveform.ndim == 2 and waveform.shape[1] == 2 else 1
  return Clip(path, rate, codecs.image_size(frames[0]), sample_rate, channels)


def _seconds_of_folder(clip: Clip) -> Iterator[Second]:
  paths = _frames_in(clip.path)
  waveform, sample_rate = audio.read_waveform(_with_suffix(clip.path, SOUND_SUFFIXES)[0])
  waveform = _mono_or_stereo(waveform)
  per_second = int(clip.rate)
  for k in range(-(-len(paths) // per_second)):
    frames = []
    for path in paths[k * per_second : (k + 1) * per_second]:
      frames.append(codecs.read_image(path))
      if frames[-1].shape[:2] != clip.size:
        rows, cols = frames[-1].shape[:2]
        raise UserError(
          f"{path} is {rows}x{cols} and {paths[0]} is {clip.size[0]}x{clip.size[1]}; expected the"
          " same size within a clip."
        )
    yield Second(np.stack(frames), waveform[k * sample_rate : (k + 1) * sample_rate])


def _seconds_of_video(clip: Clip) -> Iterator[Second]:
  """Demultiplexes until both picture and sound of a second are there."""
  frames: list[tuple[float, np.ndarray]] = []
  pieces: list[np.ndarray] = []
  heard, seen, second = 0, 0.0, 0

  def cut() -> Second:
    """Takes the second `second` out of what is waiting."""
    now = [picture for time, picture in frames if time < second + 1]
    frames[:] = [(time, picture) for time, picture in frames if time >= second + 1]
    sound = np.concatenate(pieces) if pieces else _no_sound(clip.channels)
    pieces[:] = [sound[clip.sample_rate :]]
    empty = np.zeros((0, *clip.size, 3), np.uint8)
    return Second(np.stack(now) if now else empty, sound[: clip.sample_rate])

  with _container(clip.path) as container:
    streams = container.streams.video[0], container.streams.audio[0]
    streams[0].thread_type = "AUTO"
    try:
      for packet in container.demux(*streams):
        for frame in packet.decode():
          if isinstance(frame, av.VideoFrame):
            time = float(frame.time or 0.0)
            seen = max(seen, time)
            frames.append((time, frame.to_ndarray(format="rgb24")))
          else:
            pieces.append(_samples(frame, clip.channels))
            heard += len(pieces[-1])
        while seen >= second + 1 and heard >= (second + 1) * clip.sample_rate:
          yield cut()
          second += 1
    except av.FFmpegError as error:
      raise UserError(f"{clip.path} is broken after {second} s ({error.strerror}).") from None
  while frames:
    yield cut()
    second += 1


def _samples(frame: Any, channels: int) -> np.ndarray:
  """A decoded piece of sound: float32 (samples,) or (samples, 2)."""
  values = frame.to_ndarray()
  if not frame.format.is_planar:
    values = values.reshape(-1, frame.layout.nb_channels).T
  if values.dtype.kind == "i":
    values = values / 2.0 ** (8 * values.dtype.itemsize - 1)
  elif values.dtype.kind == "u":
    values = values / 2.0 ** (8 * values.dtype.itemsize - 1) - 1.0
  values = values.astype(np.float32).T
  return values if channels == 2 else values.mean(axis=1)


def _mono_or_stereo(waveform: np.ndarray) -> np.ndarray:
  if waveform.ndim == 2 and waveform.shape[1] != 2:
    return waveform.mean(axis=1)
  return waveform


def _no_sound(channels: int) -> np.ndarray:
  return np.zeros((0, 2) if channels == 2 else 0, np.float32)


def _container(path: Path) -> Any:
  try:
    return av.open(str(path))
  except (av.FFmpegError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path} cannot be opened ({reason}); expected a video with sound.") from None


def _frames_in(folder: Path) -> list[Path]:
  """The pictures of a folder or of `frames` in it; frame_10 comes after frame_9."""
  found = _with_suffix(folder, _PICTURE_SUFFIXES)
  if not found and (folder / "frames").is_dir():
    found = _with_suffix(folder / "frames", _PICTURE_SUFFIXES)

  def order(path: Path) -> list[Any]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdigit() else part for part in parts]

  return sorted(found, key=order)


def _with_suffix(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
  return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
