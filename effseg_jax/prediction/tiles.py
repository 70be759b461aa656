"""Reading logits in a picture's own size: a tile at a time, by one program for all sizes."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import jax
import numpy as np

from effseg_jax.inference.semantic import tile_classes
from effseg_jax.prediction.programs import Programs

# Rows and columns of what is read at once, for pictures up to the first width and for wider ones.
_TILES = ((128, 512), (128, 1024))

# Scores of a tile take four bytes for each class and pixel: an eighth of a gigabyte at most.
_MAX_SCORES = 2**25


def class_map(
  programs: Programs,
  views: Sequence[jax.Array],
  row: int,
  size: tuple[int, int],
  *,
  averages_scores: bool = False,
) -> tuple[np.ndarray, float]:
  """The most likely class of every pixel of one picture.

  Args:
    programs: of the model.
    views: logits (B, h, w, K) of each view, see `inference.semantic.view_logits`.
    row: of the picture in the batch.
    size: (rows, cols) of the picture.
    averages_scores: see `inference.semantic.Inference.scores`.

  Returns:
    uint8 (rows, cols), and the seconds that it took, compilation not counted.
  """
  tile_rows, tile_cols = _TILES[size[1] > _TILES[0][1]]
  tile_rows = max(1, min(tile_rows, _MAX_SCORES // (tile_cols * views[0].shape[-1])))
  tile = tile_rows, tile_cols
  place = np.int32(row), np.asarray(size, np.int32)
  key = ("tile", tile, averages_scores, *(view.shape for view in views))
  function = functools.partial(tile_classes, tile=tile, averages_scores=averages_scores)
  read = programs.get(key, function, tuple(views), *place, np.zeros(2, np.int32))
  begin = time.perf_counter()
  found = np.empty(size, np.uint8)
  for top in range(0, size[0], tile_rows):
    for left in range(0, size[1], tile_cols):
      window = np.s_[top : top + tile_rows, left : left + tile_cols]
      rows, cols = found[window].shape
      origin = np.array((top, left), np.int32)
      found[window] = np.asarray(read(tuple(views), *place, origin))[:rows, :cols]
  return found, time.perf_counter() - begin
