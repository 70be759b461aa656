"""Values in COCO's json files as tools write them, converted to one form or refused.

Numbers may be strings or floats without a fraction, flags may be booleans or strings, ids may be
strings. Values that cannot be understood are None here, and one line where the file is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from effseg_jax.errors import extra

# Coordinates beyond this are no pixels; the code that draws polygons would need memory for them.
_FARTHEST = 1e6
SHAPE = (
  "expected polygons [[x1, y1, x2, y2, x3, y3, ...], ...] or run lengths"
  ' {"size": [rows, columns], "counts": ...}'
)


def integer(value: Any) -> int | None:
  """A whole number: 3, 3.0 or "3"; None for anything else."""
  if isinstance(value, bool):
    return None
  if isinstance(value, int):
    return value
  if isinstance(value, float) and math.isfinite(value) and value == int(value):
    return int(value)
  if isinstance(value, str):
    text = value.strip()
    if text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal():
      return int(text)
  return None


def length(value: Any) -> int:
  """A side in pixels; 0 where it is missing, null or no number."""
  number = integer(value)
  return number if number is not None and 0 < number < 2**31 else 0


def area(value: Any) -> float | None:
  """An area in pixels; None where it is missing or not between 0 and 2^53."""
  if isinstance(value, bool) or not isinstance(value, int | float | str):
    return None
  try:
    number = float(value)
  except ValueError:
    return None
  return number if 0 < number < 2**53 else None


def flag(value: Any) -> bool | None:
  """0 or 1 in any writing; a missing value (None) is 0. None if it is neither."""
  if value is None:
    return False
  if isinstance(value, str):
    return {"0": False, "1": True, "false": False, "true": True, "": False}.get(
      value.strip().lower()
    )
  if isinstance(value, bool | int | float) and value in (0, 1):
    return bool(value)
  return None


def is_id(value: Any) -> bool:
  """Whether a value can name an image."""
  return isinstance(value, str) or integer(value) is not None


def ids_as_one_type(ids: Iterable[Any]) -> bool:
  """Whether all ids are whole numbers in their usual writing, so that they can be integers."""
  for value in ids:
    number = integer(value)
    if number is None or (isinstance(value, str) and str(number) != value):
      return False
    if not -(2**63) <= number < 2**63:
      return False
  return True


def as_id(value: Any, numeric: bool) -> int | str:
  """An id as the number or the text that all ids of its file are."""
  number = integer(value)
  if numeric:
    return value if number is None else number
  return str(value if number is None or isinstance(value, str) else number)


def mask_problem(segmentation: Any) -> str | None:
  """The defect of an annotation's segmentation.

  Args:
    segmentation: polygons or run lengths, as the json has them.

  Returns:
    None: it can be drawn (perhaps without a pixel). "": there is no mask: an empty list, or
    polygons of fewer than three points alone. Otherwise a phrase for a message.
  """
  if segmentation is None or segmentation in ([], {}, ""):
    return ""
  if isinstance(segmentation, dict):
    return _runs_problem(segmentation)
  if not isinstance(segmentation, list):
    return f"is {_short(segmentation)}"
  enclosing = False
  for points in segmentation:
    if not isinstance(points, list):
      kind = "one flat list of numbers" if isinstance(points, int | float) else _short(points)
      return f"is {kind}" if isinstance(points, int | float) else f"holds {kind}"
    if len(points) % 2:
      return f"has a polygon of {len(points)} numbers"
    if not points:
      continue
    try:
      low, high = min(points), max(points)
      finite = math.isfinite(sum(points))
    except TypeError:
      return f"has a polygon that begins with {_short(points[0])}"
    if isinstance(low, str):
      return f"has a polygon that begins with {_short(points[0])}"
    if not finite or low < -_FARTHEST or high > _FARTHEST:
      return f"has the coordinate {low if abs(low) > abs(high) else high:g}"
    enclosing = enclosing or len(points) >= 6
  return None if enclosing else ""


def runs(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
  """A segmentation as compressed run lengths.

  Args:
    segmentation: for which `mask_problem` is None.
    size: rows and columns of the image.

  Returns:
    `size` and `counts`, for pycocotools; None if it has no pixel in the image.

  Raises:
    ValueError: for run lengths of another size.
  """
  with extra("coco"):
    from pycocotools import mask as coco_mask

  if isinstance(segmentation, list):
    polygons = [points for points in segmentation if len(points) >= 6]
    found = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
  else:
    told = tuple(int(side) for side in segmentation["size"])
    if told != tuple(size):
      raise ValueError(f"is of the size {told[0]}x{told[1]}, and the image is {size[0]}x{size[1]}")
    found = segmentation
    if isinstance(segmentation["counts"], list):
      found = coco_mask.frPyObjects({**segmentation, "size": list(size)}, *size)
    else:
      found = {"size": list(size), "counts": segmentation["counts"]}
  return found if coco_mask.area(found) else None


def _runs_problem(segmentation: dict[str, Any]) -> str | None:
  counts, size = segmentation.get("counts"), segmentation.get("size")
  if not (isinstance(size, list) and len(size) == 2 and all(map(length, size))):
    return f"has run lengths of the size {_short(size)}"
  pixels = length(size[0]) * length(size[1])
  if isinstance(counts, str):
    total = _total(counts)
  elif isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts):
    total = sum(counts)
  else:
    return f"has the counts {_short(counts)}"
  if total != pixels:
    return f"has run lengths of {'' if total is None else f'{total} pixels, not '}{pixels} pixels"
  return None


def _total(counts: str) -> int | None:
  """Sum of compressed run lengths, or None if they are malformed; pycocotools does not check."""
  try:
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
  except UnicodeEncodeError:
    return None
  if not len(codes):
    return 0
  if codes.min() < 0 or codes.max() > 63:
    return None
  last = (codes & 32) == 0
  if not last[-1]:
    return None
  ends = np.flatnonzero(last)
  begins = np.concatenate([[0], ends[:-1] + 1])
  if (ends - begins).max() > 6:
    return None
  place = np.arange(len(codes)) - np.repeat(begins, ends - begins + 1)
  values = np.add.reduceat((codes & 31) << (5 * place), begins)
  negative = (codes[ends] & 16) != 0
  values[negative] -= np.int64(1) << (5 * (ends - begins + 1))[negative]
  # From the fourth number on, each is the difference to the one two before it.
  values[1::2] = np.cumsum(values[1::2])
  values[2::2] = np.cumsum(values[2::2])
  return None if (values < 0).any() else int(values.sum())


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 40 else f"{text[:37]}..."
