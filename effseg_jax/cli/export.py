r"""Exports a trained model for other runtimes: `effseg export --output=model.onnx`.

  effseg export --checkpoint=runs/camvid --output=camvid.onnx --size=960x704
  effseg export --checkpoint=mask2former.safetensors --output=model.xml --outputs=masks
  effseg export --checkpoint=runs/camvid --output=camvid_int8.onnx --precision=int8 \
    --calibration=pictures
  effseg export --checkpoint=runs/camvid --output=camvid.stablehlo

The format follows from the name: `.onnx`; `.xml`, OpenVINO's; `.stablehlo`, a program of JAX for
CPU, CUDA and TPU in one file. The batch is free, the size of pictures is fixed. The file says what
it is: card, classes, colours, mean, standard deviation and size are in its metadata.

`--input=uint8` (the default) takes pictures uint8 (B, H, W, 3) as they are decoded;
`--input=normalised` takes float32 (B, 3, H, W), and gives semantic logits as (B, K, h, w).
`--outputs` is logits; class_map (semantic), uint8 (B, H, W); or masks (universal): masks uint8
(B, Q, H, W), labels int32 (B, Q) and scores float32 (B, Q).

Before the file is written, its runtime computes a picture (`--picture`, else a drawn one) and its
mirror image; the largest difference from this library is printed, and above `--tolerance` nothing
is written. `effseg predict` and `effseg eval` take the file as `--checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError

if TYPE_CHECKING:
  from effseg_jax.export.forms import Exportable

DEFAULT_CHECKPOINT = "afformer_tiny_camvid"

# Pictures that int8 is calibrated with, at most.
_MOST_CALIBRATION = 64


def define_flags(values: Flags) -> None:
  """Declares the flags."""

  def text(name: str, description: str, default: str | None = None) -> None:
    flags.DEFINE_string(name, default, description, flag_values=values)

  text(
    "checkpoint",
    "A released name, a bundle, a run's working directory or an official file.",
    DEFAULT_CHECKPOINT,
  )
  text("output", "The file to write, ending in .onnx, .xml or .stablehlo.")
  text("format", "onnx, openvino or stablehlo, if the name is not to say it.")
  text("size", "WIDTHxHEIGHT of the pictures; by default that of the evaluation, else 512x512.")
  text("input", "uint8: pictures as decoded; normalised: float32, channels first.", "uint8")
  text("outputs", "logits, class_map or masks.", "logits")
  text("precision", "float32, float16 or int8.", "float32")
  text("calibration", "Folder of pictures for int8.")
  text("picture", "The picture to compare on.")
  text("platforms", "Of StableHLO.", "cpu,cuda,tpu")
  text("dataset", "Whose classes an official file knows: ade20k, cityscapes, ...")
  text("model", "Name of the model of an official file, if it is not to be found out.")
  flags.DEFINE_integer("opset", 20, "Of ONNX, from 20 on.", flag_values=values)
  flags.DEFINE_integer("frames", 5, "Seconds of an audio-visual clip.", flag_values=values)
  flags.DEFINE_float(
    "tolerance", None, "Largest difference, as a share of the largest value.", flag_values=values
  )


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and exports."""
  no_arguments(arguments)
  if not values.output:
    raise UserError("--output is needed: a name ending in .onnx, .xml or .stablehlo.")
  from effseg_jax.export import writing

  formats = {suffix: name for name, suffix in writing.FORMATS.items()}
  output = Path(values.output)
  name = values.format or formats.get(output.suffix)
  if name is None:
    raise UserError(f"--output={output}: a name ends in {', '.join(formats)}.")

  from effseg_jax.export.forms import Form, make_exportable
  from effseg_jax.prediction.source import read_source

  bundle = read_source(values.checkpoint, dataset=values.dataset, model=values.model)
  size = network_size(values.size, bundle.card)
  form = Form(size, values.input, values.outputs, values.frames)
  exportable = make_exportable(bundle, form)
  report = writing.export_model(
    exportable,
    output,
    sample_inputs(exportable, values.picture),
    format=name,
    precision=values.precision,
    opset=values.opset,
    platforms=values.platforms.split(","),
    calibration=_calibration(exportable, values.calibration),
    tolerance=values.tolerance,
  )
  print(
    f"{report.path}: {bundle.card['model']['name']}, {describe(report, values.precision, size)}"
  )


def describe(report: Any, precision: str, size: tuple[int, int]) -> str:
  """What an export came to, in a line."""
  parts = [f"{size[1]}x{size[0]}", precision, f"{report.bytes / 1e6:.1f} MB"]
  if report.nodes is not None:
    parts.append(f"{report.nodes} nodes")
  parts += [
    f"{name} differ by {far:.1e} at most (values up to {largest:.3g})"
    for name, (far, largest) in report.differences.items()
  ]
  if report.changed is not None:
    parts.append(f"{100 * report.changed:.3g} % of pixels changed")
  return ", ".join(parts)


def network_size(text: str | None, card: Any) -> tuple[int, int]:
  """Rows and columns: those given, else those of the evaluation.

  Raises:
    UserError: if the text is no size.
  """
  import re

  if text is not None:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or min(int(found[1]), int(found[2])) < 32:
      raise UserError(f"--size={text}: expected WIDTHxHEIGHT of at least 32, such as 512x512.")
    return int(found[2]), int(found[1])
  settings = card.get("inference") or {}
  if settings.get("size"):
    rows, cols = settings["size"]
    return int(rows), int(cols)
  cols, rows = settings.get("scale") or (0, 0)
  multiple = max(int(settings.get("multiple", 1)), 1)
  if not rows or not cols:
    return 512, 512
  return -(-rows // multiple) * multiple, -(-cols // multiple) * multiple


def sample_inputs(exportable: Exportable, picture: str | None) -> list[np.ndarray]:
  """Two examples: a picture and its mirror image."""
  from effseg_jax.prediction.inputs import as_image

  if picture is None:
    from effseg_jax.input_pipeline.datasets.synthetic import open_split

    image = open_split(None, "val", size=exportable.card["export"]["size"])[0]["image"]
  else:
    image = as_image(Path(picture))
  one = as_inputs(exportable, image)
  return [
    np.concatenate([x, _mirrored(name, x)])
    for (name, _, _), x in zip(exportable.inputs, one, strict=True)
  ]


def as_inputs(exportable: Exportable, image: np.ndarray) -> list[np.ndarray]:
  """A picture, stretched, as a batch of one; a clip shows it all the time, with faint noise."""
  import cv2

  export, task = exportable.card["export"], exportable.card["task"]
  rows, cols = export["size"]
  array = cv2.resize(image, (cols, rows), interpolation=cv2.INTER_LINEAR)
  if export["input"] == "normalised":
    mean, std = (np.asarray(task[key], np.float32) for key in ("mean", "std"))
    array = ((array - mean) / std).astype(np.float32).transpose(2, 0, 1)
  inputs = []
  for name, shape, _ in exportable.inputs:
    if name == "log_mel":
      inputs.append(np.random.default_rng(0).normal(-3, 1, (1, *shape[1:])).astype(np.float32))
    else:
      inputs.append(np.broadcast_to(array, (1, *shape[1:])).copy())
  return inputs


def _mirrored(name: str, x: np.ndarray) -> np.ndarray:
  if name == "log_mel":
    return x[..., ::-1, :]
  return x[..., ::-1, :] if x.dtype == np.uint8 else x[..., ::-1]


def _calibration(exportable: Exportable, folder: str | None) -> list[list[np.ndarray]]:
  """Inputs made of the pictures of a folder."""
  if folder is None:
    return []
  from effseg_jax.input_pipeline.codecs import PICTURE_SUFFIXES
  from effseg_jax.prediction.inputs import as_image, files_in

  wanted = lambda path: path.suffix.lower() in PICTURE_SUFFIXES  # noqa: E731
  paths, _ = files_in(Path(folder), wanted, "pictures for the calibration")
  chosen = paths[:: max(len(paths) // _MOST_CALIBRATION, 1)][:_MOST_CALIBRATION]
  return [as_inputs(exportable, as_image(path)) for path in chosen]
