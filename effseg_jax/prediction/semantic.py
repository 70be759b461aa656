"""Semantic segmentation of pictures: the class of every pixel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.inference.semantic import forward_pass, view_logits
from effseg_jax.input_pipeline.eval_batches import SizeRule
from effseg_jax.prediction import tiles
from effseg_jax.prediction.card import SemanticSettings, read_settings, read_task
from effseg_jax.prediction.pictures import PictureSegmenter
from effseg_jax.prediction.programs import Programs
from effseg_jax.prediction.results import SemanticResult
from effseg_jax.prediction.sizes import SemanticSize, parse_scale
from effseg_jax.weights.bundle import Bundle


class SemanticEngine:
  """The network's side: batches of one shape in, class maps in each picture's own size out.

  The network is compiled once for each size at which it sees pictures. Reading its logits in a
  picture's own size is a second program, which does not depend on that size.
  """

  options: tuple[str, ...] = ()

  def __init__(self, bundle: Bundle, origin: str, scale: Any, exact_size: bool):
    """Puts the weights on the device; see `make_segmenter`."""
    self.task = read_task(bundle.card, origin)
    settings = read_settings(SemanticSettings, bundle.card, origin)
    self._inference = settings.inference
    rule = SizeRule(settings.scale, settings.multiple)
    parsed = None if scale is None else parse_scale(scale)
    self._size = SemanticSize(rule, parsed, exact_size)
    self._model = bundle.model
    self._variables = jax.device_put(bundle.variables)
    self.programs = Programs()

  def shape(self, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of a picture -> (rows, cols) of the network's input."""
    return self._size(size)

  def prepare(self, image: np.ndarray) -> np.ndarray:
    """A picture as the network sees it, uint8 (h, w, 3)."""
    size = self.shape(image.shape[:2])
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)

  def run(
    self, images: Sequence[np.ndarray], arrays: Sequence[np.ndarray], batch_size: int
  ) -> list[SemanticResult]:
    """Segments pictures of one network shape.

    Args:
      images: uint8 (H, W, 3) each, at most `batch_size`.
      arrays: what `prepare` made of them.
      batch_size: of the program.
    """
    batch = np.zeros((batch_size, *arrays[0].shape), np.uint8)
    batch[: len(arrays)] = arrays
    program = self.programs.get(("network", batch.shape), self._logits, self._variables, batch)
    begin = time.perf_counter()
    views = jax.block_until_ready(program(self._variables, batch))
    network = time.perf_counter() - begin
    results, task = [], self.task
    for row, image in enumerate(images):
      class_map, reading = tiles.class_map(
        self.programs, views, row, image.shape[:2], averages_scores=task.averages_scores
      )
      milliseconds = 1000 * (network / len(images) + reading)
      results.append(SemanticResult(image, class_map, task.classes, task.palette, milliseconds))
    return results

  def _logits(self, variables: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    """Logits of every view of a batch of pictures, uint8 (B, h, w, 3)."""
    valid = jnp.full((images.shape[0], 2), jnp.array(images.shape[1:3], jnp.int32))
    (inputs,) = self.task.model_inputs({"image": images, "valid_size": valid})
    forward = forward_pass(self._model, self.task, variables)
    return tuple(view_logits(forward, inputs, self._inference))


def segmenter(
  bundle: Bundle,
  origin: str,
  scale: Any = None,
  exact_size: bool = False,
  batch_size: int | None = None,
) -> PictureSegmenter:
  """What `effseg_jax.load` gives for this task; the options are explained there."""
  return PictureSegmenter(SemanticEngine(bundle, origin, scale, exact_size), batch_size)
