"""The procedural scenes with every object a segment of its own: panoptic data without a download.

Sky, meadow and paving are stuff; balls, rings, boxes, banners and stars are things. Objects of one
kind hide each other in parts, so that telling them apart takes more than their class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effseg_jax.input_pipeline.datasets import base, panoptic, synthetic

CLASSES, PALETTE = synthetic.CLASSES, synthetic.PALETTE
_NUM_STUFF = 3
CLASS_TABLE = panoptic.ClassTable(
  CLASSES, np.arange(len(CLASSES)) >= _NUM_STUFF, np.arange(len(CLASSES)), PALETTE
)
# An object that covers less than this share of the picture is void: a few pixels of an object
# behind others.
_MIN_SHARE = 1 / 1024


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticInstances(panoptic.UniversalDataset):
  """A split of the scenes.

  Attributes:
    scenes: that are drawn.
  """

  scenes: synthetic.SyntheticScenes

  name = "synthetic_instances"
  table = CLASS_TABLE

  @property
  def split(self) -> str:
    """`train` or `val`."""
    return self.scenes.split

  def __len__(self) -> int:
    return len(self.scenes)

  def __getitem__(self, index: int) -> base.Example:
    """See `panoptic.UniversalDataset`; the scene is drawn once."""
    image, label, owner = self.scenes.scene(index)
    return panoptic.make_example(image, self._segments(label, owner, index))

  def image(self, index: int) -> np.ndarray:
    """See `panoptic.UniversalDataset`."""
    return self.scenes.scene(index)[0]

  def image_size(self, index: int) -> tuple[int, int]:
    """The same for all."""
    return self.scenes.image_size(index)

  def ground_truth(self, index: int) -> panoptic.GroundTruth:
    """See `panoptic.UniversalDataset`."""
    _, label, owner = self.scenes.scene(index)
    return self._segments(label, owner, index)

  def _segments(self, label: np.ndarray, owner: np.ndarray, index: int) -> panoptic.GroundTruth:
    # A surface or an object in each pixel; a border belongs to neither.
    key = np.where(label < _NUM_STUFF, label, _NUM_STUFF + owner.astype(np.int64))
    key[label == base.IGNORE_LABEL] = base.IGNORE_LABEL
    areas = np.bincount(key.ravel(), minlength=base.IGNORE_LABEL + 1)[: base.IGNORE_LABEL]
    kept = np.flatnonzero(areas >= max(_MIN_SHARE * label.size, 1))
    rows = np.full(base.IGNORE_LABEL + 1, -1, np.int16)
    rows[kept] = np.arange(len(kept))
    first = [np.flatnonzero(key == value)[0] for value in kept]
    return panoptic.GroundTruth(
      rows[key][None],
      label.ravel()[first].astype(np.int32),
      np.zeros(len(kept), bool),
      areas[kept],
      index,
      f"{self.split}_{index:04d}",
    )


def open_split(
  root: str | Path | None,
  split: str,
  *,
  size: Sequence[int] = (128, 128),
  seed: int = 0,
  num_train: int = 2048,
) -> SyntheticInstances:
  """Opens `train` or `val` (96 scenes).

  Args:
    root: not used.
    split: of the data set.
    size: rows and columns, 32 at least.
    seed: of all scenes.
    num_train: scenes in `train`.
  """
  base.require_split(split, ("train", "val"), "synthetic_instances")
  scenes = synthetic.open_split(root, split, size=size, seed=seed, num_train=num_train)
  return SyntheticInstances(scenes)
