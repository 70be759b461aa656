"""Several data sets as one to train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.base import Example


class Mixture:
  """Data sets of the same classes, drawn from by weight.

  Every stretch of the sequence of examples holds the parts in the ratio of their weights, as nearly
  as whole numbers allow; each part has epochs of its own. As a data set it is its parts, one after
  the other.

  Attributes:
    parts: the data sets.
    weights: relative sampling frequency of each.
  """

  def __init__(self, parts: Sequence[Any], weights: Sequence[float]):
    """Checks that the parts go together.

    Args:
      parts: at least one.
      weights: positive, one per part.

    Raises:
      UserError: for a weight that is not positive, an empty part or other classes.
    """
    self.parts, self.weights = tuple(parts), tuple(map(float, weights))
    first = self.parts[0]
    for part, weight in zip(self.parts, self.weights, strict=True):
      if not weight > 0:
        raise UserError(f"data.mixture: the weight of {part.name} is {weight:g}; expected > 0.")
      if tuple(part.classes) != tuple(first.classes):
        raise UserError(
          f"data.mixture: the classes of {part.name} ({len(part.classes)}) are not those of"
          f" {first.name} ({len(first.classes)}); expected the same names in the same order."
        )
    self._begins = np.cumsum([0, *map(len, self.parts)])

  def __getattr__(self, name: str) -> Any:
    """Classes, palette and the like are those of the first part."""
    if name.startswith("__") or name in ("parts", "_begins"):  # while it is being unpickled
      raise AttributeError(name)
    return getattr(self.parts[0], name)

  @property
  def name(self) -> str:
    """The parts' names."""
    return " + ".join(part.name for part in self.parts)

  def __len__(self) -> int:
    return int(self._begins[-1])

  def __getitem__(self, index: int) -> Example:
    """An example of one of the parts."""
    part, own = self._find(index)
    return part[own]

  def image_size(self, index: int) -> tuple[int, int]:
    """Rows and columns of an image."""
    part, own = self._find(index)
    return part.image_size(own)

  def _find(self, index: int) -> tuple[Any, int]:
    number = int(np.searchsorted(self._begins, index, side="right")) - 1
    return self.parts[number], index - int(self._begins[number])
