r"""Writes one of the embedded clips as a video with sound, for `predict.py` to segment.

  python -m tools.write_clip --output=clip.mp4
  python predict.py --checkpoint=checkpoints/avesformer_synthetic.safetensors --input=clip.mp4 \
    --output=out
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError, friendly_exit
from effseg_jax.prediction.clip_writer import ClipWriter
from input_pipeline.datasets import synthetic_av

_RATE = 8  # frames a second; the embedded clips have one, which is shown eight times
_SAMPLE_RATE = 16_000


def write_clip(output: Path, index: int, size: tuple[int, int], seconds: int) -> str:
  """Writes a clip of the test split; returns who sounds in it: one, switch, both or none."""
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


def main(argv: Sequence[str] | None = None) -> None:
  """Checks the flags and writes."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--output", type=Path, required=True, help="the video, ending in .mp4")
  parser.add_argument("--index", type=int, default=3, help="of the clip in the test split")
  parser.add_argument("--side", type=int, default=256, help="rows and columns, an even number")
  parser.add_argument("--seconds", type=int, default=5)
  args = parser.parse_args(argv)
  with friendly_exit():
    if args.output.suffix != ".mp4":
      raise UserError(f"--output={args.output}; expected a name that ends in .mp4.")
    group = write_clip(args.output, args.index, (args.side, args.side), args.seconds)
    print(f"{args.output}: {args.seconds} s, two objects, of which {group} sounds")


if __name__ == "__main__":
  main()
