"""Semantic segmentation of pictures: the class of every pixel, and an overlay with a legend."""

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
from effseg_jax.inference.semantic import Inference, class_map
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.eval_batches import SizeRule
from effseg_jax.pictures import semantic as pictures
from effseg_jax.prediction import pictures_in
from effseg_jax.tasks.semantic import SemanticTask
from effseg_jax.weights.bundle import Bundle

# Scores of every class for every pixel take four bytes each: at most half a gigabyte.
_MAX_SCORES = 2**27

# "--scale=720" is a forgotten height and not a wish for pictures of 500 megapixels.
_MAX_FACTOR = 8


class SemanticPredictor:
  """Segments pictures of any size; one program is compiled per network size.

  For each picture: `STEM_classes.png`, the class of every pixel as an 8-bit PNG with a palette, and
  `STEM_overlay.png`, the picture tinted by class beside a legend.
  """

  def __init__(self, bundle: Bundle, scale: str | None = None):
    """Puts the weights on the device.

    Args:
      bundle: of a semantic segmentation model.
      scale: the size at which the network sees pictures: `"720x540"` (they are fitted into that
        frame, keeping their ratio) or a factor such as `"1.5"`; None: as the model was evaluated.
    """
    self.task = semantic_task(bundle)
    self._model, self._rule = bundle.model, size_rule(bundle, scale)
    self._variables = jax.device_put(bundle.variables)
    self._programs: dict[tuple[int, ...], Callable] = {}

  def inputs(self, source: Path) -> list[Path]:
    """The picture, or the pictures of a folder."""
    return pictures_in(source)

  def __call__(self, path: Path, stem: Path) -> str:
    """Writes `STEM_classes.png` and `STEM_overlay.png`; returns the classes' shares and the time.

    Raises:
      UserError: if the picture cannot be read, or is smaller than the network accepts.
    """
    image = codecs.read_image(path)
    found, milliseconds = self.segment(image)
    indexed = Image.fromarray(found)
    indexed.putpalette(np.asarray(self.task.palette, np.uint8).tobytes())
    indexed.save(stem.with_name(f"{stem.name}_classes.png"))
    tinted = pictures.overlay(image, found, self.task.palette)
    tinted = pictures.with_legend(tinted, found, self.task.classes, self.task.palette)
    Image.fromarray(tinted).save(stem.with_name(f"{stem.name}_overlay.png"))
    return f"{class_shares(found, self.task.classes)}  {milliseconds:.0f} ms"

  def segment(self, image: np.ndarray) -> tuple[np.ndarray, float]:
    """Segments a picture.

    Args:
      image: uint8 RGB (H, W, 3).

    Returns:
      Class ids uint8 (H, W), and the milliseconds that network and resizing took, compilation not
      counted.
    """
    size = self._rule(image.shape[:2])
    batch = {
      "image": cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)[None],
      "valid_size": np.array([size], np.int32),
    }
    map_size = self._map_size(image.shape[:2])
    program = self._program(batch, map_size)
    begin = time.perf_counter()
    found = np.asarray(program(self._variables, batch))[0]
    milliseconds = 1000 * (time.perf_counter() - begin)
    if map_size != image.shape[:2]:
      found = cv2.resize(found, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return found, milliseconds

  def _map_size(self, size: tuple[int, int]) -> tuple[int, int]:
    """The picture's size, or what of it the scores' memory allows."""
    factor = min(1.0, math.sqrt(_MAX_SCORES / (math.prod(size) * self.task.num_classes)))
    return max(int(size[0] * factor), 1), max(int(size[1] * factor), 1)

  def _program(self, batch: dict[str, np.ndarray], map_size: tuple[int, int]) -> Callable:
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
  """The task that a bundle's card describes."""
  card = bundle.card["task"]
  known = {field.name for field in dataclasses.fields(SemanticTask)}
  fields = {key: value for key, value in card.items() if key in known}
  fields["palette"] = tuple(tuple(colour) for colour in fields["palette"])
  return SemanticTask(
    **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
  )


def size_rule(bundle: Bundle, scale: str | None) -> Callable[[tuple[int, int]], tuple[int, int]]:
  """At which size the network sees a picture: (rows, cols) -> (rows, cols).

  Args:
    bundle: its card may hold `inference`: `scale` (long, short side) and `multiple`.
    scale: `"720x540"`, a factor such as `"1.5"`, or None for the card's (else the picture's own).

  Raises:
    UserError: if the scale cannot be read.
  """
  saved = bundle.card.get("inference") or {}
  multiple = int(saved.get("multiple", 1))
  if scale is None:
    return SizeRule(tuple(saved.get("scale", (0, 0))), multiple)
  frame = re.fullmatch(r"(\d+)x(\d+)", scale)
  if frame and all(int(side) > 0 for side in frame.groups()):
    return SizeRule((int(frame[1]), int(frame[2])), multiple)
  factor = float(scale) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", scale) else 0.0
  if not 0.0 < factor <= _MAX_FACTOR:
    raise UserError(
      f"--scale is {scale!r}; expected WIDTHxHEIGHT such as 720x540, or a factor up to"
      f" {_MAX_FACTOR} such as 1.5."
    )
  stretch = SizeRule((0, 0), multiple)
  return lambda size: stretch((round(size[0] * factor), round(size[1] * factor)))


def class_shares(class_map: np.ndarray, classes: tuple[str, ...]) -> str:
  """`"road 31%, sky 20%, ..."`: the classes found, the largest first."""
  counts = np.bincount(class_map.ravel(), minlength=len(classes))
  order = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
  return ", ".join(f"{classes[i]} {100 * counts[i] / class_map.size:.0f}%" for i in order)
