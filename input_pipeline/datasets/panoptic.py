"""Segments with classes: panoptic, instance and semantic data for universal models."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import coco_values
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL, Example
from effseg_jax.input_pipeline.datasets.mask_runs import MaskRuns

# Value of an example's segment map where there is no segment; so an example has 255 at most.
NO_SEGMENT = 255
_MAX_SEGMENTS = 255


@dataclasses.dataclass(frozen=True, eq=False)
class ClassTable:
  """The classes of a data set, by class id.

  Attributes:
    names: K names.
    things: bool (K,); countable objects. The other classes are stuff.
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
      of the L layers; there is one layer unless segments overlap. Many objects on a large picture
      are `MaskRuns`, which becomes that array when numpy asks for it.
    labels: int32 (n,), class of each segment.
    crowd: bool (n,); regions of many instances, which are neither trained on nor missed.
    areas: int64 (n,), pixels as annotated. ADE20K's things cover stuff, which keeps its area.
    image_id: the data set's own.
    name: of the image's file, without its ending.
  """

  segments: np.ndarray | MaskRuns
  labels: np.ndarray
  crowd: np.ndarray
  areas: np.ndarray
  image_id: int | str
  name: str

  @property
  def size(self) -> tuple[int, int]:
    """Rows and columns of the image."""
    if isinstance(self.segments, MaskRuns):
      return self.segments.extent
    return self.segments.shape[1], self.segments.shape[2]

  def semantic_map(self) -> np.ndarray:
    """Class of each pixel, crowds included: uint8 (H, W), 255 void. For one layer alone."""
    (segment_map,) = self.segments
    return np.append(self.labels, IGNORE_LABEL).astype(np.uint8)[segment_map]

  def masks(self) -> np.ndarray:
    """The segments: bool (n, H, W)."""
    found = list(self.each_mask())
    return np.stack(found) if found else np.zeros((0, *self.size), bool)

  def each_mask(self) -> Iterator[np.ndarray]:
    """The segments one by one, bool (H, W)."""
    if isinstance(self.segments, MaskRuns):
      yield from self.segments.masks()
      return
    for row in range(len(self.labels)):
      yield (self.segments == row).any(axis=0)

  def overlaps(self) -> bool:
    """Whether a pixel has more than one segment."""
    if not isinstance(self.segments, MaskRuns):
      return len(self.segments) > 1
    covered = np.zeros(self.size, bool)
    for mask in self.each_mask():
      if (covered & mask).any():
        return True
      covered |= mask
    return False

  def flat_map(self) -> np.ndarray:
    """The last segment at each pixel, for drawing: int16 (H, W), -1 for none."""
    if not isinstance(self.segments, MaskRuns):
      return self.segments.max(axis=0)
    top = np.full(self.size, -1, np.int16)
    for row, mask in enumerate(self.each_mask()):
      top[mask] = row
    return top


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
    if image.shape[:2] != truth.size:
      rows, cols = truth.size
      hint = ""
      if image.shape[:2] == (cols, rows):
        hint = (
          " The picture is turned upright by its EXIF orientation; the annotation fits it as it was"
          " before."
        )
      raise UserError(
        f"{self.name}: the image {truth.name} is {image.shape[0]}x{image.shape[1]} and its"
        f" annotation is {rows}x{cols}; expected the same.{hint}"
      )
    return make_example(image, truth)


def make_example(image: np.ndarray, truth: GroundTruth) -> Example:
  """Joins an image and its segments; see `UniversalDataset.__getitem__`."""
  kept = np.flatnonzero(~truth.crowd)
  dropped = max(len(kept) - _MAX_SEGMENTS, 0)
  many = isinstance(truth.segments, MaskRuns)
  if dropped:
    areas = truth.areas if many else segment_areas(truth.segments, len(truth.labels))
    kept = np.sort(kept[np.argsort(-areas[kept], kind="stable")[:_MAX_SEGMENTS]])
  places = np.full(len(truth.labels) + 1, NO_SEGMENT, np.uint8)  # the last one is for -1
  places[kept] = np.arange(len(kept))
  return {
    "image": image,
    "segments": truth.segments.chosen(kept, NO_SEGMENT) if many else places[truth.segments],
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
    sizes: int32 (N, 2), rows and columns; 0 where the json has none.
    offsets: int64 (N + 1,); image i has the segments offsets[i] to offsets[i + 1].
    segment_ids: int64 (M,), as in the PNG.
    segment_labels: int32 (M,), class ids.
    segment_crowd: bool (M,).
    segment_areas: int64 (M,), pixels; -1 where the json has none.
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
    """From the json, else from the file's header."""
    rows, cols = (int(side) for side in self.sizes[index])
    return (rows, cols) if rows else codecs.image_size(self._image_path(index))

  def ground_truth(self, index: int) -> GroundTruth:
    """See `UniversalDataset`.

    Raises:
      UserError: where the PNG has ids that the json does not list.
    """
    window = slice(self.offsets[index], self.offsets[index + 1])
    ids = self.segment_ids[window]
    path = self.png_folder / self.png_names[index].decode()
    segment_map = self._find_segments(codecs.read_ids(path), ids, path)
    image_id = self.image_ids[index]
    areas, drawn = self._areas(segment_map, window)
    if not drawn.all():  # nobody can find a segment without a pixel
      rows = np.append(np.where(drawn, np.cumsum(drawn) - 1, -1), -1).astype(np.int16)
      segment_map = rows[segment_map]
    return GroundTruth(
      segment_map[None],
      self.segment_labels[window][drawn],
      self.segment_crowd[window][drawn],
      areas[drawn],
      image_id.decode() if isinstance(image_id, bytes) else int(image_id),
      Path(self.image_names[index].decode()).stem,
    )

  def _areas(self, segment_map: np.ndarray, window: slice) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each segment, int64 (n,), and whether it is there, bool (n,).

    They are counted in the PNG: tools round the area of the json, or write that of the box. Stuff
    that lies under things keeps the area it has without them.
    """
    told = self.segment_areas[window]
    found = segment_areas(segment_map, len(told))
    covered = np.zeros(len(told), bool)
    if self.stuff_may_be_covered:
      covered = ~self.table.things[self.segment_labels[window]] & (told > found)
    return np.where(covered, told, found), (found > 0) | covered

  def _find_segments(self, stored: np.ndarray, ids: np.ndarray, path: Path) -> np.ndarray:
    """Segment ids of a PNG -> rows of `ids`, -1 void: int16 (H, W)."""
    void = stored == 0
    if not len(ids):
      row, unknown = np.full(stored.shape, -1, np.int16), ~void
    else:
      order = np.argsort(ids)
      place = np.searchsorted(ids[order[:-1]], stored)  # the last one stands for all beyond
      row = order.astype(np.int16)[place]
      unknown = ids[row] != stored
    if (unknown & ~void).any():
      swapped = ((stored & 255) << 16) + (stored & 0xFF00) + (stored >> 16)
      hint = ""
      if np.isin(swapped, np.append(ids, 0)).all():
        hint = (
          " With red and blue exchanged they are those of the json: OpenCV has written the PNG as"
          " BGR; read it with cv2.imread and write it with its channels reversed."
        )
      raise UserError(
        f"{path} holds the segment id {stored[unknown & ~void][0]}, which {self.json_path.name}"
        f" does not list for it; expected the listed ids and 0.{hint}"
      )
    row[unknown] = -1
    return row

  def _image_path(self, index: int) -> Path:
    return self.image_folder / self.image_names[index].decode()


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
    palette: uint8 (>= K, 3), for classes without a `color` of three numbers from 0 to 255.
    things_first: whether all things come before all stuff.
  """
  thing = [bool(coco_values.flag(entry.get("isthing", 1))) for entry in categories]
  rows = sorted(
    range(len(categories)), key=lambda row: (things_first and not thing[row], categories[row]["id"])
  )
  order = [categories[row] for row in rows]
  colours = [_colour(entry.get("color"), palette[row]) for row, entry in enumerate(order)]
  return ClassTable(
    tuple(entry["name"] for entry in order),
    np.array([thing[row] for row in rows]),
    np.array([entry["id"] for entry in order], np.int64),
    np.array(colours, np.uint8).reshape(-1, 3),
  )


def _colour(told: Any, default: np.ndarray) -> Any:
  sound = isinstance(told, list) and len(told) == 3
  sound = sound and all(isinstance(part, int) and 0 <= part <= 255 for part in told)
  return told if sound else default
