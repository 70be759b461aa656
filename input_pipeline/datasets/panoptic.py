"""Segments with classes: what panoptic, instance and semantic data are to a universal model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL, Example

# Value of an example's segment map where there is no segment; so an example has 255 at most.
NO_SEGMENT = 255
_MAX_SEGMENTS = 255


@dataclasses.dataclass(frozen=True, eq=False)
class ClassTable:
  """The classes of a data set, by class id.

  Attributes:
    names: K names.
    things: bool (K,); what can be counted. The other classes are stuff.
    ids: int64 (K,), the data set's own category ids, for files in its formats.
    palette: uint8 (K, 3), RGB.
  """

  names: tuple[str, ...]
  things: np.ndarray
  ids: np.ndarray
  palette: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class GroundTruth:
  """Everything that is annotated in one image, at its own size.

  Attributes:
    segments: int16 (L, H, W), the segment at each pixel, -1 for none (void). A segment lies in one
      of the L layers; there is one layer unless segments overlap.
    labels: int32 (n,), class of each segment.
    crowd: bool (n,); regions of many instances, which are neither trained on nor missed.
    areas: int64 (n,), pixels as annotated. ADE20K's things cover stuff, which keeps its area.
    image_id: the data set's own.
    name: of the image's file, without its ending.
  """

  segments: np.ndarray
  labels: np.ndarray
  crowd: np.ndarray
  areas: np.ndarray
  image_id: int | str
  name: str

  def semantic_map(self) -> np.ndarray:
    """Class of each pixel, crowds included: uint8 (H, W), 255 void. For one layer alone."""
    (segment_map,) = self.segments
    return np.append(self.labels, IGNORE_LABEL).astype(np.uint8)[segment_map]

  def masks(self) -> np.ndarray:
    """The segments one by one: bool (n, H, W)."""
    rows = np.arange(len(self.labels))[:, None, None, None]
    return (self.segments == rows).any(axis=1)


class UniversalDataset(abc.ABC):
  """A split whose examples are segments.

  Attributes:
    name: of the data set.
    split: of it.
    table: its classes.
    instances_json: the official annotations that AP is measured against, if they are there;
      otherwise AP is measured against `ground_truth`.
  """

  name: str
  split: str
  table: ClassTable
  instances_json: Path | None = None
  ignore_label = IGNORE_LABEL

  @property
  def classes(self) -> tuple[str, ...]:
    """Name per class id."""
    return self.table.names

  @property
  def palette(self) -> np.ndarray:
    """uint8 (K, 3)."""
    return self.table.palette

  @property
  def thing_mask(self) -> np.ndarray:
    """bool (K,)."""
    return self.table.things

  @property
  def class_ids(self) -> np.ndarray:
    """int64 (K,), the data set's category ids."""
    return self.table.ids

  @property
  def num_classes(self) -> int:
    """Number of classes, without void and without the model's "no object"."""
    return len(self.table.names)

  @abc.abstractmethod
  def __len__(self) -> int:
    """Number of images."""

  @abc.abstractmethod
  def image(self, index: int) -> np.ndarray:
    """The photograph, uint8 RGB (H, W, 3)."""

  @abc.abstractmethod
  def image_size(self, index: int) -> tuple[int, int]:
    """Rows and columns, without reading the image."""

  @abc.abstractmethod
  def ground_truth(self, index: int) -> GroundTruth:
    """Everything that is annotated in an image.

    Raises:
      UserError: for a broken file, or one that does not keep to the format.
    """

  def __getitem__(self, index: int) -> Example:
    """One example for training.

    Returns:
      `image` uint8 (H, W, 3); `segments` uint8 (L, H, W), the segment at each pixel and 255 for
      none; `labels` int32 (n,), n <= 255; `dropped_segments` int32 (), how many were too many;
      `valid_size` int32 (2,) and `name`. Crowds are left out.

    Raises:
      UserError: for a broken example, or an image of another size than its annotation.
    """
    truth, image = self.ground_truth(index), self.image(index)
    if image.shape[:2] != truth.segments.shape[1:]:
      raise UserError(
        f"{self.name}: the image {truth.name} is {image.shape[0]}x{image.shape[1]} and its"
        f" annotation is {truth.segments.shape[1]}x{truth.segments.shape[2]}; expected the same."
      )
    return make_example(image, truth)


def make_example(image: np.ndarray, truth: GroundTruth) -> Example:
  """Joins an image and its segments; see `UniversalDataset.__getitem__`."""
  kept = np.flatnonzero(~truth.crowd)
  dropped = max(len(kept) - _MAX_SEGMENTS, 0)
  if dropped:
    areas = segment_areas(truth.segments, len(truth.labels))[kept]
    kept = np.sort(kept[np.argsort(-areas, kind="stable")[:_MAX_SEGMENTS]])
  places = np.full(len(truth.labels) + 1, NO_SEGMENT, np.uint8)  # the last one is for -1
  places[kept] = np.arange(len(kept))
  return {
    "image": image,
    "segments": places[truth.segments],
    "labels": truth.labels[kept].astype(np.int32),
    "dropped_segments": np.int32(dropped),
    "valid_size": np.array(image.shape[:2], np.int32),
    "name": truth.name,
  }


def segment_areas(segments: np.ndarray, count: int) -> np.ndarray:
  """Pixels of each of `count` segments in an int16 map with -1 for none: int64 (count,)."""
  return np.bincount(segments.ravel() + 1, minlength=count + 1)[1:]


def stack_layers(
  masks: Iterable[np.ndarray], size: tuple[int, int], num_layers: int | None = None
) -> np.ndarray:
  """Puts masks that may overlap into layers: each into the first where it covers nobody.

  Args:
    masks: bool (H, W) each, the most important first.
    size: rows and columns.
    num_layers: how many there may be; None: as many as it takes.

  Returns:
    int16 (L, H, W), the mask at each pixel and -1 for none; at least one layer. A mask that found
    no room is in none of them.
  """
  layers = [np.full(size, -1, np.int16)]
  for row, mask in enumerate(masks):
    free = next((layer for layer in layers if not (layer[mask] >= 0).any()), None)
    if free is None:
      if num_layers is not None and len(layers) >= num_layers:
        continue
      free = np.full(size, -1, np.int16)
      layers.append(free)
    free[mask] = row
  return np.stack(layers)


@dataclasses.dataclass(frozen=True, eq=False)
class PanopticFiles(UniversalDataset):
  """Photographs and PNGs of segment ids in the COCO panoptic format.

  The records of 118,000 images are a few arrays: they load into a worker process in a blink.

  Attributes:
    name: of the data set.
    split: of it.
    table: its classes.
    json_path: where the records are from, for messages.
    image_folder: of the photographs.
    png_folder: of the segment ids, R + 256 G + 65536 B in each pixel, 0 void.
    image_names: bytes (N,), below `image_folder`.
    png_names: bytes (N,), below `png_folder`.
    image_ids: int64 or bytes (N,).
    sizes: int32 (N, 2), rows and columns; 0 where the json does not say.
    offsets: int64 (N + 1,); image i has the segments offsets[i] to offsets[i + 1].
    segment_ids: int64 (M,), as in the PNG.
    segment_labels: int32 (M,), class ids.
    segment_crowd: bool (M,).
    segment_areas: int64 (M,), pixels; -1 where the json does not say.
    instances_json: see `UniversalDataset`.
    stuff_may_be_covered: whether stuff may have fewer pixels than the json says.
  """

  name: str
  split: str
  table: ClassTable
  json_path: Path
  image_folder: Path
  png_folder: Path
  image_names: np.ndarray
  png_names: np.ndarray
  image_ids: np.ndarray
  sizes: np.ndarray
  offsets: np.ndarray
  segment_ids: np.ndarray
  segment_labels: np.ndarray
  segment_crowd: np.ndarray
  segment_areas: np.ndarray
  instances_json: Path | None = None
  stuff_may_be_covered: bool = False

  def __len__(self) -> int:
    return len(self.image_names)

  def image(self, index: int) -> np.ndarray:
    """See `UniversalDataset`."""
    return codecs.read_image(self._image_path(index))

  def image_size(self, index: int) -> tuple[int, int]:
    """From the json where it is told, otherwise from the file's header."""
    rows, cols = (int(side) for side in self.sizes[index])
    return (rows, cols) if rows else codecs.image_size(self._image_path(index))

  def ground_truth(self, index: int) -> GroundTruth:
    """See `UniversalDataset`.

    Raises:
      UserError: where PNG and json disagree on ids or areas, or there is no segment at all.
    """
    window = slice(self.offsets[index], self.offsets[index + 1])
    ids = self.segment_ids[window]
    path = self.png_folder / self.png_names[index].decode()
    if not len(ids):
      raise UserError(f"{self.json_path} has no segments for {path.name}; expected one at least.")
    segment_map = self._find_segments(read_segment_ids(path), ids, path)
    image_id = self.image_ids[index]
    return GroundTruth(
      segment_map[None],
      self.segment_labels[window],
      self.segment_crowd[window],
      self._check_areas(segment_map, window, path),
      image_id.decode() if isinstance(image_id, bytes) else int(image_id),
      Path(self.image_names[index].decode()).stem,
    )

  def _check_areas(self, segment_map: np.ndarray, window: slice, path: Path) -> np.ndarray:
    """Compares the areas in the PNG with those in the json; returns the latter, int64 (n,)."""
    told = self.segment_areas[window]
    found = segment_areas(segment_map, len(told))
    wrong = (found != told) & ((told >= 0) | (found == 0))
    if self.stuff_may_be_covered:
      wrong &= self.table.things[self.segment_labels[window]] | (found > told)
    if wrong.any():
      row = np.argmax(wrong)
      raise UserError(
        f"{path}: segment {self.segment_ids[window][row]} has {found[row]} pixels; expected"
        f" {told[row] if told[row] >= 0 else 'some'}, as {self.json_path.name} lists it."
      )
    return np.where(told >= 0, told, found)

  def _find_segments(self, stored: np.ndarray, ids: np.ndarray, path: Path) -> np.ndarray:
    """Segment ids of a PNG -> rows of `ids`, -1 void: int16 (H, W)."""
    order = np.argsort(ids)
    place = np.searchsorted(ids[order[:-1]], stored)  # the last one stands for all beyond
    row = order.astype(np.int16)[place]
    unknown = ids[row] != stored
    void = stored == 0
    if (unknown & ~void).any():
      raise UserError(
        f"{path} holds the segment id {stored[unknown & ~void][0]}, which {self.json_path.name}"
        " does not list for it; expected the listed ids and 0."
      )
    row[unknown] = -1
    return row

  def _image_path(self, index: int) -> Path:
    return self.image_folder / self.image_names[index].decode()


def read_segment_ids(path: Path) -> np.ndarray:
  """Decodes a panoptic PNG: int32 (H, W), R + 256 G + 65536 B."""
  rgb = codecs.read_image(path).astype(np.int32)
  return rgb[..., 0] + (rgb[..., 1] << 8) + (rgb[..., 2] << 16)


@dataclasses.dataclass(frozen=True, eq=False)
class SemanticSegments(UniversalDataset):
  """A data set of semantic segmentation in other words: one segment per class in the image.

  Attributes:
    dataset: with `label` in its examples.
  """

  dataset: Any

  @property
  def name(self) -> str:
    """Of the data set."""
    return self.dataset.name

  @property
  def split(self) -> str:
    """Of the data set."""
    return self.dataset.split

  @property
  def table(self) -> ClassTable:
    """All classes are stuff; the ids are the class ids."""
    count = len(self.dataset.classes)
    return ClassTable(
      tuple(self.dataset.classes), np.zeros(count, bool), np.arange(count), self.dataset.palette
    )

  def __len__(self) -> int:
    return len(self.dataset)

  def __getitem__(self, index: int) -> Example:
    """See `UniversalDataset`; the files are read once."""
    example = self.dataset[index]
    return make_example(example["image"], _segments_of(example, index))

  def image(self, index: int) -> np.ndarray:
    """See `UniversalDataset`."""
    return self.dataset[index]["image"]

  def image_size(self, index: int) -> tuple[int, int]:
    """See `UniversalDataset`."""
    return self.dataset.image_size(index)

  def ground_truth(self, index: int) -> GroundTruth:
    """One segment per class."""
    return _segments_of(self.dataset[index], index)


def _segments_of(example: Example, index: int) -> GroundTruth:
  label = example["label"]
  counts = np.bincount(label.ravel(), minlength=256)[:IGNORE_LABEL]
  present = np.flatnonzero(counts)
  rows = np.full(256, -1, np.int16)
  rows[present] = np.arange(len(present))
  return GroundTruth(
    rows[label][None],
    present.astype(np.int32),
    np.zeros(len(present), bool),
    counts[present],
    index,
    example["name"],
  )


def as_universal(dataset: Any) -> UniversalDataset:
  """A data set for universal models: as it is, or its class maps as segments.

  Raises:
    UserError: if there are neither segments nor class maps.
  """
  if isinstance(dataset, UniversalDataset):
    return dataset
  if not hasattr(dataset, "palette"):
    raise UserError(
      f"{dataset.name} is labelled with a class per image; a universal model needs segments."
    )
  return SemanticSegments(dataset)


def category_table(
  categories: Sequence[dict[str, Any]], palette: np.ndarray, *, things_first: bool
) -> ClassTable:
  """The classes of a COCO json, in the order of their ids.

  Args:
    categories: with `id`, `name` and `isthing` (1 if it is missing), and perhaps `color`.
    palette: uint8 (>= K, 3), for classes without a `color`.
    things_first: whether all things come before all stuff.
  """
  order = sorted(
    categories, key=lambda entry: (things_first and not entry.get("isthing", 1), entry["id"])
  )
  colours = [entry.get("color", palette[row]) for row, entry in enumerate(order)]
  return ClassTable(
    tuple(entry["name"] for entry in order),
    np.array([bool(entry.get("isthing", 1)) for entry in order]),
    np.array([entry["id"] for entry in order], np.int64),
    np.array(colours, np.uint8).reshape(-1, 3),
  )
