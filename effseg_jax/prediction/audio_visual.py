"""Audio-visual segmentation of clips: what sounds, tinted frame by frame."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio, clip_reader
from effseg_jax.prediction.clip_writer import ClipWriter
from effseg_jax.tasks.audio_visual import AudioVisualTask
from effseg_jax.weights.bundle import Bundle

# Frames that the network sees at once: enough to keep a device busy, and little memory.
_MOST_FRAMES = 8
_OPACITY = 0.5


class AudioVisualPredictor:
  """Segments clips second by second, so that a clip may be of any length, or live.

  For each clip: `STEM_sounding.mp4`, the clip with what sounds tinted, its sound kept; and the
  folder `STEM_masks` with a PNG for each frame, white where it sounds, or class ids with a palette.

  A frame is shown to the network with the sound of the second it lies in.
  """

  def __init__(self, bundle: Bundle, scale: str | None = None):
    """Puts the weights on the device.

    Args:
      bundle: of an audio-visual model.
      scale: the size at which the network sees frames, `"224x224"`; None: as it was evaluated.
    """
    self.task = audio_visual_task(bundle)
    self._size = network_size(bundle, scale)
    self._model, self._variables = bundle.model, jax.device_put(bundle.variables)
    self._programs: dict[int, Callable] = {}

  def inputs(self, source: Path) -> list[Path]:
    """The clip, or the clips of a folder: videos, and folders of frames with a sound file."""
    if source.is_file() or clip_reader.is_clip(source):
      return [source]
    found = sorted(path for path in source.iterdir() if clip_reader.is_clip(path))
    if not found:
      raise UserError(
        f"{source} holds no clip: no video ({', '.join(clip_reader.VIDEO_SUFFIXES)}), no frames"
        f" with one sound file ({', '.join(clip_reader.SOUND_SUFFIXES)})."
      )
    return found

  def __call__(self, path: Path, stem: Path) -> str:
    """Writes `STEM_sounding.mp4` and `STEM_masks`; returns how much sounds, and the speed.

    Raises:
      UserError: if the clip cannot be read or has no sound.
    """
    clip = clip_reader.open_clip(path)
    self._program(self._chunk(clip.rate))  # compiled before the clock starts
    folder = stem.with_name(f"{stem.name}_masks")
    folder.mkdir(parents=True, exist_ok=True)
    count, sounding, begin = 0, 0, time.perf_counter()
    with ClipWriter(
      stem.with_name(f"{stem.name}_sounding.mp4"),
      clip.rate,
      clip.size,
      sample_rate=clip.sample_rate,
      channels=clip.channels,
    ) as writer:
      for second in clip.seconds():
        masks = self.segment_second(
          second.frames, second.waveform, clip.sample_rate, self._chunk(clip.rate)
        )
        tinted = [self._tint(*pair) for pair in zip(second.frames, masks, strict=True)]
        writer.add(np.array(tinted).reshape(-1, *clip.size, 3), second.waveform)
        for mask in masks:
          self._write_mask(mask, folder / f"{count:05d}.png")
          count += 1
          sounding += bool(mask.any())
    seconds = time.perf_counter() - begin
    return (
      f"{count} frames in {seconds:.1f} s ({count / seconds:.1f} frames/s from file to file),"
      f" something sounds in {100 * sounding / max(count, 1):.0f}%"
    )

  def segment(
    self, frames: np.ndarray, waveform: np.ndarray, rate: float, sample_rate: int
  ) -> np.ndarray:
    """Segments a whole clip: `segment_second` for each of its seconds, and nothing else.

    Args:
      frames: uint8 (N, H, W, 3).
      waveform: (samples,) or (samples, channels).
      rate: frames a second.
      sample_rate: of the waveform in Hz.

    Returns:
      uint8 (N, H, W), class ids, or 1 where something sounds.
    """
    second = np.floor((np.arange(len(frames)) + 1e-6) / rate).astype(int)
    masks = [
      self.segment_second(
        frames[second == k],
        waveform[k * sample_rate : (k + 1) * sample_rate],
        sample_rate,
        self._chunk(rate),
      )
      for k in range(second[-1] + 1 if len(second) else 0)
    ]
    return np.concatenate(masks) if masks else np.zeros(frames.shape[:3], np.uint8)

  def segment_second(
    self, frames: np.ndarray, waveform: np.ndarray, sample_rate: int, chunk: int = _MOST_FRAMES
  ) -> np.ndarray:
    """Segments the frames of one second by its sound; nothing is remembered between calls.

    Args:
      frames: uint8 (n, H, W, 3).
      waveform: (samples,) or (samples, channels), at most a second; what is missing is silence.
      sample_rate: in Hz.
      chunk: frames that the network sees at once; one program is compiled for each.

    Returns:
      uint8 (n, H, W), class ids, or 1 where something sounds.
    """
    log_mel = np.broadcast_to(
      hear(waveform, sample_rate), (1, chunk, audio.PATCH_FRAMES, audio.BANDS)
    )
    program, masks = self._program(chunk), []
    for begin in range(0, len(frames), chunk):
      part = frames[begin : begin + chunk]
      small = np.zeros((1, chunk, *self._size, 3), np.uint8)
      for k, frame in enumerate(part):
        small[0, k] = cv2.resize(frame, self._size[::-1], interpolation=cv2.INTER_LINEAR)
      found = np.asarray(program(self._variables, small, log_mel))[0, : len(part)]
      masks += [self._enlarge(answer, part.shape[1:3]) for answer in found]
    return np.stack(masks) if masks else np.zeros(frames.shape[:3], np.uint8)

  def _chunk(self, rate: float) -> int:
    return max(1, min(math.ceil(rate), _MOST_FRAMES))

  def _program(self, chunk: int) -> Callable:
    """Frames and log-mel patches -> logits of what sounds, or class ids."""
    if chunk not in self._programs:

      def run(variables, frames, log_mel):
        batch = {
          "frames": frames,
          "log_mel": log_mel,
          "valid_frames": jnp.ones(frames.shape[:2], jnp.float32),
        }
        logits = self._model.apply(variables, *self.task.model_inputs(batch), train=False)
        return jnp.argmax(logits, -1).astype(jnp.uint8) if self.task.semantic else logits[..., 0]

      shapes = (
        jax.ShapeDtypeStruct((1, chunk, *self._size, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1, chunk, audio.PATCH_FRAMES, audio.BANDS), jnp.float32),
      )
      self._programs[chunk] = jax.jit(run).lower(self._variables, *shapes).compile()
    return self._programs[chunk]

  def _enlarge(self, answer: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The network's answer at the frame's size: logits bilinear, ids nearest."""
    if self.task.semantic:
      return cv2.resize(answer, size[::-1], interpolation=cv2.INTER_NEAREST)
    logits = cv2.resize(answer, size[::-1], interpolation=cv2.INTER_LINEAR)
    return (logits > 0).astype(np.uint8)

  def _tint(self, frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Colours what sounds and draws its outline."""
    tinted = frame.copy()
    for index in np.unique(mask[mask > 0]):
      inside = mask == index
      colour = np.array(self._colour(index), np.float32)
      tinted[inside] = (frame[inside] * (1 - _OPACITY) + colour * _OPACITY).astype(np.uint8)
      outlines, _ = cv2.findContours(
        inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
      )
      cv2.drawContours(tinted, outlines, -1, self._colour(index), max(1, min(mask.shape) // 200))
    return tinted

  def _colour(self, index: int) -> tuple[int, int, int]:
    """Class ids have their colour, and what sounds has the only one."""
    return tuple(self.task.palette[index if self.task.semantic else 0])

  def _write_mask(self, mask: np.ndarray, path: Path) -> None:
    picture = Image.fromarray(mask if self.task.semantic else 255 * mask)
    if self.task.semantic:
      picture.putpalette(np.asarray(self.task.palette, np.uint8).tobytes())
    picture.save(path)


def hear(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
  """The log-mel patch of a second: float32 (96, 64); a shorter one is continued with silence."""
  missing = sample_rate - len(waveform)
  if missing > 0:
    waveform = np.pad(waveform, ((0, missing), *((0, 0),) * (waveform.ndim - 1)))
  return audio.fit_patches(audio.log_mel(waveform, sample_rate), 1)[0]


def audio_visual_task(bundle: Bundle) -> AudioVisualTask:
  """The task that a bundle's card describes."""
  known = {field.name for field in dataclasses.fields(AudioVisualTask)}
  fields = {key: value for key, value in bundle.card["task"].items() if key in known}
  fields["palette"] = tuple(tuple(colour) for colour in fields["palette"])
  return AudioVisualTask(
    **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
  )


def network_size(bundle: Bundle, scale: str | None) -> tuple[int, int]:
  """Rows and columns that the network sees.

  Raises:
    UserError: if the scale cannot be read, or is needed and not given.
  """
  if scale is None:
    saved = (bundle.card.get("inference") or {}).get("size")
    if saved is None:
      raise UserError("the checkpoint does not say at which size it sees; give --scale=224x224.")
    return int(saved[0]), int(saved[1])
  frame = re.fullmatch(r"(\d+)x(\d+)", scale)
  if not frame or min(map(int, frame.groups())) < 32:
    raise UserError(
      f"--scale is {scale!r}; expected WIDTHxHEIGHT such as 224x224, 32 each at least."
    )
  return int(frame[2]), int(frame[1])
