"""At which size a network sees a picture: as it was evaluated, or as `--scale` says."""

from __future__ import annotations

import dataclasses
import math
import re

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.eval_batches import SizeRule
from effseg_jax.input_pipeline.eval_universal import PictureRule, ShortestEdgeRule
from effseg_jax.input_pipeline.transforms import keep_ratio_size

# "--scale=720" is a forgotten height and not a wish for pictures of 500 megapixels.
_MAX_FACTOR = 8

# Sides that a network sees are rounded to this, so that pictures of many sizes share programs.
_STEP = 32

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Scale:
  """What `--scale` asks for.

  Attributes:
    frame: (long, short) side that pictures are fitted into, keeping their ratio; or None.
    factor: of the picture's own size, where there is no frame.
  """

  frame: Size | None = None
  factor: float = 1.0

  def __call__(self, size: Size) -> Size:
    """(rows, cols) of a picture -> (rows, cols) of the same ratio, at least 1."""
    if self.frame is not None:
      return at_least_one(keep_ratio_size(size, self.frame))
    return at_least_one((round(size[0] * self.factor), round(size[1] * self.factor)))


def parse_scale(scale: str | float | Size) -> Scale:
  """Reads a scale: `"720x540"` or (720, 540), or a factor such as `"1.5"` or 1.5.

  Raises:
    UserError: if it is neither.
  """
  text = "x".join(map(str, scale)) if isinstance(scale, (tuple, list)) else str(scale)
  frame = re.fullmatch(r"(\d+)x(\d+)", text)
  if frame and all(int(side) > 0 for side in frame.groups()):
    return Scale((int(frame[1]), int(frame[2])))
  factor = float(text) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) else 0.0
  if not 0.0 < factor <= _MAX_FACTOR:
    raise UserError(
      f"--scale is {text!r}; expected WIDTHxHEIGHT such as 720x540, or a factor up to"
      f" {_MAX_FACTOR} such as 1.5."
    )
  return Scale(factor=factor)


@dataclasses.dataclass(frozen=True)
class SemanticSize:
  """The size at which a semantic network sees a picture: what a picture is stretched to.

  Attributes:
    rule: of the evaluation.
    scale: replaces the rule's frame; its multiple stays.
    exact: whether sides are what evaluation makes of them. Otherwise a side is rounded to a
      multiple of 32, unless it fills the frame or the rule's own multiple is as coarse: pictures
      of similar ratio share a program then, and are stretched by a few percent at most.
  """

  rule: SizeRule
  scale: Scale | None = None
  exact: bool = False

  def __call__(self, size: Size) -> Size:
    """(rows, cols) of a picture -> (rows, cols) for the network."""
    if self.scale is None:
      frame, fitted = self.rule.scale, size
      if any(frame):
        fitted = at_least_one(keep_ratio_size(size, frame))
    else:
      frame, fitted = self.scale.frame or (0, 0), self.scale(size)
    if self.exact or self.rule.multiple % _STEP == 0:
      return SizeRule((0, 0), self.rule.multiple)(fitted)
    long = fitted.index(max(fitted))
    sides = {long: max(frame), 1 - long: min(frame)}
    rows, cols = (self._rounded(side, sides[axis]) for axis, side in enumerate(fitted))
    return rows, cols

  def _rounded(self, side: int, full: int) -> int:
    """The nearest multiple of the step, or the frame's own side if that is nearer."""
    step = math.lcm(_STEP, self.rule.multiple)
    multiple = max(round(side / step), 1) * step
    return full if full and abs(full - side) <= abs(multiple - side) else multiple


@dataclasses.dataclass(frozen=True)
class UniversalSize:
  """The size to which a picture is resized, keeping its ratio, and that of the padded array.

  Attributes:
    rule: of the evaluation.
    scale: replaces the rule's short side and limit; its multiple stays.

  Raises:
    UserError: for a scale where the network takes one size alone.
  """

  rule: PictureRule
  scale: Scale | None = None

  def __post_init__(self) -> None:
    """Refuses a scale for a fixed size."""
    if self.scale is not None and not isinstance(self.rule, ShortestEdgeRule):
      raise UserError(
        "--scale means nothing to this model, which takes one size alone; leave it out."
      )

  def image(self, size: Size) -> Size:
    """(rows, cols) of a picture -> (rows, cols) that it is resized to."""
    return at_least_one(self.rule.image(size) if self.scale is None else self.scale(size))

  def array(self, size: Size) -> tuple[int, ...]:
    """(rows, cols) of a picture -> shape of the padded array, or of the grid of windows."""
    if not isinstance(self.rule, ShortestEdgeRule):
      return self.rule.array(size)
    multiple = self.rule.multiple
    rows, cols = (-(-side // multiple) * multiple for side in self.image(size))
    return rows, cols


def at_least_one(size: Size) -> Size:
  """Very thin pictures keep a row and a column."""
  return max(size[0], 1), max(size[1], 1)
