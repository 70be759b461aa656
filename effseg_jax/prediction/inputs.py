"""What can be segmented: arrays, Pillow's images, files, and the files of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs

# Ends of the names of what prediction writes; a folder's own results are not its inputs.
RESULT_ENDINGS = (
  "_overlay.png",
  "_classes.png",
  "_semantic.png",
  "_panoptic.png",
  "_sounding.mp4",
  "_overlay.mp4",
)
_MASKS_ENDING = "_masks"


def as_image(picture: Any) -> np.ndarray:
  """A picture as an array.

  Args:
    picture: uint8 array (H, W, 3), or (H, W) and (H, W, 1) for greys, or (H, W, 4) with
      transparency; a Pillow image, turned upright as its EXIF orientation says; or the path of a
      file. What is transparent lies on white.

  Returns:
    uint8 RGB (H, W, 3).

  Raises:
    UserError: for anything else, or a file that cannot be read.
  """
  if isinstance(picture, (str, os.PathLike)):
    return codecs.read_image(Path(picture))
  if isinstance(picture, Image.Image):
    return _from_pillow(picture)
  array = np.asarray(picture)
  if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
    raise UserError(
      f"the picture is an array {array.dtype} {array.shape}; expected uint8 RGB (H, W, 3), values"
      " 0 to 255, a Pillow image or a path."
    )
  if array.ndim == 2:
    array = array[..., None]
  if array.shape[-1] == 1:
    return np.repeat(array, 3, axis=-1)
  if array.shape[-1] == 4:
    return _from_pillow(Image.fromarray(array))
  if array.shape[-1] != 3:
    raise UserError(
      f"the picture is an array of shape {array.shape}; expected channels last, (H, W, 3)."
    )
  return np.ascontiguousarray(array)


def _from_pillow(picture: Image.Image) -> np.ndarray:
  picture = ImageOps.exif_transpose(picture)
  if picture.mode in ("I", "I;16", "I;16B", "F"):
    raise UserError(
      f"the picture has Pillow's mode {picture.mode}; expected 8 bits a channel. Scale its values"
      " to 0 to 255 first."
    )
  if "A" in picture.getbands() or "transparency" in picture.info:
    picture = picture.convert("RGBA")
    ground = Image.new("RGBA", picture.size, (*codecs.BACKGROUND, 255))
    picture = Image.alpha_composite(ground, picture)
  return np.array(picture.convert("RGB"))


def is_result(path: Path) -> bool:
  """Whether a file's name says that prediction wrote it."""
  return path.name.endswith(RESULT_ENDINGS)


def files_in(source: Path, wanted: Callable[[Path], bool], expected: str) -> tuple[list[Path], int]:
  """The inputs that a path means: itself, or those in a folder and its subfolders.

  Hidden files and folders are left out, and what an earlier prediction wrote.

  Args:
    source: file or folder.
    wanted: whether a path is an input. A folder that is one is not looked into.
    expected: what inputs are, for the message.

  Returns:
    The inputs, by path, and how many results of earlier predictions were left out.

  Raises:
    UserError: if there are none.
  """
  if not source.exists():
    raise UserError(f"{source} does not exist; expected {expected}, or a folder.")
  if source.is_file() or wanted(source):
    return [source], 0
  found, results = [], 0
  for path in _walk(source, wanted):
    if not wanted(path):
      continue
    if is_result(path):
      results += 1
    else:
      found.append(path)
  if not found:
    hint = f" ({results} results of an earlier prediction were left out)" if results else ""
    raise UserError(f"{source} and its subfolders hold nothing to read{hint}; expected {expected}.")
  return sorted(found), results


def _walk(folder: Path, wanted: Callable[[Path], bool]) -> Iterator[Path]:
  """Files and wanted folders below a folder; linked folders are entered once."""
  seen = set()
  for place, folders, files in os.walk(folder, followlinks=True):
    here = Path(place)
    real = here.resolve()
    if real in seen:
      folders.clear()
      continue
    seen.add(real)
    keep = []
    for name in sorted(folders):
      if codecs.is_hidden(here / name) or _is_masks_folder(here / name):
        continue
      if wanted(here / name):
        yield here / name
      else:
        keep.append(name)
    folders[:] = keep
    yield from (here / name for name in sorted(files) if not codecs.is_hidden(here / name))


def _is_masks_folder(path: Path) -> bool:
  """Whether a folder holds the masks of a clip that prediction wrote beside it."""
  if not path.name.endswith(_MASKS_ENDING):
    return False
  stem = path.name[: -len(_MASKS_ENDING)]
  return any((path.parent / f"{stem}{end}").exists() for end in ("_sounding.mp4", "_overlay.mp4"))
