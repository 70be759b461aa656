"""Clips from files, second by second: videos, or frames beside a sound file.

Frames are upright, have one size, and keep their times; time 0 is where the first of picture and
sound begins. Seconds without a frame or without sound are read as such.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import codecs

VIDEO_SUFFIXES = (
  *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"),
  *(".ts", ".mts", ".m2ts", ".3gp", ".wmv", ".mpg", ".mpeg", ".flv", ".ogv"),
)
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Second:
  """A second of a clip.

  Attributes:
    frames: uint8 (n, H, W, 3); there may be none.
    times: float64 (n,), seconds since the beginning of the clip, increasing.
    waveform: float32 (samples,) or (samples, channels), its sound; less than a second where the
      sound of the clip ends.
  """

  frames: np.ndarray
  times: np.ndarray
  waveform: np.ndarray


@dataclasses.dataclass(frozen=True)
class Clip:
  """An opened clip.

  Attributes:
    path: of the video or the folder.
    rate: frames a second, on average.
    size: rows and columns, upright.
    sample_rate: of the sound in Hz; 0 without sound.
    channels: of the sound, 1 or 2; 0 without sound.
    duration: in seconds, as the file states it; 0 if it does not.
  """

  path: Path
  rate: Fraction
  size: tuple[int, int]
  sample_rate: int
  channels: int
  duration: float = 0.0

  def seconds(self, notes: list[str] | None = None) -> Iterator[Second]:
    """Reads the clip from its beginning; only a few seconds of it are in memory.

    Args:
      notes: irregularities of the clip are added here, a line each, for example an early end.

    Raises:
      UserError: if nothing of it can be read.
    """
    notes = [] if notes is None else notes
    if self.path.is_dir():
      return _seconds_of_folder(self)
    return _streams().seconds(self, Second, notes)


def is_clip(path: Path) -> bool:
  """Whether a path is a video, or a folder of frames with one sound file."""
  if path.is_file():
    return path.suffix.lower() in VIDEO_SUFFIXES
  return path.is_dir() and bool(_frames_in(path)) and len(_with_suffix(path, SOUND_SUFFIXES)) == 1


def open_clip(path: str | Path, *, sound: bool = True) -> Clip:
  """Opens a video, or a folder of frames (perhaps in `frames`) and one sound file.

  In a folder the frames are spread evenly over the sound: five frames and five seconds, as in
  AVSBench, are one frame a second, at 0, 1, 2, 3 and 4 s.

  Args:
    path: of the video or the folder; a video may be a URL.
    sound: whether it must have sound.

  Raises:
    UserError: for a video that cannot be decoded or lacks a needed sound, or a folder without
      frames or without exactly one sound file.
  """
  if isinstance(path, str) and re.match(r"\w+://", path):
    return Clip(path, *_streams().describe(path, sound))
  path = Path(path)
  if path.is_dir():
    return _open_folder(path)
  if not path.is_file():
    raise UserError(f"{path} is missing; expected a video{' with sound' if sound else ''}.")
  return Clip(path, *_streams().describe(path, sound))


def _open_folder(path: Path) -> Clip:
  frames, sounds = _frames_in(path), _with_suffix(path, SOUND_SUFFIXES)
  if not frames:
    raise UserError(f"{path} holds no frame ({', '.join(_PICTURE_SUFFIXES)}).")
  if len(sounds) != 1:
    raise UserError(
      f"{path} holds {len(sounds)} sound files; expected one beside the frames"
      f" ({', '.join(SOUND_SUFFIXES)})."
    )
  with _sound_file(sounds[0]) as file:
    samples, sample_rate = file.frames, file.samplerate
    channels = 2 if file.channels == 2 else 1
  rate = Fraction(len(frames) * sample_rate, samples) if samples else Fraction(1)
  duration = samples / sample_rate
  return Clip(path, rate, codecs.image_size(frames[0]), sample_rate, channels, duration)


def _seconds_of_folder(clip: Clip) -> Iterator[Second]:
  paths = _frames_in(clip.path)
  times = [Fraction(k) / clip.rate for k in range(len(paths))]
  with _sound_file(_with_suffix(clip.path, SOUND_SUFFIXES)[0]) as file:
    # A clip without a sample of sound still has its frames, one a second.
    for k in range(max(int(times[-1]) + 1, -(-file.frames // file.samplerate))):
      here = [i for i, time in enumerate(times) if k <= time < k + 1]
      frames = [_frame(paths[i], clip.size, paths[0]) for i in here]
      waveform = file.read(clip.sample_rate, dtype="float32")
      if waveform.ndim == 2 and waveform.shape[1] != 2:
        waveform = waveform.mean(axis=1)
      yield Second(
        np.stack(frames) if frames else np.zeros((0, *clip.size, 3), np.uint8),
        np.array([float(times[i]) for i in here]),
        waveform,
      )


def _frame(path: Path, size: tuple[int, int], first: Path) -> np.ndarray:
  frame = codecs.read_image(path)
  if frame.shape[:2] != size:
    rows, cols = frame.shape[:2]
    raise UserError(
      f"{path} is {rows}x{cols} and {first} is {size[0]}x{size[1]}; expected the same size within"
      " a clip."
    )
  return frame


def _streams() -> Any:
  """The module that reads videos, which needs PyAV."""
  with extra("audio"):
    from effseg_jax.input_pipeline import video_streams
  return video_streams


def _sound_file(path: Path) -> Any:
  with extra("audio"):
    import soundfile
  try:
    return soundfile.SoundFile(path)
  except (soundfile.LibsndfileError, RuntimeError) as error:
    reason = str(error).rpartition(": ")[2].rstrip(".")
    raise UserError(
      f"{path} cannot be read as sound ({reason}); expected WAV, FLAC, OGG or MP3."
    ) from None


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
  return sorted(
    path
    for path in folder.iterdir()
    if path.suffix.lower() in suffixes and not codecs.is_hidden(path)
  )
