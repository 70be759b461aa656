"""Masks of many objects on a large picture, as run lengths until they are small enough to draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from effseg_jax.errors import extra


@dataclasses.dataclass(frozen=True, eq=False)
class MaskRuns(np.lib.mixins.NDArrayOperatorsMixin):
  """Masks that may overlap; an array of layers (L, H, W) when numpy asks for one.

  A hundred objects on 12 megapixels take 1.2 GB as binary masks, and a few kilobytes here. What
  augmentation does to them (crop, mirror, resize to the nearest pixel, pad) chooses rows and
  columns; they are decoded one by one when they are drawn.

  Attributes:
    counts: COCO's compressed run lengths of each mask, the most important first.
    size: rows and columns that they have.
    rows: int64 (H,), row of the mask for each row, -1 for padding.
    cols: int64 (W,), the same for columns.
    void: value of a layer where there is no mask: -1 in int16 layers, 255 in uint8.
  """

  counts: tuple[bytes, ...]
  size: tuple[int, int]
  rows: np.ndarray
  cols: np.ndarray
  void: int = -1

  @classmethod
  def of(cls, counts: Sequence[bytes], size: tuple[int, int], void: int = -1) -> MaskRuns:
    """The masks as they are."""
    return cls(tuple(counts), tuple(size), np.arange(size[0]), np.arange(size[1]), void)

  def masks(self) -> Iterator[np.ndarray]:
    """Each mask, bool (H, W); one is held at a time."""
    with extra("coco"):
      from pycocotools import mask as coco_mask

    inside = self.rows.min(initial=0) >= 0 and self.cols.min(initial=0) >= 0
    whole = inside and self._is_whole()
    for counts in self.counts:
      mask = coco_mask.decode({"size": list(self.size), "counts": counts}).view(bool)
      if not whole:
        mask = mask.T[self.cols].T[self.rows]  # columns lie together
        if not inside:
          mask[self.rows < 0] = False
          mask[:, self.cols < 0] = False
      yield mask

  def chosen(self, places: Sequence[int], void: int) -> MaskRuns:
    """Some of the masks, in the order of `places`."""
    counts = tuple(self.counts[place] for place in places)
    return dataclasses.replace(self, counts=counts, void=void)

  def resized(self, size: tuple[int, int]) -> MaskRuns:
    """Resized to the nearest pixel, as Pillow chooses it."""
    return dataclasses.replace(
      self, rows=_nearest(self.rows, size[0]), cols=_nearest(self.cols, size[1])
    )

  def padded(self, size: tuple[int, int]) -> MaskRuns:
    """Padded below and to the right."""
    rows, cols = (
      np.pad(lines, (0, side - len(lines)), constant_values=-1)
      for lines, side in zip((self.rows, self.cols), size, strict=True)
    )
    return dataclasses.replace(self, rows=rows, cols=cols)

  @property
  def extent(self) -> tuple[int, int]:
    """Rows and columns."""
    return len(self.rows), len(self.cols)

  @property
  def shape(self) -> tuple[int, int, int]:
    """Of the array of layers; they are drawn to count them."""
    return np.asarray(self).shape

  def __getitem__(self, key: tuple[slice, slice, slice]) -> MaskRuns:
    """A window `[:, rows, columns]`, mirrored where a step is -1."""
    layers, rows, cols = key
    if layers != slice(None):
      raise IndexError(f"{layers}; expected all layers")
    return dataclasses.replace(self, rows=self.rows[rows], cols=self.cols[cols])

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    from effseg_jax.input_pipeline.datasets.panoptic import stack_layers

    del copy
    layers = stack_layers(self.masks(), self.extent)
    if self.void >= 0:
      layers = np.where(layers < 0, self.void, layers).astype(np.uint8)
    return layers if dtype is None else layers.astype(dtype)

  def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
    arrays = [np.asarray(x) if isinstance(x, MaskRuns) else x for x in inputs]
    return getattr(ufunc, method)(*arrays, **options)

  def _is_whole(self) -> bool:
    return all(
      len(lines) == side and np.array_equal(lines, np.arange(side))
      for lines, side in zip((self.rows, self.cols), self.size, strict=True)
    )


def _nearest(lines: np.ndarray, count: int) -> np.ndarray:
  """The lines that remain or repeat when a picture is resized to `count` of them."""
  column = Image.fromarray(lines.astype(np.int32)[:, None])
  return np.asarray(column.resize((1, count), Image.Resampling.NEAREST))[:, 0].astype(np.int64)
