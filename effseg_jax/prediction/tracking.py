"""Segments of a video keep their ids: overlap of masks and classes from frame to frame, no more.

A segment takes the id of the segment of its class in the frame before that it overlaps most, if the
intersection over union reaches a threshold; otherwise it gets a new one. What is not found for a
few frames is remembered where nothing else lies. Nothing is learned, and no motion is predicted:
objects that move by more than their size from frame to frame get new ids.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import linear_sum_assignment

from effseg_jax.prediction.results import Segment, UniversalResult

_LEAST_OVERLAP = 0.3  # intersection over union
_MEMORY = 10  # frames


class Tracker:
  """Gives the segments of frame after frame ids that stay with their objects."""

  def __init__(self) -> None:
    """Starts without a frame."""
    self._map: np.ndarray | None = None
    self._tracks: dict[int, tuple[int, int, int]] = {}  # id -> class, number in it, last frame
    self._next, self._frame = 1, 0
    self._numbers: dict[int, int] = {}

  def __call__(self, result: UniversalResult) -> UniversalResult:
    """The next frame's result, of the same size as the one before, with ids of the video."""
    if result.panoptic_map is None:
      return result
    self._frame += 1
    ids = self._ids(result)
    table = np.zeros(max([0, *(s.id for s in result.segments)]) + 1, np.int32)
    for segment in result.segments:
      table[segment.id] = ids[segment.id]
    panoptic_map = table[result.panoptic_map]
    segments = tuple(
      dataclasses.replace(
        segment,
        id=ids[segment.id],
        number=self._tracks[ids[segment.id]][1],
        _source=panoptic_map if segment._size is None else segment._source,
      )
      for segment in result.segments
    )
    self._remember(panoptic_map)
    return dataclasses.replace(result, segments=segments, panoptic_map=panoptic_map)

  def _ids(self, result: UniversalResult) -> dict[int, int]:
    """Id in the frame -> id in the video."""
    segments = result.segments
    old = sorted(self._tracks)
    found: dict[int, int] = {}
    if self._map is not None and self._map.shape == result.panoptic_map.shape and old and segments:
      overlap = _overlaps(result.panoptic_map, segments, self._map, old)
      for row, segment in enumerate(segments):
        for column, track in enumerate(old):
          if self._tracks[track][0] != segment.label:
            overlap[row, column] = 0.0
      for row, column in zip(*linear_sum_assignment(-overlap), strict=True):
        if overlap[row, column] >= _LEAST_OVERLAP:
          found[segments[row].id] = old[column]
    for segment in segments:
      if not segment.is_thing:  # there is one of each class
        same = [t for t in old if self._tracks[t][0] == segment.label]
        if same:
          found[segment.id] = same[0]
      if segment.id not in found:
        found[segment.id] = self._next
        self._next += 1
      track = found[segment.id]
      if track not in self._tracks:
        number = self._numbers.get(segment.label, 0)
        self._numbers[segment.label] = number + 1
        self._tracks[track] = segment.label, number, self._frame
      else:
        self._tracks[track] = (*self._tracks[track][:2], self._frame)
    return found

  def _remember(self, panoptic_map: np.ndarray) -> None:
    """Keeps the map, and in its gaps what was lost not long ago."""
    self._tracks = {
      track: kept for track, kept in self._tracks.items() if self._frame - kept[2] <= _MEMORY
    }
    lost = [track for track, kept in self._tracks.items() if kept[2] != self._frame]
    if lost and self._map is not None and self._map.shape == panoptic_map.shape:
      gaps = (panoptic_map == 0) & np.isin(self._map, lost)
      panoptic_map = np.where(gaps, self._map, panoptic_map)
    self._map = panoptic_map


def _overlaps(
  new_map: np.ndarray, segments: tuple[Segment, ...], old_map: np.ndarray, old: list[int]
) -> np.ndarray:
  """Intersection over union of new segments (rows) and old ones (columns)."""
  rows = np.zeros(int(new_map.max()) + 1, np.int64)
  for row, segment in enumerate(segments):
    if segment.id < len(rows):
      rows[segment.id] = row + 1
  columns = np.zeros(int(max(old_map.max(), old[-1])) + 1, np.int64)
  columns[old] = np.arange(len(old)) + 1
  width = len(old) + 1
  pairs = rows[new_map] * width + columns[old_map]
  counts = np.bincount(pairs.ravel(), minlength=(len(segments) + 1) * width).reshape(-1, width)
  both = counts[1:, 1:]
  union = counts[1:].sum(1)[:, None] + counts[:, 1:].sum(0) - both
  return both / np.maximum(union, 1)
