"""Reading pictures and labels: OpenCV for photographs, Pillow for labels, headers and the rest.

The rules for every reader:

* Photographs become uint8 RGB, turned upright by their EXIF orientation. Transparent pixels
  are laid over white (`BACKGROUND`). 16-bit values are divided by 256.
* Labels keep the stored values of 1, 2, 4, 8 or 16 bits; palettes and EXIF data are not applied.
* Files with more than 179 megapixels, a missing end, or several pages are refused in one line.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from effseg_jax.errors import UserError, warn_once
from effseg_jax.file_kinds import mistaken_for

# The pipeline's own threads are the parallelism; OpenCV's would compete with them.
cv2.setNumThreads(0)
# The limit below is checked here; Pillow would warn at half of it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# The names of files that training and prediction take for pictures, in lower case.
_PLUGIN_SUFFIXES = (".heic", ".heif", ".avif")
PICTURE_SUFFIXES = (
  *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
  *(".ppm", ".pgm", ".jp2"),
  *_PLUGIN_SUFFIXES,
)
# Background of transparent pixels, RGB.
BACKGROUND = (255, 255, 255)
# Pillow's own limit, above which it refuses.
MAX_PIXELS = 178_956_970

_LOG: contextvars.ContextVar[list[tuple[bytes, np.ndarray]] | None] = contextvars.ContextVar(
  "pictures read", default=None
)

# EXIF orientations under which rows become columns.
TURNED = (5, 6, 7, 8)
_BROKEN = (
  *(UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, EOFError, OverflowError),
  *(struct.error, zlib.error, MemoryError, Image.DecompressionBombError),
)
_SUBFILE_TYPE, _PHOTOMETRIC = 254, 262  # TIFF tags
# 16-bit pictures whose largest value is below this use a sliver of their range.
_DARK_16_BIT = 1 << 14


def is_hidden(path: Path) -> bool:
  """Whether the last part of a path is no data: a hidden file, a shadow file of macOS."""
  return path.name.startswith(".") or path.name in ("__MACOSX", "@eaDir")


def list_pictures(folder: Path, *, recursive: bool = False) -> list[Path]:
  """The pictures in a folder, sorted by path; hidden files and folders are passed over.

  Args:
    folder: that exists.
    recursive: whether its subfolders are read, too; linked ones are followed, once each.
  """
  return [path for path in list_files(folder, recursive=recursive) if is_picture(path)]


def is_picture(path: Path) -> bool:
  """Whether a file is taken for a picture, by its name."""
  return path.suffix.lower() in PICTURE_SUFFIXES and not is_hidden(path)


def list_files(folder: Path, *, recursive: bool = False) -> list[Path]:
  """All files in a folder that are not hidden, sorted by path; see `list_pictures`."""
  found: list[Path] = []
  seen: set[str] = set()
  for root, folders, names in os.walk(folder, followlinks=True):
    real = os.path.realpath(root)
    if real in seen:  # a link to a folder above
      folders.clear()
      continue
    seen.add(real)
    if recursive:
      folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
    else:
      folders.clear()
    found += [Path(root, name) for name in names if not is_hidden(Path(name))]
  return sorted(found)


def read_image(path: Path) -> np.ndarray:
  """Decodes a photograph to uint8 RGB (H, W, 3), turned upright by its EXIF orientation.

  Raises:
    UserError: if the file is missing, cannot be decoded or is too large.
  """
  return decode_image(_read(path), path)


def decode_image(content: bytes, name: object) -> np.ndarray:
  """`read_image` of a file's content; `name` says in a message what it was.

  Raises:
    UserError: if it cannot be decoded.
  """
  orientation, transparent = _check_header(content, name)
  _require_end(content, name)
  image = None
  if not transparent:
    # A call with colours and any depth turns the picture upright and keeps 16 bits.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
    try:
      image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # it has limits of its own
      image = None
  if image is None:
    image = _decode_with_pillow(content, name, orientation)
  if image.dtype == np.uint16:
    image = _to_8_bits(image, name)
  if image.dtype != np.uint8:
    raise UserError(f"{name} holds {image.dtype} values; expected a picture of 8 or 16 bits.")
  if (log := _LOG.get()) is not None:
    log.append((content, image))
  return image


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[bytes, np.ndarray]]]:
  """Collects what this thread decodes: the contents of the files, and the pictures."""
  log: list[tuple[bytes, np.ndarray]] = []
  token = _LOG.set(log)
  try:
    yield log
  finally:
    _LOG.reset(token)


def read_label(path: Path) -> np.ndarray:
  """Decodes an index picture to (H, W), the stored values and not a palette's colours.

  Labels are drawn and not photographed: no EXIF orientation is looked for.

  Returns:
    uint8, or a wider integer type where more than 8 bits are stored.

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
  with _opened(source, path, "an index PNG") as image:
    if image.format == "JPEG":
      raise UserError(
        f"{path} is a JPEG, whose compression changes label values; expected a PNG of one class"
        " index per pixel."
      )
    label = _stored_values(image)
  if label.ndim == 3 and label.shape[-1] >= 3 and _is_grey(label):
    label = label[..., 0]  # a grey label that a tool has written as RGB
  if label.ndim == 3 and label.shape[-1] == 2:
    label = label[..., 0]  # grey and alpha
  if label.ndim != 2:
    raise UserError(
      f"{path} has {label.shape[-1]} channels, colours; expected one class index per pixel (an"
      " 8-bit or palette PNG). If classes.txt gives the colours, set"
      " --config.data.options.labels=colours; in Python: index = (rgb[..., None, :] =="
      " palette).all(-1).argmax(-1)."
    )
  if label.dtype.kind == "f":
    whole = np.rint(label)
    if not np.array_equal(whole, label):
      raise UserError(f"{path} holds fractions; expected one class index per pixel.")
    label = whole.astype(np.int32)
  return label


def read_colours(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
  """Decodes a label that is painted in colours.

  Returns:
    RGB uint8 (H, W, 3), of a palette its colours; and bool (H, W), where it is transparent, or
    None.

  Raises:
    UserError: if the file is missing or cannot be decoded.
  """
  _require(path)
  with _opened(path, path, "a label picture") as image:
    if image.format == "JPEG":
      raise UserError(f"{path} is a JPEG, whose compression changes colours; expected a PNG.")
    clear = None
    if _is_transparent(image):
      rgba = np.asarray(image.convert("RGBA"))
      clear = rgba[..., 3] == 0
      return np.ascontiguousarray(rgba[..., :3]), clear
    return np.asarray(image.convert("RGB")), clear


def read_ids(path: Path) -> np.ndarray:
  """Decodes a picture of numbers R + 256 G + 65536 B: int32 (H, W).

  Raises:
    UserError: if the file is missing, cannot be decoded, or has one channel.
  """
  _require(path)
  with _opened(path, path, "a PNG of segment ids") as image:
    stored = np.asarray(image.convert("RGB") if image.mode == "P" else image)
  if stored.ndim == 2:
    if not stored.any():  # an optimiser makes pictures of nothing grey
      return np.zeros(stored.shape, np.int32)
    raise UserError(
      f"{path} has 1 channel; expected the three of a panoptic PNG, whose ids are"
      " R + 256 G + 65536 B."
    )
  if stored.dtype != np.uint8 or stored.shape[-1] < 3:
    raise UserError(f"{path} is no 8-bit RGB picture; expected ids of R + 256 G + 65536 B.")
  ids = stored[..., :3].astype(np.int32)
  return ids[..., 0] + (ids[..., 1] << 8) + (ids[..., 2] << 16)


def image_size(path: Path) -> tuple[int, int]:
  """Rows and columns of the result of `read_image`, from the file's header only."""
  _require(path)
  return decode_size(path, path)


def decode_size(source: Path | IO[bytes], path: object) -> tuple[int, int]:
  """`image_size` of a file that may be in memory; `path` says in a message what it was.

  Raises:
    UserError: if it has no readable header, or the picture is too large.
  """
  size, orientation, _ = _header(source, path)
  cols, rows = size
  # Pillow keeps TIFF's orientation elsewhere, and has applied it to the size already.
  return (cols, rows) if orientation in TURNED else (rows, cols)


def orientation(path: Path) -> int:
  """The EXIF orientation by which `read_image` turns a picture; 1: not at all.

  Raises:
    UserError: see `decode_size`.
  """
  _require(path)
  return _header(path, path)[1]


def turned(picture: np.ndarray, turn: int) -> np.ndarray:
  """Turns a picture or label (H, W, ...) upright from one of the eight orientations of EXIF."""
  if turn in TURNED:
    picture = picture.swapaxes(0, 1)
  rows = turn in (3, 4, 7, 8)
  cols = turn in (2, 3, 6, 7)
  picture = picture[:: -1 if rows else 1, :: -1 if cols else 1]
  return np.ascontiguousarray(picture)


def _header(source: Path | IO[bytes], path: object) -> tuple[tuple[int, int], int, bool]:
  """(columns, rows), EXIF orientation, and whether pixels may be transparent."""
  try:
    with _plugins(path), Image.open(source) as image:
      _require_size(image.size, path)
      exif = image.info.get("exif", b"")
      return image.size, _orientation(exif), _is_transparent(image)
  except UserError:
    raise
  except Image.DecompressionBombError as error:
    raise _too_large(error, path) from None
  except _BROKEN as error:
    raise UserError(f"{path} has no readable image header ({_reason(error)}).") from None


def _check_header(content: bytes, name: object) -> tuple[int, bool]:
  """Orientation and transparency, as far as Pillow supports the format; refuses large pictures."""
  try:
    with Image.open(io.BytesIO(content)) as image:
      _require_size(image.size, name)
      if image.format == "TIFF":
        _require_one_page(image, name)
      return _orientation(image.info.get("exif", b"")), _is_transparent(image)
  except UserError:
    raise
  except Image.DecompressionBombError as error:
    raise _too_large(error, name) from None
  except _BROKEN:
    return 1, False  # OpenCV may know it


def _decode_with_pillow(content: bytes, name: object, turn: int) -> np.ndarray:
  """Formats that OpenCV does not read, and pictures with transparent pixels: uint8 (H, W, 3)."""
  with _opened(io.BytesIO(content), name, "a photograph (JPEG, PNG, TIFF, ...)") as image:
    if _is_transparent(image):
      layer = image.convert("RGBA")
      ground = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
      picture = np.asarray(Image.alpha_composite(ground, layer).convert("RGB"))
    else:
      picture = np.asarray(image.convert("RGB"))
  return turned(picture, turn)


def _to_8_bits(image: np.ndarray, name: object) -> np.ndarray:
  largest = int(image.max(initial=0))
  if 255 < largest < _DARK_16_BIT:
    factor = 65536 // (1 << largest.bit_length())
    warn_once(
      "16 bits",
      f"{name} uses {largest} of 65535 levels and is nearly black after the division by 256;"
      f" multiply the 16-bit values by {factor} and save the pictures again."
      " Other pictures may be alike.",
    )
  return (image >> 8).astype(np.uint8)


def _stored_values(image: Image.Image) -> np.ndarray:
  """The values of a label as its file has them; Pillow stretches greys of few bits to 0..255."""
  raw = _raw_mode(image)
  values = np.asarray(image)
  if values.dtype == bool:
    values = values.astype(np.uint8)
    inverted = ";I" in raw
    return 1 - values if inverted else values
  if raw.startswith("L"):
    depth = raw.partition(";")[2].rstrip("IR")
    if "I" in raw.partition(";")[2]:
      values = 255 - values  # white is zero
    step = {"2": 85, "4": 17}.get(depth)
    return values // np.uint8(step) if step else values
  return values


def _raw_mode(image: Image.Image) -> str:
  """How the values lie in the file, in Pillow's words: `L;2`, `P;4`, `1;I` and so on."""
  if not image.tile:
    return image.mode
  args = image.tile[0][3]
  mode = args[0] if isinstance(args, tuple) and args else args
  return mode if isinstance(mode, str) else image.mode


def _is_grey(label: np.ndarray) -> bool:
  return bool(
    np.array_equal(label[..., 0], label[..., 1]) and np.array_equal(label[..., 1], label[..., 2])
  )


def _is_transparent(image: Image.Image) -> bool:
  return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _require_size(size: tuple[int, int], name: object) -> None:
  if size[0] * size[1] > MAX_PIXELS:
    raise _too_large(size, name)


def _too_large(size: tuple[int, int] | Exception, name: object) -> UserError:
  if isinstance(size, tuple):
    count = size[0] * size[1]
  else:  # Pillow's refusal names the number of pixels
    count = int(next(iter(re.findall(r"\d+", str(size))), MAX_PIXELS + 1))
  return UserError(
    f"{name} has {count / 1e6:,.0f} megapixels; expected {MAX_PIXELS / 1e6:.0f} at most. Cut it"
    " into tiles, for example with: gdal_retile.py -ps 4096 4096, or vips dzsave."
  )


def _require_one_page(image: Image.Image, name: object) -> None:
  """Refuses stacks. Smaller pages (the overviews of a map) and masks are no stack."""
  pages, first = getattr(image, "n_frames", 1), image.size
  if pages > 1:
    same = 1
    for page in range(1, pages):
      image.seek(page)
      same += image.size == first and not image.tag_v2.get(_SUBFILE_TYPE, 0)  # type: ignore[attr-defined]
    image.seek(0)
    if same > 1:
      raise UserError(
        f"{name} is a stack of {same} pages; expected one picture a file. Save each page as a file"
        " of its own, for example with: tiffsplit, or magick stack.tif page_%03d.tif."
      )


def _require_end(content: bytes, name: object) -> None:
  """Refuses a JPEG or PNG whose end is missing: OpenCV's versions differ in what they return."""
  if content.startswith(b"\xff\xd8"):
    whole = content.find(b"\xff\xd9", _first_scan(content)) >= 0
  elif content.startswith(b"\x89PNG\r\n\x1a\n"):
    whole = content.rfind(b"IEND") >= 0
  elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
    whole = len(content) >= int.from_bytes(content[4:8], "little")
  else:
    return
  if not whole:
    raise UserError(
      f"{name} is truncated: it has {len(content):,} bytes and no end. Copy or download it again."
    )


def _first_scan(content: bytes) -> int:
  """Where in a JPEG the coded pixels begin; previews in its header have ends of their own."""
  at = 2
  while at + 4 <= len(content) and content[at] == 0xFF:
    marker = content[at + 1]
    if marker == 0xFF:  # padding
      at += 1
      continue
    if marker == 0xDA:
      break
    at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
  return at


@contextlib.contextmanager
def _opened(source: Path | IO[bytes], path: object, expected: str) -> Iterator[Image.Image]:
  """Opens a picture with Pillow; errors become one line."""
  try:
    with _plugins(path), Image.open(source) as image:
      _require_size(image.size, path)
      if image.format == "TIFF":
        _require_one_page(image, path)
      yield image
  except UserError:
    raise
  except Image.DecompressionBombError as error:
    raise _too_large(error, path) from None
  except _BROKEN as error:
    raise UserError(
      f"{path} cannot be decoded ({_reason(error, source)}); expected {expected}.{_hint(path)}"
    ) from None


@contextlib.contextmanager
def _plugins(path: object) -> Iterator[None]:
  """Registers Pillow's plug-in for HEIC where a file's name asks for it."""
  suffix = Path(str(path)).suffix.lower()
  if suffix in (".heic", ".heif"):
    try:
      import pillow_heif

      pillow_heif.register_heif_opener()
    except ImportError:
      raise UserError(
        f"{path} needs Pillow's plug-in: pip install pillow-heif (or convert it to JPEG)."
      ) from None
  yield


def _reason(error: BaseException, source: Path | IO[bytes] | None = None) -> str:
  """The error's reason, without the path or object that Pillow names."""
  if isinstance(error, UnidentifiedImageError):
    head = b""
    with contextlib.suppress(OSError, ValueError):
      if isinstance(source, Path):
        with source.open("rb") as file:
          head = file.read(256)
      elif source is not None:
        source.seek(0)
        head = source.read(256)
    return (mistaken_for(head) if head else None) or "its format is unknown"
  return str(error).splitlines()[0] if str(error) else type(error).__name__


def _hint(path: object) -> str:
  if Path(str(path)).suffix.lower() == ".avif":
    return " AVIF needs Pillow 11.3 or newer, or: pip install pillow-avif-plugin."
  return ""


def _orientation(exif: bytes) -> int:
  """The orientation that EXIF data states, 1 where there is none or it is broken.

  `Image.getexif` is no substitute: it decodes a whole PNG in search of EXIF data behind the pixels,
  and it heeds XMP, which OpenCV does not.
  """
  if not exif:
    return 1
  parsed = Image.Exif()
  try:
    parsed.load(exif)
    return parsed.get(ExifTags.Base.Orientation, 1)
  except (SyntaxError, ValueError, OSError, struct.error):
    return 1


def _require(path: Path) -> None:
  if not path.is_file():
    raise UserError(f"{path} is missing.")
  if not path.stat().st_size:
    raise UserError(f"{path} is empty; expected a picture.")


def _read(path: Path) -> bytes:
  _require(path)
  return path.read_bytes()
