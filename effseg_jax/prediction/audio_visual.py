"""Audio-visual segmentation of clips: what sounds, frame by frame, a second at a time."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio, clip_reader
from effseg_jax.input_pipeline.transforms_audio_visual import resize_each
from effseg_jax.pictures.semantic import tint
from effseg_jax.prediction import tiles
from effseg_jax.prediction.card import AudioVisualSettings, read_settings, read_task
from effseg_jax.prediction.clip_writer import ClipWriter
from effseg_jax.prediction.hearing import SECONDS_OF_TRAINING, Ear
from effseg_jax.prediction.programs import Programs
from effseg_jax.prediction.writing import complete, save_indexed, save_picture
from effseg_jax.weights.bundle import Bundle

# Frames that the network sees at once: enough to keep a device busy, and little memory.
_MOST_FRAMES = 8

# Seconds of the clips of AVSS, whose models tell classes apart.
_SECONDS_OF_CLASSES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class SoundingSecond:
  """What sounds in a second of a clip of H rows and W columns.

  Attributes:
    number: of the second, from 0 on.
    times: float64 (n,), of the frames, in seconds since the clip's beginning.
    frames: uint8 (n, H, W, 3).
    masks: uint8 (n, H, W), 1 where something sounds, or class ids.
    waveform: float32 (samples,) or (samples, 2), the sound of the second.
    classes: the name of each class id; a single name for masks of 0 and 1.
    palette: (red, green, blue), 0 to 255, of each class.
  """

  number: int
  times: np.ndarray
  frames: np.ndarray
  masks: np.ndarray
  waveform: np.ndarray
  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]

  def overlay(self) -> np.ndarray:
    """The frames with what sounds tinted and outlined, uint8 (n, H, W, 3)."""
    colours = _colours(self.classes, self.palette)
    tinted = [tint(*pair, colours) for pair in zip(self.frames, self.masks, strict=True)]
    return np.array(tinted, np.uint8).reshape(self.frames.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipResult:
  """What sounds in a whole clip of H rows and W columns.

  Attributes:
    path: of the clip.
    times: float64 (N,), of the frames, in seconds since the clip's beginning.
    masks: uint8 (N, H, W), 1 where something sounds, or class ids.
    classes: the name of each class id; a single name for masks of 0 and 1.
    palette: (red, green, blue), 0 to 255, of each class.
    notes: what is odd about the clip, a line each.
  """

  path: Path
  times: np.ndarray
  masks: np.ndarray
  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  notes: tuple[str, ...] = ()

  def shares(self) -> dict[str, float]:
    """Share of the frames, 0 to 1, in which each class sounds; those that never do are left out."""
    flat = self.masks.reshape(len(self.masks), -1)
    ids = enumerate(self.classes, start=1) if len(self.classes) == 1 else enumerate(self.classes)
    found = {name: float((flat == k).any(axis=1).mean()) for k, name in ids if k and len(flat)}
    return {name: share for name, share in found.items() if share}

  def overlay(self) -> Iterator[np.ndarray]:
    """The frames with what sounds tinted, uint8 (H, W, 3) each; reads the clip again."""
    colours, number = _colours(self.classes, self.palette), 0
    for second in clip_reader.open_clip(self.path).seconds():
      for frame in second.frames:
        yield tint(frame, self.masks[number], colours)
        number += 1

  def save(self, stem: str | Path) -> list[Path]:
    """Writes `STEM_sounding.mp4`, tinted and with its sound, and `STEM_masks`; returns the paths.

    Args:
      stem: path without suffix, `out/clip` for example.
    """
    clip, number = clip_reader.open_clip(self.path), 0

    def seconds() -> Iterator[SoundingSecond]:
      nonlocal number
      for second in clip.seconds():
        masks = self.masks[number : number + len(second.frames)]
        number += len(masks)
        yield _second(0, second, masks, self)

    return save_clip(clip, seconds(), Path(stem))


class ClipSegmenter:
  """A model that finds what sounds: call it with a clip, or `stream` a clip of any length.

  A frame is shown to the network with the sound of the second in which it lies, see
  `prediction.hearing`.
  """

  def __init__(self, bundle: Bundle, origin: str, scale: Any = None):
    """Puts the weights on the device; see `make_segmenter`."""
    self.task = read_task(bundle.card, origin)
    settings = read_settings(AudioVisualSettings, bundle.card, origin)
    self._size = network_size(settings.size, scale)
    known = _SECONDS_OF_CLASSES if self.task.semantic else SECONDS_OF_TRAINING
    self._seconds = settings.num_frames or known
    self._model, self._variables = bundle.model, jax.device_put(bundle.variables)
    self.programs = Programs()

  @property
  def classes(self) -> tuple[str, ...]:
    """The name of each class id; a single name where nothing is told apart."""
    return tuple(self.task.classes)

  def __call__(self, clips: Any) -> ClipResult | list[ClipResult]:
    """Segments a clip, or a list of them.

    Args:
      clips: the path of a video with sound, or of a folder of frames with one sound file; or a list
        of paths.

    Raises:
      UserError: if a clip cannot be read or has no sound.
    """
    if isinstance(clips, (list, tuple)):
      return [self(clip) for clip in clips]
    notes: list[str] = []
    seconds = list(self._masks_of(_opened(clips), notes))
    times = [second.times for second, _ in seconds]
    masks = [masks for _, masks in seconds]
    if not masks:
      raise UserError(f"{clips} has no frame.")
    joined = np.concatenate(times), np.concatenate(masks)
    return ClipResult(Path(clips), *joined, self.classes, self.task.palette, tuple(notes))

  def stream(self, clip: str | os.PathLike[str]) -> Iterator[SoundingSecond]:
    """Segments a clip a second at a time; only about a second of it is in memory.

    Args:
      clip: path, as in a call.

    Yields:
      Seconds, also those without a frame.

    Raises:
      UserError: if it cannot be read or has no sound.
    """
    return self.segment_seconds(_opened(clip))

  def segment_seconds(
    self, clip: clip_reader.Clip, notes: list[str] | None = None
  ) -> Iterator[SoundingSecond]:
    """`stream` of an opened clip; see `Clip.seconds` for `notes`."""
    for number, (second, masks) in enumerate(self._read(clip, notes)):
      yield _second(number, second, masks, self.task)

  def segment(
    self, frames: np.ndarray, waveform: np.ndarray, rate: float, sample_rate: int
  ) -> np.ndarray:
    """Segments a clip in memory: `segment_second` for each of its seconds, and nothing else.

    Args:
      frames: uint8 (N, H, W, 3).
      waveform: (samples,) or (samples, channels).
      rate: frames a second.
      sample_rate: of the waveform in Hz.

    Returns:
      uint8 (N, H, W), class ids, or 1 where something sounds.
    """
    second = np.floor((np.arange(len(frames)) + 1e-6) / rate).astype(int)
    ear, masks = Ear(sample_rate, self._seconds), []
    for k in range(second[-1] + 1 if len(second) else 0):
      patch = ear(waveform[k * sample_rate : (k + 1) * sample_rate])
      masks.append(self.segment_second(frames[second == k], patch, _chunk(rate)))
    return np.concatenate(masks) if masks else np.zeros(frames.shape[:3], np.uint8)

  def segment_second(
    self, frames: np.ndarray, log_mel: np.ndarray, chunk: int = _MOST_FRAMES
  ) -> np.ndarray:
    """Segments frames by one patch of sound; nothing is remembered between calls.

    Args:
      frames: uint8 (n, H, W, 3).
      log_mel: float32 (96, 64), see `prediction.hearing`.
      chunk: frames that the network sees at once; one program is compiled for each.

    Returns:
      uint8 (n, H, W), class ids, or 1 where something sounds.
    """
    log_mel = np.broadcast_to(log_mel, (1, chunk, audio.PATCH_FRAMES, audio.BANDS))
    program, masks = self.program(chunk), []
    for begin in range(0, len(frames), chunk):
      part = frames[begin : begin + chunk]
      small = np.zeros((1, chunk, *self._size, 3), np.uint8)
      small[0, : len(part)] = resize_each(part, self._size, Image.Resampling.BILINEAR)
      logits = program(self._variables, small, log_mel)[0]
      masks += self._masks(logits, len(part), part.shape[1:3])
    return np.stack(masks) if masks else np.zeros(frames.shape[:3], np.uint8)

  def program(self, chunk: int) -> Callable[..., Any]:
    """Frames and log-mel patches -> logits, float32 (1, chunk, h, w, K)."""

    def run(variables, frames, log_mel):
      batch = {
        "frames": frames,
        "log_mel": log_mel,
        "valid_frames": jnp.ones(frames.shape[:2], jnp.float32),
      }
      return self._model.apply(variables, *self.task.model_inputs(batch), train=False)

    shapes = (
      jax.ShapeDtypeStruct((1, chunk, *self._size, 3), jnp.uint8),
      jax.ShapeDtypeStruct((1, chunk, audio.PATCH_FRAMES, audio.BANDS), jnp.float32),
    )
    return self.programs.get(chunk, run, self._variables, *shapes)

  def save_to(self, path: Path, stem: Path) -> str:
    """Segments a clip from file to file; returns the line to print.

    `STEM_sounding.mp4`, the clip with what sounds tinted, its sound and its times kept; and
    `STEM_masks`, a PNG for each frame, white where it sounds, or class ids with a palette.

    Raises:
      UserError: if the clip cannot be read or has no sound; then nothing is written.
    """
    clip, notes = clip_reader.open_clip(path), []
    self.program(_chunk(clip.rate))  # compiled before the clock starts
    count, sounding, begin = 0, 0, time.perf_counter()

    def counted() -> Iterator[SoundingSecond]:
      nonlocal count, sounding
      for second in self.segment_seconds(clip, notes):
        count += len(second.masks)
        sounding += int(second.masks.any(axis=(1, 2)).sum())
        yield second

    save_clip(clip, counted(), stem)
    seconds = time.perf_counter() - begin
    return "; ".join(
      [
        f"{count} frames in {seconds:.1f} s ({count / seconds:.1f} frames/s from file to file),"
        f" something sounds in {100 * sounding / max(count, 1):.0f}%",
        *notes,
      ]
    )

  def _read(self, clip: clip_reader.Clip, notes: list[str] | None):
    """Pairs of a second and its masks."""
    ear = Ear(clip.sample_rate, self._seconds)
    for second in clip.seconds(notes):
      yield second, self.segment_second(second.frames, ear(second.waveform), _chunk(clip.rate))

  def _masks_of(self, clip: clip_reader.Clip, notes: list[str]):
    """As `_read`, without the frames, of which there is no room for a whole clip."""
    for second, masks in self._read(clip, notes):
      yield dataclasses.replace(second, frames=second.frames[:0]), masks

  def _masks(self, logits: jax.Array, count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """The logits (T, h, w, K) of some frames, read at the frames' size."""
    if self.task.semantic:
      return [tiles.class_map(self.programs, (logits,), row, size)[0] for row in range(count)]
    enlarged = (
      cv2.resize(answer, size[::-1], interpolation=cv2.INTER_LINEAR)
      for answer in np.asarray(logits[:count, ..., 0], np.float32)
    )
    return [(answer > 0).astype(np.uint8) for answer in enlarged]


def save_clip(clip: clip_reader.Clip, seconds: Iterator[SoundingSecond], stem: Path) -> list[Path]:
  """Writes `STEM_sounding.mp4` and `STEM_masks`, both or none; returns the paths."""
  video = stem.with_name(f"{stem.name}_sounding.mp4")
  folder = stem.with_name(f"{stem.name}_masks")
  count = 0
  with complete(folder) as masks, complete(video) as part:
    masks.mkdir()
    with ClipWriter(
      part, clip.rate, clip.size, sample_rate=clip.sample_rate, channels=clip.channels
    ) as writer:
      for second in seconds:
        writer.add(second.overlay(), second.waveform, second.times)
        for mask in second.masks:
          path = masks / f"{count:05d}.png"
          if len(second.classes) > 1:
            save_indexed(mask, second.palette, path)
          else:
            save_picture(255 * mask, path)
          count += 1
    if not count:
      raise UserError(f"{clip.path} has no frame.")
  return [video, folder]


def network_size(saved: tuple[int, int] | None, scale: Any) -> tuple[int, int]:
  """Rows and columns that the network sees.

  Args:
    saved: of the evaluation, if the card says them.
    scale: `"224x224"`, width and height, as text or a pair; None: as evaluated.

  Raises:
    UserError: if the scale cannot be read, or is needed and not given.
  """
  if scale is None:
    if saved is None:
      raise UserError("the checkpoint does not say at which size it sees; give --scale=224x224.")
    return saved
  text = "x".join(map(str, scale)) if isinstance(scale, (tuple, list)) else str(scale)
  frame = re.fullmatch(r"(\d+)x(\d+)", text)
  if not frame or min(map(int, frame.groups())) < 32:
    raise UserError(
      f"--scale is {text!r}; expected WIDTHxHEIGHT such as 224x224, 32 each at least."
    )
  return int(frame[2]), int(frame[1])


def _chunk(rate: float) -> int:
  return max(1, min(math.ceil(rate), _MOST_FRAMES))


def _opened(path: Any) -> clip_reader.Clip:
  if not isinstance(path, (str, os.PathLike)):
    raise UserError(
      f"the clip is a {type(path).__name__}; expected the path of a video with sound, or of a"
      " folder of frames with one sound file."
    )
  return clip_reader.open_clip(path)


def _second(number: int, second: clip_reader.Second, masks: np.ndarray, of: Any) -> SoundingSecond:
  parts = (second.times, second.frames, masks, second.waveform)
  return SoundingSecond(number, *parts, tuple(of.classes), tuple(of.palette))


def _colours(classes: tuple[str, ...], palette: Any) -> np.ndarray:
  """uint8 (n, 3) by value of a mask: what sounds has the only colour, or each class its own."""
  colours = np.asarray(palette, np.uint8)
  return colours if len(classes) > 1 else np.concatenate([np.zeros((1, 3), np.uint8), colours])
