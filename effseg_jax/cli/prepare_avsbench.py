"""Extracts frames and sounds from AVSBench's raw videos in its official layout.

  effseg prepare_avsbench --subset=s4 --root=data/AVSBench/Single-source

For clips of S4 and MS3 if you have their videos but not their frames. Masks and metadata come with
the benchmark. Reads `s4_data/raw_videos/<split>/<category>/<name>.mp4` and
`ms3_data/raw_videos/<video>.mp4`; writes the frames and sounds of docs/datasets.md. Existing files
are kept, so an interrupted call resumes. AVSS is distributed as frames.

The rule is the benchmark's: of sixteen moments in each of five seconds the last one, resized to
224x224; the sound of these seconds at 16 kHz.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from absl import flags
from PIL import Image

from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import audio, clip_reader

with extra("audio"):
  import soundfile

SECONDS = 5
SIZE = (224, 224)


@dataclasses.dataclass(frozen=True)
class Task:
  """The outputs of a video.

  Attributes:
    video: to read.
    frames: pictures to write, one a second.
    sound: to write; it comes last, so where it is, all is done.
  """

  video: Path
  frames: tuple[Path, ...]
  sound: Path


def tasks(root: Path, subset: str) -> list[Task]:
  """The clips of a subset's metadata.

  Raises:
    UserError: if the metadata are missing, or a row is too short.
  """
  path = root / f"{subset}_meta_data.csv"
  if not path.is_file():
    raise UserError(f"{path} is missing; expected the metadata of {subset} in --root.")
  with path.open(newline="", encoding="utf-8-sig") as lines:
    rows = [[value.strip() for value in row] for row in csv.reader(lines) if row][1:]
  columns = 4 if subset == "s4" else 2
  for row in rows:
    if len(row) < columns:
      raise UserError(f"{path}: {row} has {len(row)} columns; expected {columns} at least.")
  if subset == "s4":
    return [_s4(root, row[0], row[2], row[3]) for row in rows]
  return [_ms3(root, row[0], row[1]) for row in rows]


def _s4(root: Path, name: str, category: str, split: str) -> Task:
  below = Path(split) / category
  frames = root / "s4_data" / "visual_frames" / below / name
  return Task(
    root / "s4_data" / "raw_videos" / below / f"{name}.mp4",
    tuple(frames / f"{name}_{k + 1}.png" for k in range(SECONDS)),
    root / "s4_data" / "audio_wav" / below / f"{name}.wav",
  )


def _ms3(root: Path, name: str, split: str) -> Task:
  frames = root / "ms3_data" / "visual_frames" / name
  return Task(
    root / "ms3_data" / "raw_videos" / f"{name}.mp4",
    tuple(frames / f"{name}.mp4_{k + 1}.png" for k in range(SECONDS)),
    root / "ms3_data" / "audio_wav" / split / f"{name}.wav",
  )


def frame_indices(rate: Fraction) -> list[int]:
  """Which frames of a video represent its seconds: the last of sixteen moments in each."""
  return [int(k * rate + Fraction(15, 16) * rate) for k in range(SECONDS)]


def prepare(task: Task) -> None:
  """Writes the frames and the sound of a clip; a video that ends early gives fewer frames.

  Raises:
    UserError: if the video is missing or broken.
  """
  clip = clip_reader.open_clip(task.video)
  wanted = frame_indices(clip.rate)
  seconds = list(itertools.islice(clip.seconds(), SECONDS + 1))  # rounding may need one frame more
  frames = list(itertools.chain.from_iterable(second.frames for second in seconds))
  if not frames:
    raise UserError(f"{task.video} has no frame.")
  for path, index in zip(task.frames, wanted, strict=True):
    if index < len(frames):
      path.parent.mkdir(parents=True, exist_ok=True)
      picture = cv2.resize(frames[index], SIZE, interpolation=cv2.INTER_LINEAR)
      Image.fromarray(picture).save(path)
  waveform = np.concatenate([second.waveform for second in seconds[:SECONDS]])
  samples = audio.resample(audio.to_mono(waveform), clip.sample_rate)
  task.sound.parent.mkdir(parents=True, exist_ok=True)
  new = task.sound.with_suffix(".new.wav")
  soundfile.write(new, samples, audio.SAMPLE_RATE, subtype="PCM_16")
  os.replace(new, task.sound)


def prepare_all(found: Sequence[Task]) -> Iterator[str]:
  """Prepares the missing clips; yields a line for each clip that cannot be read."""
  for task in found:
    if not task.sound.is_file():
      try:
        prepare(task)
      except UserError as error:
        yield str(error)


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  flags.DEFINE_enum("subset", None, ("s4", "ms3"), "Which subset.", flag_values=values)
  flags.DEFINE_string("root", None, "Folder with the subset's metadata.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and prepares; exit status 1 if clips are left out."""
  with extra("train"):
    from tqdm import tqdm

  no_arguments(arguments)
  if not values.subset or not values.root:
    raise UserError("--subset and --root are needed; see effseg prepare_avsbench --help.")
  found = tasks(Path(values.root), values.subset)
  missing = list(prepare_all(tqdm(found, unit=" clips", disable=None)))
  print(f"{len(found) - len(missing)} of {len(found)} clips are ready")
  for line in missing[:20]:
    print(f"  left out: {line}")
  return 1 if missing else 0
