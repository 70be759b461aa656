"""Segments pictures: `python predict.py --input=street.jpg --output=out`.

For each picture of a file or folder: `NAME_classes.png`, the class of every pixel as an 8-bit PNG
with a palette, and `NAME_overlay.png`, the picture tinted by class beside a legend. A file that
cannot be read is reported and skipped; the exit status is then 1.

`--checkpoint` is a bundle (`.safetensors`) or the working directory of a run. The network sees a
picture at the size that the model was evaluated at; `--scale=720x540` (it is fitted into that
frame, keeping its ratio) or `--scale=1.5` (times its own size) says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import app, flags, logging

from effseg_jax import platform
from effseg_jax.errors import UserError, friendly_exit, parse_flags

if TYPE_CHECKING:
  from effseg_jax.tasks.semantic import SemanticTask
  from effseg_jax.weights.bundle import Bundle

_DEFAULT = Path("checkpoints") / "afformer_tiny_camvid.safetensors"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# Scores of every class for every pixel take four bytes each: at most half a gigabyte.
_MAX_SCORES = 2**27

# "--scale=720" is a forgotten height and not a wish for pictures of 500 megapixels.
_MAX_FACTOR = 8

SizeRule = Callable[[tuple[int, int]], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Prediction:
  """One segmented picture.

  Attributes:
    class_map: uint8 (H, W), class ids at the picture's size.
    milliseconds: that the network and the resizing took, compilation not counted.
  """

  class_map: np.ndarray
  milliseconds: float


class Segmenter:
  """Segments pictures of any size with a bundle; one program is compiled per network size."""

  def __init__(self, bundle: Bundle, size_rule: SizeRule):
    """Puts the weights on the device.

    Args:
      bundle: of a semantic segmentation model.
      size_rule: (rows, cols) of a picture -> (rows, cols) for the network.
    """
    import jax

    self.task = semantic_task(bundle)
    self._model, self._rule = bundle.model, size_rule
    self._variables = jax.device_put(bundle.variables)
    self._programs: dict[tuple[int, ...], Callable] = {}

  def __call__(self, image: np.ndarray) -> Prediction:
    """Segments a picture, uint8 RGB (H, W, 3).

    Raises:
      UserError: if the network's size would be smaller than it accepts.
    """
    import cv2

    size = self._rule(image.shape[:2])
    batch = {
      "image": cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)[None],
      "valid_size": np.array([size], np.int32),
    }
    map_size = self._map_size(image.shape[:2])
    program = self._program(batch, map_size)
    begin = time.perf_counter()
    class_map = np.asarray(program(self._variables, batch))[0]
    milliseconds = 1000 * (time.perf_counter() - begin)
    if map_size != image.shape[:2]:
      class_map = cv2.resize(class_map, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return Prediction(class_map, milliseconds)

  def _map_size(self, size: tuple[int, int]) -> tuple[int, int]:
    """The picture's size, or what of it the scores' memory allows."""
    factor = min(1.0, math.sqrt(_MAX_SCORES / (math.prod(size) * self.task.num_classes)))
    return max(int(size[0] * factor), 1), max(int(size[1] * factor), 1)

  def _program(self, batch: dict[str, np.ndarray], map_size: tuple[int, int]) -> Callable:
    import jax
    import jax.numpy as jnp

    from effseg_jax.tasks.inference import Inference, class_map

    key = (*batch["image"].shape[1:3], *map_size)
    if key not in self._programs:

      def run(variables, batch):
        (images,) = self.task.model_inputs(batch)
        forward = lambda x: self._model.apply(variables, x, train=False)  # noqa: E731
        size = jnp.array([map_size], jnp.int32)
        return class_map(forward, images, size, map_size, Inference()).astype(jnp.uint8)

      # Compiled ahead of the first call, so that the time reported is that of running.
      self._programs[key] = jax.jit(run).lower(self._variables, batch).compile()
    return self._programs[key]


def semantic_task(bundle: Bundle) -> SemanticTask:
  """The task that a bundle's card describes.

  Raises:
    UserError: if the model does not segment.
  """
  from effseg_jax.tasks.semantic import SemanticTask

  card = dict(bundle.card["task"])
  name = card.pop("name")
  if name != "semantic":
    raise UserError(
      f"the checkpoint was trained for {name}; predict.py needs one for semantic segmentation."
    )
  known = {field.name for field in dataclasses.fields(SemanticTask)}
  fields = {key: value for key, value in card.items() if key in known}
  fields["palette"] = tuple(tuple(colour) for colour in fields["palette"])
  return SemanticTask(
    **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
  )


def size_rule(bundle: Bundle, scale: str | None) -> SizeRule:
  """At which size the network sees a picture.

  Args:
    bundle: its card may hold `inference`: `scale` (long, short side) and `multiple`.
    scale: `"720x540"`, a factor such as `"1.5"`, or None for the card's (else the picture's own).

  Raises:
    UserError: if the scale cannot be read.
  """
  from input_pipeline import loader

  saved = bundle.card.get("inference") or {}
  multiple = int(saved.get("multiple", 1))
  if scale is None:
    return loader.SizeRule(tuple(saved.get("scale", (0, 0))), multiple)
  frame = re.fullmatch(r"(\d+)x(\d+)", scale)
  if frame and all(int(side) > 0 for side in frame.groups()):
    return loader.SizeRule((int(frame[1]), int(frame[2])), multiple)
  factor = float(scale) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", scale) else 0.0
  if not 0.0 < factor <= _MAX_FACTOR:
    raise UserError(
      f"--scale is {scale!r}; expected WIDTHxHEIGHT such as 720x540, or a factor up to"
      f" {_MAX_FACTOR} such as 1.5."
    )
  stretch = loader.SizeRule((0, 0), multiple)
  return lambda size: stretch((round(size[0] * factor), round(size[1] * factor)))


def load(checkpoint: str | Path | None) -> Bundle:
  """Loads the checkpoint, by default the released one beside this file.

  Raises:
    UserError: if it is missing or cannot be read.
  """
  from effseg_jax.training.checkpoint import load_for_inference

  path = Path(checkpoint or Path(__file__).resolve().parent / _DEFAULT)
  if not path.exists():
    hint = "" if checkpoint else " Give --checkpoint=FILE, or the --workdir of a training run."
    raise UserError(f"{path} does not exist.{hint}")
  if path.suffix in (".pth", ".pt", ".pkl"):
    raise UserError(
      f"{path} does not say which classes it knows; convert it to a bundle (.safetensors) with"
      " tools/convert.py."
    )
  return load_for_inference(path)


def find_pictures(source: str | Path) -> list[Path]:
  """The picture, or the pictures of a folder, by name.

  Raises:
    UserError: if there are none.
  """
  source = Path(source)
  if source.is_file():
    return [source]
  if not source.is_dir():
    raise UserError(f"{source} does not exist; expected a picture or a folder of pictures.")
  found = sorted(path for path in source.iterdir() if path.suffix.lower() in _SUFFIXES)
  if not found:
    raise UserError(f"{source} holds no picture ({', '.join(_SUFFIXES)}).")
  return found


def predict(segment: Segmenter, source: str | Path, output: str | Path) -> int:
  """Segments pictures, writes class maps and overlays, and prints a line for each.

  Args:
    segment: the model.
    source: a picture or a folder of pictures.
    output: folder; made if it is missing.

  Returns:
    How many pictures could not be read.

  Raises:
    UserError: if there is nothing to read, or the folder cannot be made.
  """
  from input_pipeline import codecs

  paths = find_pictures(source)
  folder = Path(output)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--output={output} is a file; expected a folder.")
  folder.mkdir(parents=True, exist_ok=True)
  stems = [path.stem for path in paths]
  failed = 0
  for path in paths:
    try:
      image = codecs.read_image(path)
      prediction = segment(image)
    except UserError as error:
      failed += 1
      print(f"skipped: {error}", file=sys.stderr, flush=True)
      continue
    # a.jpg and a.png must not overwrite each other's results
    name = path.stem if stems.count(path.stem) == 1 else path.name
    write(prediction.class_map, image, segment.task, folder / name)
    shares = class_shares(prediction.class_map, segment.task)
    print(f"{path.name}: {shares}  {prediction.milliseconds:.0f} ms", flush=True)
  done = len(paths) - failed
  print(
    f"{done} of {len(paths)} pictures written to {folder}" + (f", {failed} skipped" * bool(failed))
  )
  return failed


def write(class_map: np.ndarray, image: np.ndarray, task: SemanticTask, stem: Path) -> None:
  """Writes `STEM_classes.png` (8-bit with a palette) and `STEM_overlay.png` (with a legend)."""
  from PIL import Image

  from effseg_jax.tasks import pictures

  indexed = Image.fromarray(class_map)
  indexed.putpalette(np.asarray(task.palette, np.uint8).tobytes())
  indexed.save(stem.with_name(f"{stem.name}_classes.png"))
  tinted = pictures.overlay(image, class_map, task.palette)
  tinted = pictures.with_legend(tinted, class_map, task.classes, task.palette)
  Image.fromarray(tinted).save(stem.with_name(f"{stem.name}_overlay.png"))


def class_shares(class_map: np.ndarray, task: SemanticTask) -> str:
  """`"road 31%, sky 20%, ..."`: the classes found, the largest first."""
  counts = np.bincount(class_map.ravel(), minlength=task.num_classes)
  order = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
  return ", ".join(
    f"{task.classes[index]} {100 * counts[index] / class_map.size:.0f}%" for index in order
  )


def define_flags() -> None:
  """Not at import: a notebook imports this file beside other entry points with flags alike."""
  flags.DEFINE_string(
    "checkpoint", None, f"A bundle or a run's working directory; default: {_DEFAULT.as_posix()}."
  )
  flags.DEFINE_string("input", None, "A picture or a folder of pictures.")
  flags.DEFINE_string("output", None, "Folder for class maps and overlays.")
  flags.DEFINE_string("scale", None, "Size the network sees: 720x540, or a factor: 1.5.")


def main(argv: list[str]) -> None:
  """Checks the flags and predicts."""
  given = flags.FLAGS
  with friendly_exit():
    if len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
    if not given.input or not given.output:
      raise UserError("--input and --output are needed; see python predict.py --help.")
    find_pictures(given.input)  # a mistake is told before anything slow is loaded
    logging.set_verbosity(logging.ERROR)  # orbax warns of what is of no concern here
    platform.tune_host_malloc()
    platform.use_compilation_cache()
    bundle = load(given.checkpoint)
    segmenter = Segmenter(bundle, size_rule(bundle, given.scale))
    failed = predict(segmenter, given.input, given.output)
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=parse_flags)
