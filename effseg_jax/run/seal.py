"""Checksums of a finished checkpoint, so that a damaged one is not mistaken for it."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

_SEAL = "checksums.json"
_BLOCK = 1 << 24


def seal(folder: Path) -> None:
  """Writes the sizes and CRC-32 sums of all files below a folder into it."""
  sums = {str(path.relative_to(folder)): _sum(path) for path in _files(folder)}
  new = folder / f"{_SEAL}.new"
  new.write_text(json.dumps(sums), encoding="utf-8")
  new.replace(folder / _SEAL)


def is_sealed(folder: Path) -> bool:
  """Whether `seal` has finished."""
  return (folder / _SEAL).is_file()


def fault(folder: Path, items: tuple[str, ...], checksums: bool = True) -> str | None:
  """The defect of a checkpoint, or None.

  One whose process was killed before it could seal it is looked through for what must be there; the
  library that wrote it gives a folder its name only when all is written.

  Args:
    folder: of a step.
    items: names of its parts that must exist.
    checksums: whether everything is read and compared.
  """
  for item in items:
    if not (folder / item).is_dir():
      return f"{item} is missing"
  for path in (*folder.glob("*/metadata"), *folder.glob("*/metrics")):
    try:
      json.loads(path.read_bytes())
    except (ValueError, OSError):
      return f"{path.relative_to(folder)} is damaged"
  if not checksums or not is_sealed(folder):
    return None
  try:
    sums = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
  except (ValueError, OSError):
    return f"{_SEAL} is damaged"
  for name, expected in sums.items():
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != expected[0]:
      return f"{name} has {path.stat().st_size} bytes and not {expected[0]}"
    if _sum(path) != expected:
      return f"{name} does not match its checksum"
  return None


def _files(folder: Path) -> list[Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(_SEAL))


def _sum(path: Path) -> list[int]:
  size = total = 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      size += len(block)
      total = zlib.crc32(block, total)
  return [size, total]
