"""What prediction returns for a picture: one frozen dataclass for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from effseg_jax.metrics.coco_results import encode_mask
from effseg_jax.pictures import semantic as pictures
from effseg_jax.pictures import universal as pictures_universal
from effseg_jax.prediction.writing import save_indexed, save_json, save_picture

Palette = tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class SemanticResult:
  """Semantic segmentation of a picture of H rows and W columns.

  Attributes:
    image: uint8 (H, W, 3), the picture.
    class_map: uint8 (H, W), the class id of every pixel.
    classes: the name of each class id.
    palette: (red, green, blue), 0 to 255, of each class id.
    milliseconds: that network and resizing took, compilation not counted.
  """

  image: np.ndarray
  class_map: np.ndarray
  classes: tuple[str, ...]
  palette: Palette
  milliseconds: float = 0.0

  def shares(self) -> dict[str, float]:
    """Share of the pixels, 0 to 1, of each class that occurs, the largest first."""
    return class_shares(self.class_map, self.classes)

  def overlay(self, *, legend: bool = True) -> np.ndarray:
    """The picture tinted by class, uint8 (rows, cols, 3).

    Args:
      legend: adds the names and shares to the right, which makes the picture wider.
    """
    tinted = pictures.overlay(self.image, self.class_map, self.palette)
    if not legend:
      return tinted
    return pictures.with_legend(tinted, self.class_map, self.classes, self.palette)

  def save(self, stem: str | Path) -> list[Path]:
    """Writes files; folders are made where they are missing.

    Args:
      stem: path without suffix, `out/street` for example. Written are `street_classes.png`, the
        class ids as an 8-bit PNG with a palette, and `street_overlay.png`.

    Returns:
      The paths.
    """
    return [
      save_indexed(self.class_map, self.palette, _beside(stem, "_classes.png")),
      save_picture(self.overlay(), _beside(stem, "_overlay.png")),
    ]

  def describe(self) -> str:
    """`"road 31%, sky 20%, ..."`."""
    return described_shares(self.shares())


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
  """One object, or all of one kind of background, in a picture of H rows and W columns.

  Attributes:
    id: its number in `panoptic_map`, from 1 on; of an instance its rank by score, from 1 on.
    label: class id.
    name: of the class.
    is_thing: whether objects of the class are told apart.
    score: 0 to 1.
    area: pixels.
    box: (left, top, right, bottom) in pixels, right and bottom exclusive.
    number: among the segments of its class, from 0 on; varies the colour.
  """

  id: int
  label: int
  name: str
  is_thing: bool
  score: float
  area: int
  box: tuple[int, int, int, int]
  number: int
  _source: np.ndarray = dataclasses.field(repr=False)
  _size: tuple[int, int] | None = dataclasses.field(default=None, repr=False)

  @property
  def mask(self) -> np.ndarray:
    """bool (H, W), made when it is asked for: a hundred masks of a photograph fill a memory."""
    if self._size is None:
      return self._source == self.id
    rows, cols = self._size
    return np.unpackbits(self._source[:rows], axis=-1, count=cols).view(bool)


@dataclasses.dataclass(frozen=True, eq=False)
class UniversalResult:
  """Universal segmentation of a picture of H rows and W columns, what the model was trained for.

  Attributes:
    image: uint8 (H, W, 3), the picture.
    segments: of panoptic segmentation, in the order of the model's queries: they do not overlap,
      and `panoptic_map` holds their ids. Where the model finds instances alone: those above the
      threshold, the most certain first; they may overlap.
    panoptic_map: int32 (H, W), the id of the segment at each pixel, 0 for none; None where the
      model finds class maps alone.
    instances: every instance, the most certain first, whatever its score; empty where the model
      finds none.
    class_map: uint8 (H, W), the class id of every pixel; None where the model finds none.
    classes: the name of each class id.
    palette: (red, green, blue), 0 to 255, of each class id.
    score_threshold: above which something became a segment.
    best: name and score of the most certain finding; None if every query says "no object".
    milliseconds: that network and reading took, compilation not counted.
  """

  image: np.ndarray
  segments: tuple[Segment, ...]
  panoptic_map: np.ndarray | None
  instances: tuple[Segment, ...]
  class_map: np.ndarray | None
  classes: tuple[str, ...]
  palette: Palette
  score_threshold: float
  best: tuple[str, float] | None
  kinds: tuple[str, ...]
  milliseconds: float = 0.0

  def shares(self) -> dict[str, float]:
    """Share of the pixels, 0 to 1, of each class that occurs, the largest first."""
    if self.class_map is not None and self.panoptic_map is None:
      return class_shares(self.class_map, self.classes)
    shares: dict[str, float] = {}
    for segment in self.segments:
      part = segment.area / self.image[..., 0].size
      shares[segment.name] = shares.get(segment.name, 0.0) + part
    return dict(sorted(shares.items(), key=lambda item: -item[1]))

  def overlay(self, *, names: bool = True) -> np.ndarray:
    """The picture tinted by segment, uint8 (rows, cols, 3).

    Args:
      names: writes names and scores into the segments (beside the picture, where there are class
        maps alone).
    """
    if self.panoptic_map is None:
      tinted = pictures.overlay(self.image, self.class_map, self.palette)
      if not names:
        return tinted
      return pictures.with_legend(tinted, self.class_map, self.classes, self.palette)
    things = [False] * len(self.classes)
    for segment in self.segments:
      things[segment.label] = segment.is_thing
    labels, numbers = ([getattr(s, name) for s in self.segments] for name in ("label", "number"))
    colours = pictures_universal.segment_colours(labels, things, self.palette, numbers)
    rows = np.full(max([0, *(segment.id for segment in self.segments)]) + 1, -1)
    for row, segment in enumerate(self.segments):
      rows[segment.id] = row
    segment_map = rows[self.panoptic_map]
    painted = pictures_universal.paint_segments(self.image, segment_map, colours)
    if not names:
      return painted
    texts = [f"{segment.name} {segment.score:.2f}" for segment in self.segments]
    return pictures_universal.write_names(painted, segment_map, texts)

  def coded_map(self) -> np.ndarray:
    """`panoptic_map` as COCO codes it in pictures: R + 256 G + 65536 B, uint8 (H, W, 3)."""
    ids = self.panoptic_map
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)

  def save(self, stem: str | Path) -> list[Path]:
    """Writes files; folders are made where they are missing.

    Args:
      stem: path without suffix, `out/street` for example. Written are, as far as the model was
        trained for it, `street_panoptic.png`, segment ids as COCO codes them (R + 256 G + 65536 B,
        0 for none) with `street_panoptic.json`; `street_instances.json`, class, score and
        run-length coded mask of each; `street_semantic.png`, class ids as an 8-bit PNG with a
        palette; and always `street_overlay.png`.

    Returns:
      The paths.
    """
    written = []
    if "panoptic" in self.kinds:
      written.append(save_picture(self.coded_map(), _beside(stem, "_panoptic.png")))
      entries = [
        {
          "id": segment.id,
          "class": segment.name,
          "isthing": int(segment.is_thing),
          "score": round(segment.score, 4),
          "area": segment.area,
        }
        for segment in self.segments
      ]
      written.append(save_json(entries, _beside(stem, "_panoptic.json")))
    if "instance" in self.kinds:
      entries = [
        {
          "class": segment.name,
          "score": round(segment.score, 4),
          "segmentation": encode_mask(segment.mask),
        }
        for segment in self.instances
        if segment.area
      ]
      written.append(save_json(entries, _beside(stem, "_instances.json")))
    if "semantic" in self.kinds:
      path = _beside(stem, "_semantic.png")
      written.append(save_indexed(self.class_map, self.palette, path))
    return [*written, save_picture(self.overlay(), _beside(stem, "_overlay.png"))]

  def describe(self) -> str:
    """`"2 person, sky"`; where there is nothing, what came closest."""
    if self.panoptic_map is None:
      return described_shares(self.shares())
    counts: dict[str, int] = {}
    for segment in self.segments:
      counts[segment.name] = counts.get(segment.name, 0) + 1
    if counts:
      return ", ".join(f"{n} {name}" if n > 1 else name for name, n in counts.items())
    if self.best is None:
      return "nothing: every query says that there is no object"
    name, score = self.best
    threshold = f"{self.score_threshold:g}"
    if score <= self.score_threshold:
      lower = max(np.floor(10 * score) / 10, 0.05)
      if lower >= score:
        lower = score / 2
      return f"nothing above {threshold}; the best is {name} {score:.2f}, try" + (
        f" --score_threshold={lower:.2g}"
      )
    return f"nothing: the best is {name} {score:.2f}, but others cover most of its mask"


def class_shares(class_map: np.ndarray, classes: tuple[str, ...]) -> dict[str, float]:
  """Share of the pixels, 0 to 1, of each class that occurs, the largest first."""
  counts = np.bincount(class_map.ravel(), minlength=len(classes))
  order = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
  return {classes[index]: counts[index] / class_map.size for index in order}


def described_shares(shares: Mapping[str, float]) -> str:
  """`"road 31%, sky 20%, ..."`."""
  return ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())


def _beside(stem: str | Path, ending: str) -> Path:
  stem = Path(stem)
  return stem.with_name(f"{stem.name}{ending}")
