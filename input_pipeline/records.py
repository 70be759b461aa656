"""Packed data sets on disk: records of encoded bytes in ArrayRecord shards, and a manifest.

  manifest.json                       what was packed: classes, options, counts, checksums
  <split>/00000-of-00012.array_record records, one group each, so that any can be read alone
  <split>/index.npz                   data of every example that is needed without reading it
  <split>/...                         other files of the split, copied as they are

A record is a msgpack map. A picture is the file it came from, byte for byte (a PNG where it was
drawn); every other array is compressed without loss.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from effseg_jax.errors import UserError, extra

FORMAT = "effseg_jax records 1"
MANIFEST = "manifest.json"

Record = dict[str, Any]
# Number of an example -> its record, and its entries of the index.
Encode = Callable[[int], tuple[Record, Mapping[str, Any]]]


class Records:
  """Random access to the records of a split."""

  def __init__(self, root: str | Path, split: str):
    """Opens the shards; their footers are read.

    Raises:
      UserError: if the folder does not hold the split whole.
    """
    with extra("train"):
      import grain

    self._folder = Path(root) / split
    entry = split_entry(read_manifest(root), split, root)
    paths = [self._folder / shard["file"] for shard in entry["shards"]]
    for path, shard in zip(paths, entry["shards"], strict=True):
      size = path.stat().st_size if path.is_file() else 0
      if size != shard["bytes"]:
        raise UserError(
          f"{path} has {size:,} bytes; expected {shard['bytes']:,}, as {MANIFEST} lists it. Copy it"
          " again, or delete the folder of the split and pack it again."
        )
    self._source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
    with np.load(self._folder / "index.npz") as index:
      self.index = {name: index[name] for name in index.files}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    """Reads and decompresses a record; pictures stay encoded, as `bytes`.

    Raises:
      UserError: if it is damaged.
    """
    try:
      return msgpack.unpackb(self._source[index], object_hook=_restore)
    except (ValueError, RuntimeError, IndexError, zlib.error, msgpack.UnpackException) as error:
      raise UserError(
        f"record {index} in {self._folder} is damaged ({str(error).splitlines()[0]});"
        " effseg prepare --verify lists the damaged shards."
      ) from None


def is_packed(root: str | Path | None) -> bool:
  """Whether a folder holds a packed data set."""
  return root is not None and (Path(root) / MANIFEST).is_file()


def read_manifest(root: str | Path) -> dict[str, Any]:
  """Reads the manifest.

  Raises:
    UserError: if there is none, or one of another format.
  """
  path = Path(root) / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
      raise ValueError(f"format {manifest['format']!r}")
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is no manifest of effseg prepare ({error}).") from None
  return manifest


def split_entry(manifest: Mapping[str, Any], split: str, root: str | Path) -> dict[str, Any]:
  """The manifest's entry of a split.

  Raises:
    UserError: if it was not packed.
  """
  if split not in manifest["splits"]:
    raise UserError(
      f"{root} has no packed split {split!r}; it holds {', '.join(manifest['splits'])}. Pack it"
      " with effseg prepare --splits."
    )
  return manifest["splits"][split]


def write_split(
  root: str | Path,
  split: str,
  count: int,
  encode: Encode,
  facts: Mapping[str, Any],
  *,
  examples_per_shard: int = 1000,
  num_threads: int = 4,
  on_error: str = "raise",
  on_example: Callable[[int], None] = lambda number: None,
  companions: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
  """Writes a split's records, and then its entry in the manifest.

  A shard appears under its name when it is whole, with its checksum beside it; what an interrupted
  call has finished is not done again.

  Args:
    root: of the packed data set; made if it is missing.
    split: name of the folder below it.
    count: number of examples.
    encode: called in threads.
    facts: of the manifest, the same for all splits: `data`, `kind`, `options`, `classes` and so on.
    examples_per_shard: the last shard has fewer.
    num_threads: that read and compress.
    on_error: "raise", or "skip": broken examples are left out, and listed in the manifest.
    on_example: called with the number of examples that are done.
    companions: name -> a file that is copied beside the shards, with its checksum.

  Returns:
    The split's entry in the manifest.

  Raises:
    UserError: for a broken example; for what was begun with other shards, or packed otherwise.
  """
  root = Path(root)
  folder = root / split
  folder.mkdir(parents=True, exist_ok=True)
  manifest = {"format": FORMAT, **facts, "splits": {}}
  if is_packed(root):
    manifest = read_manifest(root)
    _require_same(manifest, facts, root)
  shards, index = [], []
  number = -(-count // examples_per_shard)
  origin = _fingerprint({**facts, "examples": count})
  for shard in range(number):
    path = folder / f"{shard:05d}-of-{number:05d}.array_record"
    span = range(shard * examples_per_shard, min((shard + 1) * examples_per_shard, count))
    done = _finished(path, span, origin, on_error)
    if done is None:
      encoded = _encode_all(encode, span, num_threads, on_error, on_example)
      done = _write_shard(path, span, encoded, origin)
    on_example(span.stop)
    shards.append(done["shard"])
    index += done["index"]
  entry = {
    "examples": len(index),
    "skipped": [line for shard in shards for line in shard.pop("skipped")],
    "shards": shards,
    "files": [_copy(source, folder / name) for name, source in (companions or {}).items()],
  }
  columns = {name: np.array([row[name] for row in index]) for name in (index[0] if index else {})}
  np.savez_compressed(folder / "index.npz", **columns)
  manifest["splits"][split] = entry
  _replace(root / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
  for path in folder.glob("*-of-*.json"):  # what `_finished` needed; other files stay
    path.unlink()
  return entry


def verify(root: str | Path, split: str) -> Iterator[tuple[str, bool]]:
  """Compares each file with its checksum: (file, whether it is the one that was written)."""
  entry = split_entry(read_manifest(root), split, root)
  for shard in [*entry["shards"], *entry.get("files", [])]:
    path = Path(root) / split / shard["file"]
    yield shard["file"], path.is_file() and _digest(path) == shard["sha256"]


def _encode_all(
  encode: Encode,
  span: range,
  num_threads: int,
  on_error: str,
  on_example: Callable[[int], None],
) -> Iterator[tuple[bytes, dict[str, Any]] | str]:
  """Records and index rows in order; for an example left out, why."""
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    step = 4 * num_threads  # a bounded number of records waits to be written
    for begin in range(span.start, span.stop, step):
      part = range(begin, min(begin + step, span.stop))
      for number, future in zip(part, [pool.submit(encode, n) for n in part], strict=True):
        try:
          record, row = future.result()
          yield msgpack.packb(record, default=_flatten), dict(row)
        except UserError as error:
          if on_error != "skip":
            raise
          yield str(error)
        on_example(number + 1)


def _write_shard(path: Path, span: range, encoded: Any, origin: str) -> dict[str, Any]:
  partial = path.with_suffix(".partial")
  index, skipped = [], []
  with extra("train"):
    from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
  try:
    for item in encoded:
      if isinstance(item, str):
        skipped.append(item)
      else:
        writer.write(item[0])
        index.append(item[1])
  finally:
    writer.close()
  shard = {
    "file": path.name,
    "examples": len(index),
    "bytes": partial.stat().st_size,
    "sha256": _digest(partial),
    "skipped": skipped,
  }
  done = {
    "span": [span.start, span.stop],
    "origin": origin,
    "shard": shard,
    "index": index,
  }
  partial.replace(path)
  _replace(path.with_suffix(".json"), json.dumps(done, default=_plain).encode())
  return done


def _copy(source: Path, target: Path) -> dict[str, Any]:
  """Copies a file as it is; returns its entry in the manifest."""
  new = target.with_name(f"{target.name}.new")
  shutil.copyfile(source, new)
  os.replace(new, target)
  return {"file": target.name, "bytes": target.stat().st_size, "sha256": _digest(target)}


def _fingerprint(facts: Mapping[str, Any]) -> str:
  """Of everything that the records of a split depend on, as far as the manifest knows it."""
  text = json.dumps(facts, default=_plain, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _finished(path: Path, span: range, origin: str, on_error: str) -> dict[str, Any] | None:
  """The entry of a shard that an earlier call finished, if any.

  Raises:
    UserError: if it packed other data, with other options, or into another number of shards.
  """
  others = {other.name.split("-of-")[1] for other in path.parent.glob("*-of-*.json")}
  if others - {path.with_suffix(".json").name.split("-of-")[1]}:
    raise UserError(
      f"{path.parent} was begun with another number of shards; pack with the same"
      " --examples_per_shard, or delete it."
    )
  beside = path.with_suffix(".json")
  if not (beside.is_file() and path.is_file()):
    return None
  done = json.loads(beside.read_text(encoding="utf-8"))
  if done.get("origin") != origin:
    raise UserError(
      f"{path.parent} was begun with other options or other data; pack with the same, or delete it."
    )
  if on_error != "skip" and done["shard"]["skipped"]:
    return None  # read again, so that the broken example is reported
  whole = path.stat().st_size == done["shard"]["bytes"]
  return done if whole and done["span"] == [span.start, span.stop] else None


def _require_same(manifest: Mapping[str, Any], facts: Mapping[str, Any], root: Path) -> None:
  for name, value in json.loads(json.dumps(facts, default=_plain)).items():
    if manifest.get(name) != value:
      raise UserError(
        f"{root} was packed with another {name} ({_short(manifest.get(name))}) than this"
        f" ({_short(value)}); choose another folder."
      )


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) < 80 else f"{text[:77]}..."


def _replace(path: Path, content: bytes) -> None:
  """Writes a file so that it is there whole or not at all."""
  new = path.with_name(f"{path.name}.new")
  new.write_bytes(content)
  os.replace(new, path)


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
  """numpy to JSON."""
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  raise TypeError(f"{type(value)} in a manifest")


def _flatten(value: Any) -> Any:
  """numpy to msgpack."""
  if not isinstance(value, np.ndarray | np.generic):
    raise TypeError(f"{type(value)} in a record")
  array = np.asarray(value)
  content = array.tobytes()
  smaller = zlib.compress(content, 6)
  packed = {"dtype": array.dtype.str, "shape": array.shape}
  if len(smaller) < 0.9 * len(content):
    return {**packed, "zlib": smaller}
  return {**packed, "raw": content}


def _restore(value: dict[str, Any]) -> Any:
  """The inverse of `_flatten`; the arrays are read-only."""
  if "dtype" not in value or not ("zlib" in value or "raw" in value):
    return value
  content = zlib.decompress(value["zlib"]) if "zlib" in value else value["raw"]
  array = np.frombuffer(content, np.dtype(value["dtype"])).reshape(value["shape"])
  return array if array.ndim else array[()]


def encode_png(picture: np.ndarray) -> bytes:
  """A drawn picture, uint8 (H, W, 3), as a PNG file's content."""
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(picture).save(file, "PNG")
  return file.getvalue()
