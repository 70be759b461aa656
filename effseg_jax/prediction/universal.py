"""Universal segmentation of pictures: segments with names and scores, instances, class maps."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from effseg_jax.evaluators.universal import mask_inference_options
from effseg_jax.inference.mask_readout import Segmentations, segment_batch
from effseg_jax.inference.segments import canvas_for, instance_result, panoptic_result
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.eval_universal import ShortestEdgeRule
from effseg_jax.input_pipeline.transforms_universal import resize_image
from effseg_jax.metrics.coco_results import encode_mask
from effseg_jax.pictures import semantic as pictures
from effseg_jax.pictures import universal as pictures_universal
from effseg_jax.prediction import pictures_in
from effseg_jax.prediction.semantic import class_shares, size_rule
from effseg_jax.tasks.universal import UniversalTask
from effseg_jax.weights.bundle import Bundle

# How COCO's models are used, where a bundle does not say.
_DEFAULTS = {
  "short_side": 800,
  "max_size": 1333,
  "multiple": 32,
  "panoptic": True,
  "instance": True,
  "semantic": True,
  "score_threshold": 0.8,
  "overlap_threshold": 0.8,
  "detections": 100,
}


class UniversalPredictor:
  """Segments pictures of any size; one program is compiled per network and canvas size.

  For each picture, as far as the model was evaluated for it:

  * `STEM_panoptic.png`, segment ids as COCO codes them (R + 256 G + 65536 B, 0 for none), and
    `STEM_panoptic.json` with class, score and area of each;
  * `STEM_instances.json`: class, score and run-length coded mask of each;
  * `STEM_semantic.png`, the class of every pixel as an 8-bit PNG with a palette;
  * `STEM_overlay.png`: the picture tinted by segment, with names and scores.
  """

  def __init__(self, bundle: Bundle, scale: str | None = None):
    """Puts the weights on the device.

    Args:
      bundle: of a universal model.
      scale: the size at which the network sees pictures: `"1333x800"` (they are fitted into that
        frame, keeping their ratio) or a factor such as `"1.5"`; None: as the model was evaluated.
    """
    self.task = universal_task(bundle)
    settings = {**_DEFAULTS, **(bundle.card.get("inference") or {})}
    self._inference = mask_inference_options(settings, self.task)
    self._rule = ShortestEdgeRule(
      settings["short_side"], settings["max_size"], settings["multiple"]
    )
    self._size = self._rule.image if scale is None else size_rule(bundle, scale)
    self._model = bundle.model
    self._variables = jax.device_put(bundle.variables)
    self._programs: dict[tuple[int, ...], Callable] = {}

  def inputs(self, source: Path) -> list[Path]:
    """The picture, or the pictures of a folder."""
    return pictures_in(source)

  def __call__(self, path: Path, stem: Path) -> str:
    """Writes the result files; returns what was found and the time.

    Raises:
      UserError: if the picture cannot be read.
    """
    image = codecs.read_image(path)
    found, milliseconds = self.segment(image)
    size = image.shape[:2]
    told, overlay = "", None
    if self._inference.semantic:
      class_map = found.semantic[0, : size[0], : size[1]]
      told, overlay = self._write_semantic(image, class_map, stem)
    if self._inference.instance:
      told, overlay = self._write_instances(image, instance_result(found, 0, size), stem)
    if self._inference.panoptic:
      result = panoptic_result(found, 0, size, self.task.is_thing)
      told, overlay = self._write_panoptic(image, result, stem)
    Image.fromarray(overlay).save(stem.with_name(f"{stem.name}_overlay.png"))
    return f"{told}  {milliseconds:.0f} ms"

  def segment(self, image: np.ndarray) -> tuple[Segmentations, float]:
    """Segments a picture.

    Args:
      image: uint8 RGB (H, W, 3).

    Returns:
      Results of a batch of one (host arrays, see `Segmentations`), and the milliseconds they took,
      compilation not counted.
    """
    rows, cols = size = self._size(image.shape[:2])
    multiple = self._rule.multiple
    padded = np.zeros(
      (-(-rows // multiple) * multiple, -(-cols // multiple) * multiple, 3), np.uint8
    )
    padded[:rows, :cols] = resize_image(image, size)
    batch = {
      "image": padded[None],
      "valid_size": np.array([size], np.int32),
      "label_size": np.array([image.shape[:2]], np.int32),
    }
    program = self._program(batch, canvas_for([image.shape[:2]]))
    begin = time.perf_counter()
    found = jax.device_get(program(self._variables, batch))
    return found, 1000 * (time.perf_counter() - begin)

  def _program(self, batch: Mapping[str, np.ndarray], canvas: tuple[int, int]) -> Callable:
    key = (*batch["image"].shape[1:3], *canvas)
    if key not in self._programs:

      def run(variables: Any, batch: Mapping[str, jax.Array]) -> Segmentations:
        outputs = self._model.apply(variables, *self.task.model_inputs(batch), train=False)
        sizes = batch["valid_size"], batch["label_size"]
        return segment_batch(outputs, *sizes, canvas, self._inference)

      # Compiled ahead of the first call, so that the time reported is that of running.
      self._programs[key] = jax.jit(run).lower(self._variables, batch).compile()
    return self._programs[key]

  def _write_semantic(self, image: np.ndarray, class_map: np.ndarray, stem: Path):
    """Writes the class map; returns the line to print and the overlay."""
    task = self.task
    indexed = Image.fromarray(class_map)
    indexed.putpalette(np.asarray(task.palette, np.uint8).tobytes())
    indexed.save(stem.with_name(f"{stem.name}_semantic.png"))
    tinted = pictures.overlay(image, class_map, task.palette)
    tinted = pictures.with_legend(tinted, class_map, task.classes, task.palette)
    return class_shares(class_map, task.classes), tinted

  def _write_instances(self, image: np.ndarray, found: Mapping[str, np.ndarray], stem: Path):
    """Writes the instances; returns the line to print and the overlay of the certain ones."""
    names = [self.task.classes[label] for label in found["labels"]]
    entries = [
      {"class": name, "score": round(float(score), 4), "segmentation": encode_mask(mask)}
      for name, score, mask in zip(names, found["scores"], found["masks"], strict=True)
      if mask.any()
    ]
    _write_json(stem.with_name(f"{stem.name}_instances.json"), entries)
    certain = np.flatnonzero(found["scores"] > self._inference.score_threshold)
    certain = certain[np.argsort(-found["scores"][certain], kind="stable")]
    segment_map = pictures_universal.stack_masks(found["masks"][certain])
    texts = [f"{names[i]} {found['scores'][i]:.2f}" for i in certain]
    overlay = self._overlay(image, segment_map, found["labels"][certain], texts)
    return _told([names[i] for i in certain]), overlay

  def _write_panoptic(self, image: np.ndarray, result: Mapping[str, Any], stem: Path):
    """Writes the segments; returns the line to print and the overlay."""
    ids, segments = result["segmentation"], result["segments_info"]
    coded = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    Image.fromarray(coded).save(stem.with_name(f"{stem.name}_panoptic.png"))
    areas = np.bincount(ids.ravel(), minlength=len(segments) + 1)
    names = [self.task.classes[segment["label_id"]] for segment in segments]
    entries = [
      {
        "id": segment["id"],
        "class": name,
        "isthing": int(segment["is_thing"]),
        "score": round(segment["score"], 4),
        "area": int(areas[segment["id"]]),
      }
      for segment, name in zip(segments, names, strict=True)
    ]
    _write_json(stem.with_name(f"{stem.name}_panoptic.json"), entries)
    texts = [f"{entry['class']} {entry['score']:.2f}" for entry in entries]
    labels = [segment["label_id"] for segment in segments]
    return _told(names), self._overlay(image, ids - 1, labels, texts)

  def _overlay(self, image, segment_map: np.ndarray, labels, texts: list[str]) -> np.ndarray:
    colours = pictures_universal.segment_colours(labels, self.task.is_thing, self.task.palette)
    painted = pictures_universal.paint_segments(image, segment_map, colours)
    return pictures_universal.write_names(painted, segment_map, texts)


def universal_task(bundle: Bundle) -> UniversalTask:
  """The task that a bundle's card describes."""
  card = bundle.card["task"]
  known = {field.name for field in dataclasses.fields(UniversalTask)}
  fields = {key: value for key, value in card.items() if key in known}
  fields["palette"] = tuple(tuple(colour) for colour in fields["palette"])
  return UniversalTask(
    **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
  )


def _told(names: list[str]) -> str:
  """`"2 person, sky, ..."`: what was found, in the order of finding."""
  counts: dict[str, int] = {}
  for name in names:
    counts[name] = counts.get(name, 0) + 1
  return ", ".join(f"{n} {name}" if n > 1 else name for name, n in counts.items()) or "nothing"


def _write_json(path: Path, entries: list[dict[str, Any]]) -> None:
  path.write_text(json.dumps(entries, ensure_ascii=False) + "\n", encoding="utf-8")
