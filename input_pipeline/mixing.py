"""Examples made of two: part of one training image is pasted onto another, with its labels.

ClassMix (Olsson et al. 2021, section 3) pastes half of the classes of the other image, here by its
true labels; CutMix (Yun et al. 2019, section 3.1) a rectangle of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL, Example
from effseg_jax.input_pipeline.transforms import Rng, Transform

KINDS = ("classmix", "cutmix")


@dataclasses.dataclass(frozen=True)
class Mix:
  """Pastes part of a second example, which goes through the same transforms, onto the first.

  Everything random is drawn from the first example's generator, so that a place in the sequence of
  examples has the same result whatever loads it.

  Attributes:
    kind: `classmix` or `cutmix`.
    probability: of pasting.
    source: of the second example; set by `bind`.
    before: the transforms before this one; set by `bind`.
  """

  kind: str
  probability: float
  source: Any = None
  before: tuple[Transform, ...] = ()

  def __post_init__(self) -> None:
    """Raises `UserError` for an unknown kind or an impossible probability."""
    if self.kind not in KINDS:
      raise UserError(
        f"data.augment.mix is {self.kind!r}; expected '' or one of {', '.join(KINDS)}."
        f"{suggestion(self.kind, KINDS)}"
      )
    if not 0.0 <= self.probability <= 1.0:
      raise UserError(
        f"data.augment.mix_probability is {self.probability}; expected a number from 0 to 1."
      )

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Replaces the chosen pixels of `image` and `label`; padding of either example stays out."""
    if rng.random() >= self.probability:
      return example
    other = self.source[int(rng.integers(len(self.source)))]
    for transform in self.before:
      other = transform(other, rng)
    choose = _some_classes if self.kind == "classmix" else _rectangle
    rows, cols = np.minimum(example["valid_size"], other["valid_size"])
    region = np.zeros(example["label"].shape, bool)
    region[:rows, :cols] = choose(other["label"][:rows, :cols], rng)
    return {
      **example,
      "image": np.where(region[..., None], other["image"], example["image"]),
      "label": np.where(region, other["label"], example["label"]),
    }


def bind(transforms: Sequence[Transform], source: Any) -> tuple[Transform, ...]:
  """Gives each `Mix` among the transforms the source of its second examples.

  Args:
    transforms: of a training pipeline, in their order.
    source: the data set, every example of which is as likely (a mixture's weights do not count).
  """
  bound: list[Transform] = []
  for transform in transforms:
    if isinstance(transform, Mix):
      bound.append(dataclasses.replace(transform, source=source, before=tuple(bound)))
    else:
      bound.append(transform)
  return tuple(bound)


def _some_classes(label: np.ndarray, rng: Rng) -> np.ndarray:
  """The pixels of half of the classes, rounded up: bool (H, W)."""
  present = np.unique(label)
  present = present[present != IGNORE_LABEL]
  chosen = np.zeros(256, bool)
  chosen[rng.permutation(present)[: -(-len(present) // 2)]] = True
  return chosen[label]


def _rectangle(label: np.ndarray, rng: Rng) -> np.ndarray:
  """A rectangle of the picture's shape with a uniformly drawn share of its area: bool (H, W)."""
  sides = np.sqrt(rng.random()) * np.array(label.shape)
  centre = rng.random(2) * label.shape
  begin = np.clip(np.round(centre - sides / 2), 0, label.shape).astype(int)
  end = np.clip(np.round(centre + sides / 2), 0, label.shape).astype(int)
  region = np.zeros(label.shape, bool)
  region[begin[0] : end[0], begin[1] : end[1]] = True
  return region
