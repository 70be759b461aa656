"""Universal segmentation of pictures: segments with names and scores, instances, class maps."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.inference import mask_readout
from effseg_jax.inference.mask_readout import MaskInference
from effseg_jax.inference.windows import window_scores
from effseg_jax.input_pipeline.eval_universal import WindowRule, size_rule
from effseg_jax.input_pipeline.transforms_universal import resize_image
from effseg_jax.prediction.card import UniversalSettings, read_settings, read_task
from effseg_jax.prediction.pictures import PictureSegmenter
from effseg_jax.prediction.programs import Programs
from effseg_jax.prediction.results import Segment, UniversalResult
from effseg_jax.prediction.sizes import UniversalSize, parse_scale
from effseg_jax.weights.bundle import Bundle

# Mask logits of a strip take four bytes for each query and pixel: about 1/16 of a gigabyte.
_MAX_VALUES = 2**24


class UniversalEngine:
  """The network's side: batches of one shape in, segments in each picture's own size out.

  The network is compiled once for each array size; reading its masks, a strip of rows at a time,
  once for each of a few widths of pictures.
  """

  options: tuple[str, ...] = ("score_threshold",)

  def __init__(self, bundle: Bundle, origin: str, scale: Any, score_threshold: float | None):
    """Puts the weights on the device; see `make_segmenter`."""
    self.task = read_task(bundle.card, origin)
    settings = read_settings(UniversalSettings, bundle.card, origin)
    if score_threshold is None:
      score_threshold = settings.score_threshold
    self._threshold = _checked_threshold(score_threshold)
    self._inference = MaskInference(
      self.task.is_thing,
      panoptic=settings.panoptic,
      instance=settings.instance,
      semantic=settings.semantic,
      overlap_threshold=settings.overlap_threshold,
      detections=settings.detections,
    )
    kinds = ("panoptic", "instance", "semantic")
    self._kinds = tuple(kind for kind in kinds if getattr(settings, kind))
    rule = size_rule(dataclasses.asdict(settings))
    self._rule = rule
    self._size = UniversalSize(rule, None if scale is None else parse_scale(scale))
    self._model = bundle.model
    self._variables = jax.device_put(bundle.variables)
    self.programs = Programs()

  def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
    """(rows, cols) of a picture -> shape of the padded array, or of the grid of windows."""
    return self._size.array(size)

  def prepare(self, image: np.ndarray) -> np.ndarray:
    """A picture resized and padded right and bottom with 0, uint8 (h, w, 3); or its windows."""
    size = image.shape[:2]
    rows, cols = self._size.image(size)
    if isinstance(self._rule, WindowRule):
      return self._rule.cut(resize_image(image, (rows, cols)), size)
    padded = np.zeros((*self.shape(size), 3), np.uint8)
    padded[:rows, :cols] = resize_image(image, (rows, cols))
    return padded

  def run(
    self,
    images: Sequence[np.ndarray],
    arrays: Sequence[np.ndarray],
    batch_size: int,
    *,
    score_threshold: float | None = None,
  ) -> list[UniversalResult]:
    """Segments pictures of one network shape.

    Args:
      images: uint8 (H, W, 3) each, at most `batch_size`.
      arrays: what `prepare` made of them.
      batch_size: of the program.
      score_threshold: for these pictures, in place of the segmenter's.
    """
    threshold = self._threshold if score_threshold is None else _checked_threshold(score_threshold)
    batch = {
      "image": np.zeros((batch_size, *arrays[0].shape), np.uint8),
      "valid_size": np.full((batch_size, 2), arrays[0].shape[-3:-1], np.int32),
    }
    if isinstance(self._rule, WindowRule):
      batch["starts"] = np.zeros((batch_size, *arrays[0].shape[:2], 2), np.int32)
    for row, (image, array) in enumerate(zip(images, arrays, strict=True)):
      batch["image"][row] = array
      batch["valid_size"][row] = self._size.image(image.shape[:2])
      if isinstance(self._rule, WindowRule):
        batch["starts"][row] = self._rule.starts(image.shape[:2])
    key = ("network", batch["image"].shape)
    program = self.programs.get(key, self._outputs, self._variables, batch)
    begin = time.perf_counter()
    outputs = jax.block_until_ready(program(self._variables, batch))
    network = (time.perf_counter() - begin) / len(images)
    results = []
    for row, image in enumerate(images):
      one = {name: value[row] for name, value in outputs.items()}
      results.append(self._read(one, batch["valid_size"][row], image, threshold, network))
    return results

  def _outputs(self, variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    outputs = self._model.apply(variables, *self.task.model_inputs(batch), train=False)
    logits = outputs["class_logits"].astype(jnp.float32)
    found = {"probabilities": jax.nn.softmax(logits)}
    masks = outputs["mask_logits"].astype(jnp.float32)
    if "starts" in batch:
      grid = batch["starts"].shape[:3]
      probabilities = found["probabilities"].reshape(*grid, *logits.shape[1:])
      scores = functools.partial(window_scores, stride=self._inference.stride)
      scores = jax.vmap(scores)(
        probabilities[..., :-1], masks.reshape(*grid, *masks.shape[1:]), batch["starts"]
      )
      # The best query of all windows stands for the picture.
      return {
        "probabilities": probabilities.reshape(grid[0], -1, logits.shape[-1]),
        "scores": scores,
      }
    if self._kinds == ("semantic",):
      scores = functools.partial(mask_readout.network_scores, stride=self._inference.stride)
      return {**found, "scores": jax.vmap(scores)(found["probabilities"][..., :-1], masks)}
    return {**found, "mask_logits": masks}

  def _read(
    self,
    outputs: Mapping[str, jax.Array],
    valid: np.ndarray,
    image: np.ndarray,
    threshold: float,
    network: float,
  ) -> UniversalResult:
    """The result of one picture, a strip at a time."""
    size = image.shape[:2]
    strips = self._strips(outputs, valid, size, np.float32(threshold))
    begin = time.perf_counter()
    maps, sums = self._collect(strips, size)
    probabilities = outputs["probabilities"]
    panoptic_map, segments, instances = None, (), ()
    if "panoptic" in self._kinds:
      panoptic_map, segments = self._segments(probabilities, sums, maps["owner"], threshold)
    if "instance" in self._kinds:
      instances = self._instances(probabilities, sums, maps["masks"], size)
      if panoptic_map is None:
        segments = tuple(s for s in instances if s.score > threshold and s.area)
        panoptic_map = _stacked(segments, size)
    return UniversalResult(
      image=image,
      segments=segments,
      panoptic_map=panoptic_map,
      instances=instances,
      class_map=maps.get("semantic"),
      classes=self.task.classes,
      palette=self.task.palette,
      score_threshold=threshold,
      best=self._best(np.asarray(probabilities), instances),
      kinds=self._kinds,
      milliseconds=1000 * (network + time.perf_counter() - begin),
    )

  def _strips(self, outputs, valid, size, threshold):
    """A compiled function of a row number, and how many rows it reads."""
    shape = (outputs["scores"] if "scores" in outputs else outputs["mask_logits"]).shape
    width = _width_of(size[1])
    rows = int(np.clip(_MAX_VALUES // (width * len(outputs["probabilities"])), 8, 64))
    label, first = np.asarray(size, np.int32), np.int32(0)
    function = functools.partial(_read_rows, lengths=(rows, width), inference=self._inference)
    arguments = (outputs, valid, label, threshold)
    program = self.programs.get(("reader", shape, width), function, *arguments, first)
    return (lambda row: program(*arguments, np.int32(row))), rows

  def _collect(self, strips, size) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Maps in the picture's size, and sums over it."""
    read, step = strips
    maps: dict[str, np.ndarray] = {}
    sums: dict[str, np.ndarray] = {}
    for top in range(0, size[0], step):
      new_sums, new_maps = jax.device_get(read(top))
      rows = min(step, size[0] - top)
      for name, part in new_maps.items():
        lines = np.moveaxis(part, 1, 0) if name == "masks" else part
        if name not in maps:
          cols = -(-size[1] // 8) if name == "masks" else size[1]
          shape = (size[0], *lines.shape[1:-1], cols)
          maps[name] = np.empty(shape, np.int16 if name == "owner" else lines.dtype)
        maps[name][top : top + rows] = lines[:rows, ..., : maps[name].shape[-1]]
      for name, part in new_sums.items():
        sums[name] = sums[name] + part if name in sums else part
    return maps, sums

  def _segments(
    self, probabilities: jax.Array, sums: Mapping[str, np.ndarray], owner: np.ndarray, threshold
  ) -> tuple[np.ndarray, tuple[Segment, ...]]:
    """The panoptic map and its segments."""
    function = functools.partial(_number_segments, inference=self._inference)
    arguments = (probabilities, dict(sums), np.float32(threshold))
    program = self.programs.get(("segments", probabilities.shape), function, *arguments)
    ids, classes, scores = jax.device_get(program(*arguments))
    panoptic_map = np.append(ids, 0).astype(np.int32)[owner]
    areas, boxes = _areas_and_boxes(panoptic_map, np.count_nonzero(classes >= 0))
    numbers = _numbers(classes[: len(areas)])
    segments = tuple(
      self._segment(
        classes[row],
        scores[row],
        id=row + 1,
        number=numbers[row],
        area=areas[row],
        box=boxes[row],
        _source=panoptic_map,
      )
      for row in range(len(areas))
    )
    return panoptic_map, segments

  def _instances(
    self,
    probabilities: jax.Array,
    sums: Mapping[str, np.ndarray],
    masks: np.ndarray,
    size: tuple[int, int],
  ) -> tuple[Segment, ...]:
    """The instances, the most certain first; masks are (H, Q, W / 8), packed."""
    function = functools.partial(mask_readout.top_instances, inference=self._inference)
    names = ("foreground", "confidence")
    arguments = (probabilities, {name: sums[name] for name in names})
    program = self.programs.get(("instances", probabilities.shape), function, *arguments)
    queries, classes, scores = jax.device_get(program(*arguments))
    order = [i for i in np.argsort(-scores, kind="stable") if classes[i] >= 0]
    numbers = _numbers(classes[order])
    return tuple(
      self._segment(
        classes[i],
        scores[i],
        id=rank + 1,
        number=numbers[rank],
        area=int(sums["foreground"][queries[i]]),
        box=_packed_box(masks[:, queries[i]], size[1]),
        _source=masks[:, queries[i]],
        _size=size,
      )
      for rank, i in enumerate(order)
    )

  def _segment(self, label: int, score: float, **about: Any) -> Segment:
    return Segment(
      label=int(label),
      name=self.task.classes[label],
      is_thing=bool(self.task.is_thing[label]),
      score=float(score),
      **about,
    )

  def _best(
    self, probabilities: np.ndarray, instances: Sequence[Segment]
  ) -> tuple[str, float] | None:
    """Name and score of the most certain query that says that there is something."""
    if "panoptic" not in self._kinds and instances:
      return instances[0].name, instances[0].score
    classes = probabilities.argmax(-1)
    something = np.flatnonzero(classes < len(self.task.classes))
    if not len(something):
      return None
    query = something[probabilities.max(-1)[something].argmax()]
    return self.task.classes[classes[query]], float(probabilities[query].max())


def segmenter(
  bundle: Bundle,
  origin: str,
  scale: Any = None,
  score_threshold: float | None = None,
  batch_size: int | None = None,
) -> PictureSegmenter:
  """What `effseg_jax.load` gives for this task; the options are explained there."""
  return PictureSegmenter(UniversalEngine(bundle, origin, scale, score_threshold), batch_size)


def _read_rows(outputs, valid, label, threshold, first_row, *, lengths, inference):
  """Sums and maps of some rows of a picture, see `mask_readout.read_strip`."""
  if "scores" in outputs:
    rows = mask_readout.label_strip(outputs["scores"], valid, label, first_row, lengths)
    return {}, {"semantic": rows.astype(jnp.uint8)}
  masks = outputs["mask_logits"]
  matrices = mask_readout.label_matrices(
    masks, valid, label, lengths=lengths, inference=inference, first_row=first_row
  )
  inside = (first_row + jnp.arange(lengths[0]) < label[0])[:, None]
  inside &= jnp.arange(lengths[1]) < label[1]
  return mask_readout.read_strip(
    outputs["probabilities"],
    masks,
    matrices,
    inside,
    inference=inference,
    score_threshold=threshold,
  )


def _number_segments(probabilities, sums, threshold, *, inference):
  return mask_readout.panoptic_segments(probabilities, sums, inference, threshold)


def _numbers(classes: Sequence[int]) -> list[int]:
  """How many of the same class came before, for each."""
  seen: dict[int, int] = {}
  numbers = []
  for label in map(int, classes):
    numbers.append(seen.get(label, 0))
    seen[label] = numbers[-1] + 1
  return numbers


def _width_of(cols: int) -> int:
  """A width that is not smaller, a multiple of 64: four to each doubling from 256 on."""
  if cols <= 256:
    return -(-cols // 64) * 64
  step = 2 ** ((cols - 1).bit_length() - 3)
  return -(-cols // step) * step


def _areas_and_boxes(
  panoptic_map: np.ndarray, count: int
) -> tuple[list[int], list[tuple[int, int, int, int]]]:
  """Pixels and (left, top, right, bottom) of the segments 1 to `count`."""
  areas = np.bincount(panoptic_map.ravel(), minlength=count + 1)[1:]
  boxes = []
  present = np.zeros((count + 1, panoptic_map.shape[0]), bool)
  for row, line in enumerate(panoptic_map):
    present[np.unique(line), row] = True
  for number in range(1, count + 1):
    rows = np.flatnonzero(present[number])
    if not len(rows):
      boxes.append((0, 0, 0, 0))
      continue
    top, bottom = rows[[0, -1]]
    cols = np.flatnonzero((panoptic_map[top : bottom + 1] == number).any(axis=0))
    boxes.append((int(cols[0]), int(top), int(cols[-1]) + 1, int(bottom) + 1))
  return areas.tolist(), boxes


def _packed_box(packed: np.ndarray, width: int) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of a mask of packed rows; zeros if it is empty."""
  rows = np.flatnonzero(packed.any(axis=1))
  if not len(rows):
    return (0, 0, 0, 0)
  columns = np.bitwise_or.reduce(packed[rows[0] : rows[-1] + 1], axis=0)
  cols = np.flatnonzero(np.unpackbits(columns, count=width))
  return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def _stacked(segments: Sequence[Segment], size: tuple[int, int]) -> np.ndarray:
  """int32 (H, W): the id of the most certain segment at each pixel, or 0."""
  found = np.zeros(size, np.int32)
  for segment in reversed(segments):
    found[segment.mask] = segment.id
  return found


def _checked_threshold(threshold: float) -> float:
  """Raises `UserError` for what is no score."""
  if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
    raise UserError(f"score_threshold is {threshold!r}; expected a number from 0 to below 1.")
  return float(threshold)
