"""Reading COCO's json files record by record: as dicts, their millions would take gigabytes."""

from __future__ import annotations

import array
import collections
import contextlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effseg_jax.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
  """An element of one of the file's lists.

  Attributes:
    part: name of the list.
    value: of the element.
    begin: of its text, in bytes from the beginning of the file.
    size: of its text in bytes.
  """

  part: str
  value: Any
  begin: int
  size: int


def records(path: Path) -> Iterator[Record]:
  """Goes through the lists of a json object; other members are passed over.

  Only the file's text is held, and one record at a time.

  Raises:
    UserError: if the file is missing or is no json object.
  """
  if not path.is_file():
    raise UserError(f"{path} is missing.")
  try:
    yield from _scan(_read_text(path))
  except (ValueError, IndexError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"{path} is no COCO json ({error}); expected an object of lists.") from None


def _scan(text: str) -> Iterator[Record]:
  decode = json.JSONDecoder().raw_decode
  skip = lambda at: _SPACE.match(text, at).end()  # noqa: E731
  # Positions are counted in characters; bytes differ from them where a name is not ASCII.
  plain = text.isascii()
  begin = counted = 0
  at = _expect(text, skip(0), "{")
  while text[at := skip(at)] != "}":
    part, at = decode(text, at)
    at = skip(_expect(text, skip(at), ":"))
    if text[at] == "[":
      at = skip(at + 1)
      while text[at] != "]":
        value, end = decode(text, at)
        if plain:
          yield Record(part, value, at, end - at)
        else:
          begin += len(text[counted:at].encode())
          yield Record(part, value, begin, len(text[at:end].encode()))
          counted = at
        at = skip(end)
        if text[at] != "]":
          at = skip(_expect(text, at, ","))
      at += 1
    else:
      _, at = decode(text, at)
    at = skip(at)
    if text[at] != "}":
      at = _expect(text, at, ",")


def _expect(text: str, at: int, character: str) -> int:
  if text[at] != character:
    raise ValueError(f"{character!r} expected at character {at}")
  return at + 1


def _read_text(path: Path) -> str:
  if not path.stat().st_size:
    raise UserError(f"{path} is empty.")
  # Mapped and decoded, so that the text is not in memory twice.
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return str(content, "utf-8")


class PanopticRecords(NamedTuple):
  """The records of a panoptic json as arrays; see `panoptic.PanopticFiles` for the meanings.

  Attributes:
    image_ids: int64 or bytes (N,).
    image_names: bytes (N,), as the list of images has them; empty where it has none.
    png_names: bytes (N,).
    sizes: int32 (N, 2).
    offsets: int64 (N + 1,).
    segment_ids: int64 (M,).
    category_ids: int64 (M,).
    segment_crowd: bool (M,).
    segment_areas: int64 (M,).
    categories: the entries of the list of categories.
  """

  image_ids: np.ndarray
  image_names: np.ndarray
  png_names: np.ndarray
  sizes: np.ndarray
  offsets: np.ndarray
  segment_ids: np.ndarray
  category_ids: np.ndarray
  segment_crowd: np.ndarray
  segment_areas: np.ndarray
  categories: list[dict[str, Any]]


def read_panoptic(path: Path) -> PanopticRecords:
  """Reads a panoptic json; one example per annotation, in the file's order.

  Raises:
    UserError: if the file is missing, or not of this format.
  """
  images: dict[Any, tuple[str, int, int]] = {}
  categories: list[dict[str, Any]] = []
  image_ids: list[Any] = []
  png_names: list[str] = []
  offsets = array.array("q", [0])
  # Four numbers a segment: id, category, crowd, area.
  segments = array.array("q")
  with of_format(path, "COCO panoptic"):
    for part, value, _, _ in records(path):
      if part == "images":
        size = value.get("height", 0), value.get("width", 0)
        images[value["id"]] = (value["file_name"], *size)
      elif part == "categories":
        categories.append(value)
      elif part == "annotations":
        image_ids.append(value["image_id"])
        png_names.append(value["file_name"])
        for entry in value["segments_info"]:
          area = entry.get("area", -1)
          segments.extend((entry["id"], entry["category_id"], entry.get("iscrowd", 0), int(area)))
        offsets.append(len(segments) // 4)
    if not categories:
      raise UserError(f"{path} has no categories; expected the list that names the classes.")
  missing = [image_id for image_id in image_ids if image_id not in images]
  if missing:
    raise UserError(
      f"{path} annotates {len(missing)} images that are not in its list of images; the first has"
      f" the id {missing[0]}."
    )
  found = [images[image_id] for image_id in image_ids]
  columns = np.frombuffer(segments, np.int64).reshape(-1, 4).T
  return PanopticRecords(
    compact(image_ids),
    compact([name for name, _, _ in found]),
    compact(png_names),
    np.array([size for _, *size in found], np.int32).reshape(-1, 2),
    np.array(offsets, np.int64),
    columns[0].copy(),
    columns[1].copy(),
    columns[2] != 0,
    columns[3].copy(),
    categories,
  )


class InstanceRecords(NamedTuple):
  """Where in an instances json the annotations of each image are.

  Attributes:
    image_ids: int64 or bytes (N,).
    image_names: bytes (N,).
    sizes: int32 (N, 2), rows and columns.
    offsets: int64 (N + 1,); image i has the annotations offsets[i] to offsets[i + 1].
    begins: int64 (M,), of each annotation's text in bytes.
    lengths: int32 (M,).
    category_ids: int64 (M,).
    crowd: bool (M,).
    categories: the entries of the list of categories.
  """

  image_ids: np.ndarray
  image_names: np.ndarray
  sizes: np.ndarray
  offsets: np.ndarray
  begins: np.ndarray
  lengths: np.ndarray
  category_ids: np.ndarray
  crowd: np.ndarray
  categories: list[dict[str, Any]]


def read_instances(path: Path) -> InstanceRecords:
  """Reads what an instances json lists, and where its annotations are; not the polygons.

  The polygons of 118,000 images would take gigabytes. `read_annotations` reads those of one image.

  Raises:
    UserError: if the file is missing, not of this format, or annotates an image it does not list.
  """
  images: dict[Any, tuple[str, int, int]] = {}
  categories: list[dict[str, Any]] = []
  owners: list[Any] = []
  # Four numbers an annotation: begin, length, category, crowd.
  columns = array.array("q")
  with of_format(path, "COCO instances"):
    for part, value, begin, size in records(path):
      if part == "images":
        images[value["id"]] = (value["file_name"], value["height"], value["width"])
      elif part == "categories":
        categories.append(value)
      elif part == "annotations":
        owners.append(value["image_id"])
        columns.extend((begin, size, value["category_id"], value.get("iscrowd", 0)))
    if not categories:
      raise UserError(f"{path} has no categories; expected the list that names the classes.")
  rows = {image_id: row for row, image_id in enumerate(images)}
  missing = [owner for owner in owners if owner not in rows]
  if missing:
    raise UserError(
      f"{path} has {len(missing)} annotations of images that are not in its list of images; the"
      f" first is of the id {missing[0]}."
    )
  owner = np.array([rows[owner] for owner in owners], np.int64)
  order = np.argsort(owner, kind="stable")
  table = np.frombuffer(columns, np.int64).reshape(-1, 4)[order]
  return InstanceRecords(
    compact(list(images)),
    compact([name for name, _, _ in images.values()]),
    np.array([size for _, *size in images.values()], np.int32).reshape(-1, 2),
    np.searchsorted(owner[order], np.arange(len(images) + 1)),
    table[:, 0].copy(),
    table[:, 1].astype(np.int32),
    table[:, 2].copy(),
    table[:, 3] != 0,
    categories,
  )


def read_annotations(
  path: Path, begins: Sequence[int], lengths: Sequence[int]
) -> list[dict[str, Any]]:
  """Reads single annotations from their places in the file."""
  handle = os.open(path, os.O_RDONLY)
  try:
    return [
      json.loads(os.pread(handle, int(length), int(begin)))
      for begin, length in zip(begins, lengths, strict=True)
    ]
  except ValueError as error:
    raise UserError(f"{path} has changed since it was opened ({error}).") from None
  finally:
    os.close(handle)


def class_ids(
  category_ids: np.ndarray,
  known: np.ndarray,
  path: Path,
  offsets: np.ndarray,
  image_ids: np.ndarray,
) -> np.ndarray:
  """Category ids -> class ids.

  Args:
    category_ids: int64 (M,).
    known: int64 (K,), category id of each class.
    path: of the json, for the message.
    offsets: int64 (N + 1,), of the images' annotations.
    image_ids: of the images (N,).

  Returns:
    int32 (M,).

  Raises:
    UserError: for a category that is not in the table, naming the image.
  """
  order = np.argsort(known)
  place = np.minimum(np.searchsorted(known[order], category_ids), len(known) - 1)
  labels = order[place]
  wrong = np.flatnonzero(known[labels] != category_ids)
  if len(wrong):
    image_id = image_ids[np.searchsorted(offsets, wrong[0], side="right") - 1]
    raise UserError(
      f"{path}: the category id {category_ids[wrong[0]]} (image {text(image_id)}) is not one of its"
      f" {len(known)} categories."
    )
  return labels.astype(np.int32)


@contextlib.contextmanager
def of_format(path: Path, name: str) -> Iterator[None]:
  """Turns a record without its fields into one line."""
  try:
    yield
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path} is not in the {name} format; the record's field: {error}.") from None


def compact(values: Sequence[Any]) -> np.ndarray:
  """An array of int64, or of bytes where the values are strings: a tenth of a list's memory."""
  if values and isinstance(values[0], str):
    return np.array([value.encode() for value in values])
  return np.array(values, np.int64)


def text(value: Any) -> Any:
  """An element of `compact`'s array as it was: int or str."""
  return value.decode() if isinstance(value, bytes) else int(value)


def require_files(folder: Path, names: np.ndarray, path: Path) -> None:
  """Checks that what a json lists is there, by listing each folder once.

  Args:
    folder: the names are below it.
    names: bytes (N,).
    path: of the json, for the message.

  Raises:
    UserError: with the number of missing files, and the first.
  """
  listings: dict[bytes, set[bytes]] = collections.defaultdict(set)
  missing = []
  for name in names.tolist():
    below, _, last = name.rpartition(b"/")
    if below not in listings:
      where = folder / below.decode()
      listings[below] = set(os.listdir(os.fsencode(where))) if where.is_dir() else set()
    if last not in listings[below]:
      missing.append(name)
  if missing:
    raise UserError(
      f"{path} lists {len(names)} files and {len(missing)} are missing; the first is"
      f" {folder / missing[0].decode()}."
    )
