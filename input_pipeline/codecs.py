"""Reading pictures: OpenCV for photographs, Pillow for index PNGs and for headers."""

from __future__ import annotations

import contextlib
import contextvars
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from effseg_jax.errors import UserError

# The pipeline's own threads are the parallelism; OpenCV's would compete with them.
cv2.setNumThreads(0)

_LOG: contextvars.ContextVar[list[tuple[bytes, np.ndarray]] | None] = contextvars.ContextVar(
  "pictures read", default=None
)

# EXIF orientations under which rows become columns.
_TURNED = (5, 6, 7, 8)


def read_image(path: Path) -> np.ndarray:
  """Decodes a photograph to uint8 RGB (H, W, 3), turned upright as its EXIF orientation says.

  Raises:
    UserError: if the file is missing or cannot be decoded.
  """
  return decode_image(_read(path), path)


def decode_image(content: bytes, name: object) -> np.ndarray:
  """`read_image` of a file's content; `name` says in a message what it was.

  Raises:
    UserError: if it cannot be decoded.
  """
  image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
  if image is None:
    raise UserError(f"{name} cannot be decoded; expected a JPEG or PNG photograph.")
  if (log := _LOG.get()) is not None:
    log.append((content, image))
  return image


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[bytes, np.ndarray]]]:
  """Collects what this thread decodes: the contents of photographs' files, and the pictures."""
  log: list[tuple[bytes, np.ndarray]] = []
  token = _LOG.set(log)
  try:
    yield log
  finally:
    _LOG.reset(token)


def read_label(path: Path) -> np.ndarray:
  """Decodes an index PNG to uint8 (H, W), the stored values and not a palette's colours.

  Labels are drawn and not photographed: no EXIF orientation is looked for.

  Raises:
    UserError: if the file is missing, cannot be decoded, or holds colours.
  """
  _require(path)
  return decode_label(path, path)


def decode_label(source: Path | IO[bytes], path: object) -> np.ndarray:
  """`read_label` of a file that may be in memory; `path` says in a message what it was.

  Raises:
    UserError: if it cannot be decoded, or holds colours.
  """
  try:
    with Image.open(source) as image:
      label = np.asarray(image)
  except (UnidentifiedImageError, OSError, SyntaxError) as error:
    raise UserError(f"{path} cannot be decoded ({error}); expected an index PNG.") from None
  if label.ndim != 2:
    raise UserError(
      f"{path} has {label.shape[-1]} channels; expected one class index per pixel (an 8-bit or"
      " palette PNG)."
    )
  return label


def image_size(path: Path) -> tuple[int, int]:
  """Rows and columns of what `read_image` returns, from the file's header alone."""
  _require(path)
  return decode_size(path, path)


def decode_size(source: Path | IO[bytes], path: object) -> tuple[int, int]:
  """`image_size` of a file that may be in memory; `path` says in a message what it was.

  Raises:
    UserError: if it has no readable header.
  """
  try:
    with Image.open(source) as image:
      cols, rows = image.size
      # Pillow keeps TIFF's orientation elsewhere, and has applied it to the size already.
      turned = _orientation(image.info.get("exif", b"")) in _TURNED
  except (UnidentifiedImageError, OSError, SyntaxError) as error:
    raise UserError(f"{path} has no readable image header ({error}).") from None
  return (cols, rows) if turned else (rows, cols)


def _orientation(exif: bytes) -> int:
  """The orientation that EXIF data states, 1 where there is none or it is broken.

  `Image.getexif` is no substitute: it decodes a whole PNG in search of EXIF data behind the pixels,
  and it heeds XMP, which OpenCV does not.
  """
  parsed = Image.Exif()
  try:
    parsed.load(exif)
    return parsed.get(ExifTags.Base.Orientation, 1)
  except (SyntaxError, ValueError, OSError, struct.error):
    return 1


def _require(path: Path) -> None:
  if not path.is_file():
    raise UserError(f"{path} is missing.")


def _read(path: Path) -> bytes:
  _require(path)
  content = path.read_bytes()
  if not content:
    raise UserError(f"{path} is empty; expected a JPEG or PNG photograph.")
  return content
