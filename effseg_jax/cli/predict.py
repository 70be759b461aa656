"""Segments pictures and clips: `effseg predict --input=street.jpg --output=out`.

What is written depends on what the checkpoint was trained for:

* semantic: `NAME_classes.png`, the class of every pixel as an 8-bit PNG with a palette, and
  `NAME_overlay.png`, the picture tinted by class beside a legend;
* universal: `NAME_panoptic.png` and `.json`, `NAME_instances.json`, `NAME_semantic.png`, as far as
  the model was trained for it, and `NAME_overlay.png` with names and scores;
* audio-visual: of a clip with sound, `NAME_sounding.mp4`, what sounds tinted, and `NAME_masks`.

A video given to a semantic or universal model becomes `NAME_overlay.mp4`, with its times and sound;
with `--masks` also `NAME_masks`. `--input` may be the URL of a stream that PyAV can open.

A folder is read with its subfolders, and the output mirrors them. Hidden files and the results of
earlier predictions are left out. An input that cannot be read is reported and skipped; the exit
status is then 1.

`--checkpoint` is a released name, a bundle (`.safetensors`), the working directory of a run, or an
official file together with `--dataset`. The network sees a picture as it did when the model was
evaluated (size, windows, scales, mirrored); `--scale` gives another size. Sides that a semantic
network sees are rounded to multiples of 32, so that similar pictures share a compiled program;
`--exact_size` does not round, and then the result is that of `effseg eval` to the pixel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from effseg_jax import platform
from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError

DEFAULT_CHECKPOINT = "afformer_tiny_camvid"


def define_flags(values: Flags) -> None:
  """Declares the flags."""

  def text(name: str, description: str, default: str | None = None) -> None:
    flags.DEFINE_string(name, default, description, flag_values=values)

  text(
    "checkpoint",
    "A released name, a bundle, a run's working directory or an official file.",
    DEFAULT_CHECKPOINT,
  )
  text("input", "A picture, a video, a folder of them, or the URL of a video stream.")
  text("output", "Folder for what is written.")
  text("dataset", "Whose classes an official file knows: ade20k, cityscapes, ...")
  text("model", "Name of the model of an official file, if it is not to be found out.")
  text("scale", "Size the network sees: 720x540, or a factor: 1.5.")
  flags.DEFINE_bool(
    "exact_size", None, "Semantic models: do not round the network's size.", flag_values=values
  )
  flags.DEFINE_float(
    "score_threshold",
    None,
    "Universal models: the score above which something is a segment; default: as evaluated.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "batch_size", None, "Pictures that the network sees at once.", flag_values=values
  )
  flags.DEFINE_integer("every", 1, "Videos: segment each n-th frame.", flag_values=values)
  flags.DEFINE_float("start", 0.0, "Videos: from this second on.", flag_values=values)
  flags.DEFINE_float("stop", None, "Videos: until this second.", flag_values=values)
  flags.DEFINE_bool("masks", False, "Videos: write a PNG for each frame, too.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and predicts."""
  no_arguments(arguments)
  if not values.input or not values.output:
    raise UserError("--input and --output are needed; see effseg predict --help.")
  # Before anything slow is loaded.
  if "://" not in values.input and not Path(values.input).exists():
    raise UserError(f"{values.input} does not exist; expected a picture, a clip or a folder.")
  platform.tune_host_malloc()
  platform.use_compilation_cache()

  from effseg_jax import prediction
  from effseg_jax.prediction import files

  names = ("scale", "exact_size", "score_threshold", "batch_size")
  segmenter = prediction.load(
    values.checkpoint,
    values.dataset,
    model=values.model,
    **{name: values[name].value for name in names},
  )
  done, failed = files.predict(
    segmenter,
    values.input,
    values.output,
    report=lambda line: print(line, flush=True),
    complain=lambda line: print(line, file=sys.stderr, flush=True),
    video={
      "every": values.every,
      "start": values.start,
      "stop": values.stop,
      "masks": values.masks,
      "progress": True,
    },
  )
  skipped = f", {failed} skipped" if failed else ""
  print(f"{done} of {done + failed} written to {values.output}{skipped}")
  return 1 if failed else 0
