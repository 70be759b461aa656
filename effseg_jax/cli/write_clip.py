r"""Writes one of the embedded clips as a video with sound, for `effseg predict`.

  effseg write_clip --output=clip.mp4
  effseg predict --checkpoint=checkpoints/avesformer_synthetic.safetensors --input=clip.mp4 \
    --output=out
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from absl import flags

from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets import synthetic_av
from effseg_jax.prediction.clip_writer import ClipWriter

_RATE = 8  # frames a second; the embedded clips have one, which is shown eight times
_SAMPLE_RATE = 16_000


def write_clip(output: Path, index: int, size: tuple[int, int], seconds: int) -> str:
  """Writes a clip of the test split; returns which objects sound: one, switch, both or none."""
  dataset = synthetic_av.open_split(None, "test", size=size, num_frames=seconds)
  if not 0 <= index < len(dataset):
    raise UserError(f"--index={index}; expected 0 to {len(dataset) - 1}.")
  frames, waveform, _ = dataset.clip(index)
  output.parent.mkdir(parents=True, exist_ok=True)
  rate = Fraction(_RATE)
  with ClipWriter(output, rate, size, sample_rate=_SAMPLE_RATE, channels=1) as writer:
    for second, frame in enumerate(frames):
      sound = waveform[second * _SAMPLE_RATE : (second + 1) * _SAMPLE_RATE]
      writer.add(np.repeat(frame[None], _RATE, axis=0), sound)
  return dataset.group(index)


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  integer = functools.partial(flags.DEFINE_integer, lower_bound=0, flag_values=values)
  flags.DEFINE_string("output", None, "The video, ending in .mp4.", flag_values=values)
  integer("index", 3, "Of the clip in the test split.")
  integer("side", 256, "Rows and columns, an even number.")
  integer("seconds", 5, "Length of the clip.")


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and writes the clip."""
  no_arguments(arguments)
  if not values.output or Path(values.output).suffix != ".mp4":
    raise UserError(f"--output={values.output}; expected a name that ends in .mp4.")
  output, size = Path(values.output), (values.side, values.side)
  group = write_clip(output, values.index, size, values.seconds)
  print(f"{output}: {values.seconds} s, two objects, of which {group} sounds")
