"""Writing results: a file has its name once it is complete, and never before."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from effseg_jax.errors import UserError


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
  """Gives a place to write a file or a folder, and moves it to `path` at the end.

  If the block fails, nothing of it stays.

  Raises:
    UserError: if it cannot be written.
  """
  part = path.with_name(f".{path.name}.part")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(part)
    yield part
    if path.is_dir():
      shutil.rmtree(path)
    os.replace(part, path)
  except OSError as error:
    raise UserError(f"{path} cannot be written ({error.strerror or error}).") from error
  finally:
    with contextlib.suppress(OSError):
      _remove(part)


def save_picture(picture: np.ndarray, path: Path) -> Path:
  """Writes uint8 (H, W, 3) or (H, W) as a PNG; returns the path."""
  with complete(path) as part:
    Image.fromarray(picture).save(part, format="PNG")
  return path


def save_indexed(ids: np.ndarray, palette: Sequence[Sequence[int]], path: Path) -> Path:
  """Writes ids, uint8 (H, W), as a PNG with a palette; returns the path."""
  picture = Image.fromarray(ids)
  picture.putpalette(np.asarray(palette, np.uint8)[:256].tobytes())
  with complete(path) as part:
    picture.save(part, format="PNG")
  return path


def save_json(content: Any, path: Path) -> Path:
  """Writes a JSON file; returns the path."""
  with complete(path) as part:
    part.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
  return path


def _remove(path: Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
