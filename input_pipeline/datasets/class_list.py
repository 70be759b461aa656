"""Reading a list of classes in the forms that tools write."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets import files

_MAX_CLASSES = 255
_HEX = re.compile(r"#([0-9a-fA-F]{6})")
_NUMBERED = re.compile(r"(\d+)\s*[:.,;=\s)]\s*(\S.*)")
Entry = tuple[str, tuple[int, ...] | None]


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
  """Reads a class list; see `read_entries` for the forms.

  Returns:
    Names, and their palette uint8 (K, 3), with distinct colours where the list has none.

  Raises:
    UserError: see `read_entries`.
  """
  entries = read_entries(path)
  palette = files.distinct_palette(len(entries))
  for index, (_, colour) in enumerate(entries):
    if colour is not None:
      palette[index] = colour
  return tuple(name for name, _ in entries), palette


def read_entries(path: Path) -> list[Entry]:
  """Reads names and colours.

  One class a line: `name`, `name 255 0 0` or `name #ff0000` (names may have spaces). Also numbered
  from 0 (`0 name`), with commas or semicolons and perhaps a header (`name,r,g,b`), CVAT's labelmap
  (`name:255,0,0::`), and a JSON list of names. Lines that begin with `#` are comments.

  Args:
    path: a text in UTF-8, or UTF-16 with its mark.

  Returns:
    (name, colour or None) per class.

  Raises:
    UserError: for another encoding, an empty list, a name given twice, a colour beyond 255 or too
      many classes.
  """
  text = read_text(path)
  entries = _json_names(text, path)
  if entries is None:
    rows = [
      (number, line.strip())
      for number, line in enumerate(text.splitlines(), 1)
      if line.strip() and not line.lstrip().startswith("#")
    ]
    rows = _without_numbers(rows, path)
    entries = _labelmap(rows) or _table(rows) or [_words(line) for _, line in rows]
    numbers = [number for number, _ in rows][-len(entries) :] if entries else []
  else:
    numbers = list(range(1, len(entries) + 1))
  seen: set[str] = set()
  for number, (name, colour) in zip(numbers, entries, strict=True):
    if colour is not None and max(colour) > 255:
      raise UserError(f"{path}, line {number}: the colour {list(colour)} goes beyond 255.")
    if name in seen:
      raise UserError(f"{path}, line {number}: the class {name!r} is listed twice.")
    seen.add(name)
  if not entries:
    raise UserError(f"{path} lists no class; expected one name a line.")
  if len(entries) > _MAX_CLASSES:
    raise UserError(f"{path} lists {len(entries)} classes; 8-bit labels have room for 255.")
  return entries


def read_text(path: Path) -> str:
  """A text file, without a byte-order mark.

  Raises:
    UserError: if it is neither UTF-8 nor marked as UTF-16.
  """
  content = path.read_bytes()
  marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
  try:
    return content.decode("utf-16" if marked else "utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{path} is not encoded in UTF-8 (byte {error.start} is {content[error.start]:#04x}); open it"
      " in an editor and save it as UTF-8."
    ) from None


def _words(line: str) -> Entry:
  """`name`, `name red green blue` or `name #rrggbb`."""
  words = line.split()
  if len(words) > 3 and all(word.isdecimal() for word in words[-3:]):
    return " ".join(words[:-3]), tuple(int(word) for word in words[-3:])
  if len(words) > 1 and (match := _HEX.fullmatch(words[-1])):
    return " ".join(words[:-1]), tuple(bytes.fromhex(match[1]))
  return " ".join(words), None


def _json_names(text: str, path: Path) -> list[Entry] | None:
  if not text.lstrip().startswith(("[", "{")):
    return None
  try:
    content = json.loads(text)
  except ValueError:
    return None
  if isinstance(content, dict):  # {"0": "background", ...} or {"background": 0, ...}
    if all(isinstance(value, int) for value in content.values()):
      content = sorted(content, key=content.get)
    else:
      content = [content[key] for key in sorted(content, key=lambda key: (len(key), key))]
  if not all(isinstance(name, str) and name.strip() for name in content):
    raise UserError(f"{path} is JSON, but no list of names; expected one name a line.")
  return [(" ".join(name.split()), None) for name in content]


def _without_numbers(rows: list[tuple[int, str]], path: Path) -> list[tuple[int, str]]:
  """Takes the numbers 0, 1, 2, ... from the beginnings of lines that all have one."""
  matches = [_NUMBERED.fullmatch(line) for _, line in rows]
  if len(rows) < 2 or not all(matches):
    return rows
  numbers = [int(match[1]) for match in matches if match]
  if numbers == list(range(len(rows))):
    return [(number, match[2]) for (number, _), match in zip(rows, matches, strict=True) if match]
  if numbers == list(range(1, len(rows) + 1)):
    raise UserError(
      f"{path} numbers its classes from 1; the first line is the class of the value 0. If 0 is"
      " unlabelled, take the numbers away and set --config.data.options.labels=from_one; otherwise"
      " put a first line before them, 0 background."
    )
  return rows


def _labelmap(rows: list[tuple[int, str]]) -> list[Entry] | None:
  """CVAT's `name:red,green,blue:parts:actions`."""
  entries: list[Entry] = []
  for _, line in rows:
    match = re.fullmatch(r"(.+?):(?:(\d+),(\d+),(\d+))?:[^:]*:[^:]*", line)
    if not match:
      return None
    colour = None if match[2] is None else (int(match[2]), int(match[3]), int(match[4]))
    entries.append((" ".join(match[1].split()), colour))
  return entries


def _table(rows: list[tuple[int, str]]) -> list[Entry] | None:
  """`name,red,green,blue` in every line, perhaps below a header; commas, semicolons or tabs."""
  for mark in (",", ";", "\t"):
    cells = [
      [cell.strip() for cell in row] for row in csv.reader([r[1] for r in rows], delimiter=mark)
    ]
    if cells and not any(cell.isdecimal() for cell in cells[0]) and len(cells[0]) == 4:
      cells = cells[1:]  # a header
    if cells and all(len(row) == 4 and all(map(str.isdecimal, row[1:])) for row in cells):
      return [(" ".join(row[0].split()), tuple(int(cell) for cell in row[1:])) for row in cells]
    if cells and all(len(row) == 4 and all(map(str.isdecimal, row[:3])) for row in cells):
      return [(" ".join(row[3].split()), tuple(int(cell) for cell in row[:3])) for row in cells]
  return None
