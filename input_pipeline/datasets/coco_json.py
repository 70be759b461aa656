"""Reading COCO's json files record by record: as dicts, their millions would take gigabytes."""

from __future__ import annotations

import array
import collections
import contextlib
import difflib
import json
import mmap
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effseg_jax.errors import UserError, extra, warn_once
from effseg_jax.file_kinds import mistaken_for
from effseg_jax.input_pipeline.datasets import coco_values

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
  except UserError:
    raise
  except UnicodeDecodeError as error:
    raise UserError(
      f"{path} is not encoded in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
    ) from None
  except (ValueError, IndexError, RecursionError) as error:
    raise UserError(f"{path} is no COCO json ({error}); expected an object of lists.") from None


def _scan(text: str) -> Iterator[Record]:
  decode = json.JSONDecoder().raw_decode
  skip = lambda at: _SPACE.match(text, at).end()  # noqa: E731
  # Positions are counted in characters; bytes differ from them where a name is not ASCII.
  mark = 1 if text.startswith("\ufeff") else 0
  plain = text.isascii()
  begin = counted = 0
  at = _expect(text, skip(mark), "{")
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
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
      raise UserError(
        f"{path} is encoded in UTF-16 or UTF-32, as PowerShell writes it; save it as UTF-8, for"
        " example with: Get-Content FILE | Set-Content -Encoding utf8 NEW."
      )
    if (wrong := mistaken_for(content[:256])) is not None:
      raise UserError(f"{path} {wrong}.")
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
  listing = _Listing(path)
  owners: list[Any] = []
  png_names: list[str] = []
  offsets = array.array("q", [0])
  # Three numbers a segment: id, category, crowd; and its area.
  segments, areas = array.array("q"), array.array("d")
  with of_format(path, "COCO panoptic"):
    for part, value, _, _ in records(path):
      if part != "annotations":
        listing.add(part, value)
        continue
      owner = listing.owner(value, value["file_name"])
      owners.append(owner)
      png_names.append(_name(value["file_name"], path))
      about = f"{path}: the annotation of image {owner}"
      infos = value["segments_info"]
      if not isinstance(infos, list):
        raise UserError(f"{about} has the segments_info {infos!r}; expected a list.")
      seen = set()
      for entry in infos:
        number = coco_values.integer(entry["id"])
        if number is None or not 0 < number < 1 << 24 or number in seen:
          raise UserError(
            f"{about} has the segment id {entry['id']!r}{' twice' if number in seen else ''};"
            " expected different numbers from 1 on, as in its PNG."
          )
        seen.add(number)
        category = coco_values.integer(entry["category_id"])
        crowd = coco_values.flag(entry.get("iscrowd"))
        if category is None or crowd is None:
          field = "category_id" if category is None else "iscrowd"
          raise UserError(f"{about} has the {field} {entry[field]!r}; expected a number.")
        segments.extend((number, category, crowd))
        areas.append(coco_values.area(entry.get("area")) or -1.0)
      offsets.append(len(areas))
  images, numeric = listing.finish(owners)
  owners = [coco_values.as_id(owner, numeric) for owner in owners]
  _require_known(owners, images, path)
  found = [images[owner] for owner in owners]
  columns = np.frombuffer(segments, np.int64).reshape(-1, 3).T
  return PanopticRecords(
    compact(owners),
    compact([name for name, _, _ in found]),
    compact(png_names),
    np.array([size for _, *size in found], np.int32).reshape(-1, 2),
    np.array(offsets, np.int64),
    columns[0].copy(),
    columns[1].copy(),
    columns[2] != 0,
    np.rint(np.frombuffer(areas, np.float64)).astype(np.int64),
    listing.used_categories(columns[1]),
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
  """Reads the records of an instances json and the places of its annotations; not the polygons.

  The polygons of 118,000 images would take gigabytes. `read_annotations` reads those of one image.
  Annotations without a mask are left out, with a warning; see `AnnotationRules`.

  Raises:
    UserError: if the file is missing, not of this format, or annotates an image it does not list.
  """
  listing, rules = _Listing(path), AnnotationRules(path)
  owners: list[Any] = []
  # Four numbers an annotation: begin, length, category, crowd.
  columns = array.array("q")
  with of_format(path, "COCO instances"):
    for part, value, begin, size in records(path):
      if part != "annotations":
        listing.add(part, value)
        continue
      kept = rules.read(value)
      if kept is None:
        continue
      owners.append(listing.owner(value, f"annotation {value.get('id')}"))
      columns.extend((begin, size, *kept))
  images, numeric = listing.finish([*owners, *rules.without_mask])
  owners = [coco_values.as_id(owner, numeric) for owner in owners]
  _require_known(owners, images, path)
  rows = {image_id: row for row, image_id in enumerate(images)}
  owner = np.array([rows[owner] for owner in owners], np.int64)
  order = np.argsort(owner, kind="stable")
  table = np.frombuffer(columns, np.int64).reshape(-1, 4)[order]
  rules.finish(len(owners), int(np.count_nonzero(table[:, 3])))
  return InstanceRecords(
    compact(list(images)),
    compact([name for name, _, _ in images.values()]),
    np.array([size for _, *size in images.values()], np.int32).reshape(-1, 2),
    np.searchsorted(owner[order], np.arange(len(images) + 1)),
    table[:, 0].copy(),
    table[:, 1].astype(np.int32),
    table[:, 2].copy(),
    table[:, 3] != 0,
    listing.used_categories(table[:, 2]),
  )


def read_truth(
  path: Path, sizes: Mapping[int | str, tuple[int, int] | None]
) -> tuple[list[dict[str, Any]], set[int | str]]:
  """The annotations of an instances json that an evaluation counts, by the rules of training.

  Args:
    path: of the json.
    sizes: id -> rows and columns of each evaluated image; None: as the json has them.

  Returns:
    Annotations in COCO's format, with run lengths for masks, ids from 1 on, and an area that is
    counted where the file has none; and the ids of all images that the file lists.

  Raises:
    UserError: as `read_instances`.
  """
  listing, rules = _Listing(path, named=False), AnnotationRules(path)
  raw: list[tuple[Any, int, int, Any, float | None]] = []
  named: list[Any] = []
  wanted = {str(image_id) for image_id in sizes}
  with of_format(path, "COCO instances"):
    for part, value, _, _ in records(path):
      if part != "annotations":
        listing.add(part, value)
        continue
      kept = rules.read(value)
      if kept is None:
        continue
      owner = listing.owner(value, f"annotation {value.get('id')}")
      named.append(owner)
      number = coco_values.integer(owner)
      if str(owner if number is None else number) in wanted or str(owner) in wanted:
        area = coco_values.area(value.get("area"))
        raw.append((owner, *kept, value, area))
  images, numeric = listing.finish([*named, *rules.without_mask])
  truth: list[dict[str, Any]] = []
  with extra("coco"):
    from pycocotools import mask as coco_mask

  for owner, category, crowd, value, area in raw:
    image_id = coco_values.as_id(owner, numeric)
    if image_id not in sizes:
      continue
    size = sizes[image_id] or images[image_id][1:]
    found = rules.draw(value, size)
    if found is None:
      continue
    drawn = float(coco_mask.area(found))
    plausible = area is not None and area <= size[0] * size[1]
    truth.append(
      {
        "id": len(truth) + 1,  # the evaluation takes 0 for "no match"
        "image_id": image_id,
        "category_id": category,
        "segmentation": found,
        "area": area if plausible else drawn,
        "iscrowd": crowd,
      }
    )
  return truth, set(images)


class AnnotationRules:
  """Which annotations of an instances json count: the same for training and evaluation.

  * `iscrowd` is 0 where it is missing; `area` is counted from the mask where it is missing, not
    positive, or larger than the image.
  * Annotation ids do not matter: they may begin at 0, repeat or be missing.
  * Without a mask (no `segmentation`, an empty one, polygons of fewer than three points), and
    without a pixel inside the image, an object is left out.
  * Any other segmentation that cannot be drawn is one line with the id of its annotation.
  """

  def __init__(self, path: Path):
    """Begins with nothing read; `path` is for messages."""
    self._path = path
    self.without_mask: list[Any] = []
    self._first: Any = None

  def read(self, annotation: dict[str, Any]) -> tuple[int, int] | None:
    """Category id and crowd (0 or 1) of an annotation; None if it is left out.

    Raises:
      UserError: if it cannot be understood.
    """
    segmentation = annotation.get("segmentation")
    problem = coco_values.mask_problem(segmentation)
    if problem:
      raise self._unreadable(annotation, problem)
    if problem == "":
      if not self.without_mask:
        self._first = annotation.get("id")
      self.without_mask.append(annotation["image_id"])
      return None
    category = coco_values.integer(annotation["category_id"])
    crowd = coco_values.flag(annotation.get("iscrowd"))
    if category is None or crowd is None:
      field = "category_id" if category is None else "iscrowd"
      raise UserError(
        f"{self._path}: annotation {annotation.get('id')} has the {field} {annotation[field]!r};"
        f" expected {'a number' if category is None else '0 or 1'}."
      )
    return category, int(crowd)

  def draw(self, annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """Run lengths of an annotation that `read` has kept; None: it has no pixel in the image.

    Raises:
      UserError: if its run lengths are of another size.
    """
    try:
      return coco_values.runs(annotation["segmentation"], size)
    except UserError:
      raise
    except Exception as error:  # a C extension may raise anything
      raise self._unreadable(annotation, str(error)) from None

  def finish(self, kept: int, crowds: int) -> None:
    """Warns of omitted records.

    Raises:
      UserError: if nothing is left.
    """
    left_out = len(self.without_mask)
    if left_out and not kept:
      raise UserError(
        f"{self._path}: all {left_out:,} objects lack a mask: their segmentation is empty, as in a"
        " data set of boxes; expected polygons or run lengths."
      )
    if kept and crowds == kept:
      raise UserError(
        f"{self._path}: all {kept:,} objects are crowds (iscrowd is 1), which are neither trained"
        " nor evaluated; set iscrowd to 0 for single objects, also for those with run lengths."
      )
    if left_out:
      warn_once(
        f"without mask {self._path}",
        f"{self._path}: {left_out:,} of {left_out + kept:,} objects have no mask and are left out;"
        f" the first is annotation {self._first}.",
      )

  def _unreadable(self, annotation: dict[str, Any], what: str) -> UserError:
    return UserError(
      f"{self._path}: annotation {annotation.get('id')} of image {annotation.get('image_id')} has a"
      f" segmentation that cannot be read: it {what}; {coco_values.SHAPE}."
    )


class _Listing:
  """The images and categories of a json, brought to one form."""

  def __init__(self, path: Path, *, named: bool = True):
    self._path, self._named = path, named
    self._images: list[tuple[Any, str, int, int]] = []
    self._categories: dict[int, dict[str, Any]] = {}

  def add(self, part: str, value: Any) -> None:
    """Takes a record of the lists of images and categories; ignores others."""
    if part == "images":
      if not coco_values.is_id(value["id"]):
        raise UserError(
          f"{self._path}: an image has the id {value['id']!r}; expected a number or text."
        )
      size = coco_values.length(value.get("height")), coco_values.length(value.get("width"))
      size = size if all(size) else (0, 0)  # then the picture's header tells
      name = _name(value["file_name"], self._path) if self._named else ""
      self._images.append((value["id"], name, *size))
    elif part == "categories":
      number = coco_values.integer(value["id"])
      if number is None:
        raise UserError(f"{self._path}: a category has the id {value['id']!r}; expected a number.")
      if number in self._categories:
        raise UserError(f"{self._path} lists the category id {number} twice.")
      thing = coco_values.flag(value.get("isthing", 1))
      if thing is None:
        raise UserError(
          f"{self._path}: the category {number} has isthing {value['isthing']!r}; expected 0 or 1."
        )
      entry = {"id": number, "name": str(value["name"]).strip(), "isthing": int(thing)}
      extra = {key: value[key] for key in ("supercategory", "color") if key in value}
      self._categories[number] = {**entry, **extra}

  def owner(self, annotation: dict[str, Any], about: Any) -> Any:
    """The id of an annotation's image, as it is written."""
    owner = annotation["image_id"]
    if not coco_values.is_id(owner):
      raise UserError(
        f"{self._path}: {about} has the image_id {owner!r}; expected the id of an image."
      )
    return owner

  def finish(self, owners: Sequence[Any]) -> tuple[dict[int | str, tuple[str, int, int]], bool]:
    """Image id -> name and size, and whether the ids are numbers.

    Raises:
      UserError: for an id that two images have, or a list that is missing.
    """
    if not self._categories:
      raise UserError(f"{self._path} has no categories; expected the list that names the classes.")
    numeric = coco_values.ids_as_one_type(image[0] for image in self._images)
    images: dict[int | str, tuple[str, int, int]] = {}
    for raw, *about in self._images:
      image_id = coco_values.as_id(raw, numeric)
      if image_id in images:
        raise UserError(
          f"{self._path} gives the id {image_id} to two images, {images[image_id][0]} and"
          f" {about[0]}; expected an id for each."
        )
      images[image_id] = tuple(about)
    del owners
    return images, numeric

  def used_categories(self, used: np.ndarray) -> list[dict[str, Any]]:
    """The categories that are classes: without the root that Roboflow puts above them.

    Raises:
      UserError: for a name that two of them have.
    """
    used_ids = set(np.unique(used).tolist())
    entries = list(self._categories.values())
    above = {entry.get("supercategory") for entry in entries}
    names = collections.Counter(entry["name"] for entry in entries)

    def is_root(entry: dict[str, Any]) -> bool:
      root = entry.get("supercategory") in ("none", "", None) and entry["name"] in above
      root = root or (entry["id"] == 0 and names[entry["name"]] > 1)
      return root and entry["id"] not in used_ids

    kept = [entry for entry in entries if not is_root(entry)] if len(entries) > 1 else entries
    for name, count in collections.Counter(entry["name"] for entry in kept).items():
      if count > 1:
        ids = [entry["id"] for entry in kept if entry["name"] == name]
        raise UserError(
          f"{self._path}: the categories {', '.join(map(str, ids))} have the same name {name!r};"
          " expected a name for each class."
        )
    return kept


def _require_known(owners: Sequence[Any], images: Mapping[Any, Any], path: Path) -> None:
  missing = [owner for owner in owners if owner not in images]
  if missing:
    raise UserError(
      f"{path} has {len(missing)} annotations of images that are not in its list of images; the"
      f" first is of the id {missing[0]}."
    )


def _name(value: Any, path: Path) -> str:
  if not isinstance(value, str) or not value:
    raise UserError(f"{path} has the file_name {value!r}; expected the name of a picture.")
  return value


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


def find_files(folder: Path, names: np.ndarray, path: Path) -> np.ndarray:
  """Finds the files of a json by listing each folder once.

  `file_name` is below the folder of the split. Exporters write backslashes, the folder itself
  ("val/a.jpg"), a path on the tool's server or an address ("/data/local-files/?d=a.jpg"): where a
  name is not found as it is, it is looked for without them.

  Args:
    folder: the names are below it.
    names: bytes (N,).
    path: of the json, for the message.

  Returns:
    bytes (N,), the names that exist below the folder.

  Raises:
    UserError: with the number of missing files, and the first; or if two entries are one file.
  """
  listings: dict[str, set[str]] = {}

  def exists(name: str) -> bool:
    below, _, last = name.rpartition("/")
    if below not in listings:
      where = folder / below
      listings[below] = set(os.listdir(where)) if where.is_dir() else set()
    return last in listings[below]

  found, missing, moved = [], [], {}
  for raw in names.tolist():
    name = raw.decode()
    if not name.startswith("/") and exists(name):
      found.append(name)
      continue
    other = next((option for option in _other_names(name) if exists(option)), None)
    if other is None:
      missing.append(name)
    elif moved.setdefault(other, name) != name:
      raise UserError(
        f"{path}: {moved[other]!r} and {name!r} would both be {folder / other}; expected file_name"
        f" to be the path below {folder}."
      )
    else:
      found.append(other)
  if missing:
    last = re.split(r"[/\\]", missing[0])[-1]
    listing = listings.get("") or (set(os.listdir(folder)) if folder.is_dir() else set())
    close = difflib.get_close_matches(last, listing, n=1, cutoff=0.6)
    hint = f" {folder / close[0]} is there." if close else ""
    raise UserError(
      f"{path} lists {len(names)} files and {len(missing)} are missing; the first is"
      f" {folder / missing[0]}. A file_name is the path below {folder}.{hint}"
    )
  return compact(found) if moved else names


def _other_names(name: str) -> Iterator[str]:
  """Other interpretations of a file_name, the most literal first."""
  plain = name.replace("\\", "/")
  if "?d=" in plain:
    plain = plain.split("?d=", 1)[1]
  plain = plain.partition("://")[2] or plain
  for text in dict.fromkeys((plain, urllib.parse.unquote(plain))):
    parts = [part for part in text.split("/") if part not in ("", ".")]
    for begin in range(len(parts)):
      if ".." not in parts[begin:]:
        yield "/".join(parts[begin:])
