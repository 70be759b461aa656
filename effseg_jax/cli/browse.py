"""Draws a sheet of training examples: the input of the network beside its target.

  effseg browse --config=afformer/camvid --config.data.root=DIR --output=sheet.png

Check it before training on a new data set: wrong class numbers, swapped channels and misplaced
labels are visible at once. `--original` disables the augmentation; `--seed` chooses other examples.
Each segment has a colour and a name; a clip is a row, with the sounding object tinted in each frame
above a spectrogram of its sound (time to the right, pitch upwards).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from effseg_jax.cli import Flags, define_config, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import datasets, pipelines
from effseg_jax.pictures import semantic as pictures
from effseg_jax.pictures import universal as segments
from effseg_jax.pictures.text import readable

_HEIGHT = 200  # of an example on the sheet, in pixels
_CLIP = 132  # of a frame of a clip
_GAP = 6
_LEGEND = 24  # classes at most, those with most pixels
_PAPER = (250, 250, 248)
_INK = (32, 32, 32)


def browse(
  config: ConfigDict,
  *,
  split: str | None = None,
  count: int = 12,
  original: bool = False,
  seed: int = 0,
) -> tuple[np.ndarray, str]:
  """Draws examples of a configured data set.

  Args:
    config: an experiment.
    split: of the data set; None: the one it trains on.
    count: number of examples, all of them if there are fewer.
    original: disables the augmentation.
    seed: of the choice and the augmentation.

  Returns:
    The sheet, uint8 (H, W, 3), and a line that describes it.
  """
  options = config.data.options.to_dict()
  options.pop("embeddings", None)  # sounds can be looked at
  dataset = datasets.open_dataset(
    config.data.name,
    root=config.data.root or None,
    split=split or config.data.train_split,
    **options,
  )
  dataset = pipelines.as_task_reads(config.task.name, dataset)
  steps = (
    []
    if original
    else pipelines.train_transforms(config.task.name, **config.data.augment.to_dict())
  )
  rng = np.random.default_rng(seed)
  chosen = rng.permutation(len(dataset))[:count]
  examples = [_augmented(dataset[int(index)], steps, rng) for index in chosen]
  line = f"{len(examples)} of {len(dataset):,} examples of {dataset.name}, split {dataset.split}"
  if config.task.name == "classification":
    return _grid([_titled(e["image"], dataset.classes[int(e["label"])]) for e in examples]), line
  if config.task.name == "universal":
    return sheet_of_segments(examples, dataset), line
  if config.task.name == "audio_visual":
    return _grid([_above_its_sound(example, dataset.palette) for example in examples]), line
  sheet = _grid([_beside_its_label(example, dataset.palette) for example in examples])
  label = np.concatenate([example["label"].ravel() for example in examples])
  void = float(np.mean(label == dataset.ignore_label))
  most = np.argsort(-np.bincount(label, minlength=256)[: dataset.num_classes])[:_LEGEND]
  label = np.where(np.isin(label, most), label, dataset.ignore_label)
  sheet = pictures.with_legend(sheet, label, dataset.classes, dataset.palette)
  return sheet, f"{line}; {100 * void:.1f} % void or padding"


def sheet_of_segments(examples: Sequence[dict[str, Any]], dataset: Any) -> np.ndarray:
  """Examples of segments beside their pictures, uint8 (H, W, 3)."""
  return _grid([_beside_its_segments(example, dataset) for example in examples])


def _augmented(example: dict[str, Any], steps: Sequence[Any], rng: np.random.Generator) -> Any:
  for step in steps:
    example = step(example, rng)
  return example


def _beside_its_label(example: dict[str, Any], palette: np.ndarray) -> Image.Image:
  """The image, and the image tinted by class."""
  image, label = example["image"], example["label"]
  return _row([_scaled(image), _scaled(pictures.overlay(image, label, palette, opacity=0.7))])


def _beside_its_segments(example: dict[str, Any], dataset: Any) -> Image.Image:
  """The image, and the image tinted by segment; of overlapping ones the first layer is seen."""
  rows, cols = example["valid_size"]
  image, layers = example["image"][:rows, :cols], np.asarray(example["segments"])[:, :rows, :cols]
  labels = example["labels"][example["labels"] >= 0]
  top = np.full(layers.shape[1:], -1, np.int16)
  for layer in layers:
    top = np.where(top < 0, np.where(layer < len(labels), layer.astype(np.int16), -1), top)
  colours = segments.segment_colours(labels.tolist(), dataset.thing_mask, dataset.palette)
  tinted = segments.paint_segments(image, top, colours)
  names = segments.write_names(tinted, top, [dataset.classes[label] for label in labels])
  return _row([_scaled(image), _scaled(names)])


def _above_its_sound(example: dict[str, Any], palette: np.ndarray) -> Image.Image:
  """The frames, tinted where something sounds, above their log-mel patches."""
  binary = len(palette) == 1
  colours = np.concatenate([np.zeros((1, 3), np.uint8), palette]) if binary else palette
  columns = []
  for frame, mask, patch in zip(
    example["frames"], example["masks"], example["log_mel"], strict=True
  ):
    label = np.where(mask == 0, 255, mask)  # pixels without sound keep their colours
    tinted = np.where(
      (mask > 0)[..., None] | pictures.class_borders(label)[..., None],
      pictures.overlay(frame, label, colours),
      frame,
    )
    sound = np.clip((patch.T[::-1] + 5) / 8 * 255, 0, 255).astype(np.uint8)  # log-mel: -4.6 to 3
    picture = Image.fromarray(tinted).resize((_CLIP, _CLIP), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (_CLIP, _HEIGHT), _PAPER)
    canvas.paste(picture, (0, 0))
    canvas.paste(Image.fromarray(sound).resize((_CLIP, _HEIGHT - _CLIP - 2)), (0, _CLIP + 2))
    columns.append(canvas)
  return _row(columns)


def _row(panels: Sequence[Image.Image]) -> Image.Image:
  canvas = Image.new("RGB", (sum(panel.width for panel in panels), _HEIGHT), _PAPER)
  left = 0
  for panel in panels:
    canvas.paste(panel, (left, 0))
    left += panel.width
  return canvas


def _titled(image: np.ndarray, title: str) -> Image.Image:
  """The image above its class."""
  panel = _scaled(image)
  canvas = Image.new("RGB", (panel.width, _HEIGHT + 20), _PAPER)
  canvas.paste(panel, (0, 0))
  font, (title,) = readable([title], 13)
  middle = (panel.width / 2, _HEIGHT + 10)
  ImageDraw.Draw(canvas).text(middle, title, fill=_INK, font=font, anchor="mm")
  return canvas


def _scaled(image: np.ndarray) -> Image.Image:
  width = max(round(_HEIGHT * image.shape[1] / image.shape[0]), 1)
  how = Image.Resampling.NEAREST if image.shape[0] < _HEIGHT else Image.Resampling.LANCZOS
  return Image.fromarray(np.ascontiguousarray(image)).resize((width, _HEIGHT), how)


def _grid(cells: Sequence[Image.Image]) -> np.ndarray:
  """Cells of one height in rows, on a sheet a little wider than high."""
  width, height = max(cell.width for cell in cells) + _GAP, cells[0].height + _GAP
  columns = min(max(round(math.sqrt(1.4 * len(cells) * height / width)), 1), len(cells))
  rows = math.ceil(len(cells) / columns)
  canvas = Image.new("RGB", (columns * width, rows * height), _PAPER)
  for index, cell in enumerate(cells):
    canvas.paste(cell, (index % columns * width, index // columns * height))
  return np.asarray(canvas)


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  define_config(values)
  flags.DEFINE_string("output", "sheet.png", "The picture to write.", flag_values=values)
  flags.DEFINE_string(
    "split", None, "A split of the data set; default: the training split.", flag_values=values
  )
  flags.DEFINE_integer("count", 12, "Number of examples.", lower_bound=1, flag_values=values)
  flags.DEFINE_bool("original", False, "Without augmentation.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Seed of the choice and the augmentation.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and draws."""
  no_arguments(arguments)
  if values.config is None:
    raise UserError("--config is needed, for example --config=afformer/synthetic.")
  output = Path(values.output)
  if output.suffix.lower() not in Image.registered_extensions():
    raise UserError(f"--output is {output}; expected a picture's name, such as sheet.png.")
  sheet, line = browse(
    values.config,
    split=values.split,
    count=values.count,
    original=values.original,
    seed=values.seed,
  )
  output.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(sheet).save(output)
  print(f"{output}: {line}")
