"""Packed data sets: any open split becomes records, and the records give the same examples.

Three kinds: `images` (an image and a label, of any task), `segments` (an image and everything that
is annotated in it) and `clips` (frames and their sound, as the log-mel patches of the models).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs, datasets, records
from effseg_jax.input_pipeline.datasets import base, panoptic
from effseg_jax.input_pipeline.datasets.mask_runs import MaskRuns

_INSTANCES = "instances.json"


def pack(
  dataset: Any, root: str | Path, *, name: str, options: Mapping[str, Any], **how: Any
) -> dict[str, Any]:
  """Packs an open split.

  Args:
    dataset: any of `effseg_jax.input_pipeline.datasets`.
    root: folder of the packed data set; other splits may be there already.
    name: in `datasets.DATASETS`.
    options: with which the data set was opened, those left at their defaults included or not;
      reading asks for the same.
    **how: see `records.write_split`.

  Returns:
    The split's entry in the manifest.

  Raises:
    UserError: see `records.write_split`.
  """
  kind = _kind(dataset)
  facts: dict[str, Any] = {
    "data": name,
    "name": dataset.name,
    "kind": kind,
    "options": dict(options),
    "classes": list(dataset.classes),
    "palette": np.asarray(dataset.palette).tolist() if hasattr(dataset, "palette") else None,
  }
  if getattr(dataset, "unused", ()):
    facts["unused"] = list(dataset.unused)
  if kind == "segments":
    facts["things"] = [bool(thing) for thing in dataset.thing_mask]
    facts["class_ids"] = [int(number) for number in dataset.class_ids]
  if kind == "clips":
    size = dataset.prediction_size
    facts["num_frames"] = dataset.num_frames
    facts["prediction_size"] = None if size is None else list(size)
  encode = {"images": _encode_image, "segments": _encode_segments, "clips": _encode_clip}[kind]
  official = getattr(dataset, "instances_json", None)
  return records.write_split(
    root,
    dataset.split,
    len(dataset),
    lambda index: encode(dataset, index),
    facts,
    companions={} if official is None else {_INSTANCES: Path(official)},
    **how,
  )


def open_packed(root: str | Path, name: str, split: str, options: Mapping[str, Any]) -> Any:
  """Opens a split of a packed data set, which is then like the data set that was packed.

  Args:
    root: of the packed data set.
    name: of the data set that is expected there.
    split: of it.
    options: with which it would be opened unpacked, all of them.

  Raises:
    UserError: if another data set, split or option was packed.
  """
  manifest = records.read_manifest(root)
  if manifest["data"] != name:
    raise UserError(
      f"{root} holds {manifest['data']}, packed; expected {name}. Set --config.data.root or"
      " --config.data.name."
    )
  wanted = json.loads(json.dumps(datasets.all_options(name, options)))
  found = json.loads(json.dumps(datasets.all_options(name, manifest["options"])))
  for key, value in wanted.items():
    if found.get(key, value) != value:
      raise UserError(
        f"{root} was packed with data.options.{key}={found[key]}; {value} needs to be packed anew."
      )
  kinds = {"images": PackedImages, "segments": PackedSegments, "clips": PackedClips}
  return kinds[manifest["kind"]](root, manifest, split)


class PackedImages:
  """Images with class maps, or with one class each."""

  def __init__(self, root: str | Path, manifest: Mapping[str, Any], split: str):
    """Opens the records."""
    self._root, self._records = root, records.Records(root, split)
    self.name, self.split = manifest["name"], split
    self.classes = tuple(manifest["classes"])
    self.unused = tuple(manifest.get("unused", ()))
    if manifest["palette"] is not None:
      self.palette = np.array(manifest["palette"], np.uint8).reshape(-1, 3)
      self.ignore_label = base.IGNORE_LABEL

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> base.Example:
    """The example as it was packed."""
    record = self._records[index]
    image = codecs.decode_image(record["image"], f"{self._root}: {record['name']}")
    return {**record, "image": image}

  def image_size(self, index: int) -> tuple[int, int]:
    """Rows and columns, from the index."""
    rows, cols = self._records.index["size"][index]
    return int(rows), int(cols)


class PackedSegments(panoptic.UniversalDataset):
  """Images and everything that is annotated in them."""

  def __init__(self, root: str | Path, manifest: Mapping[str, Any], split: str):
    """Opens the records."""
    self._root, self._records = root, records.Records(root, split)
    self.name, self.split = manifest["name"], split
    self.table = panoptic.ClassTable(
      tuple(manifest["classes"]),
      np.array(manifest["things"], bool),
      np.array(manifest["class_ids"], np.int64),
      np.array(manifest["palette"], np.uint8).reshape(-1, 3),
    )
    official = Path(root) / split / _INSTANCES
    self.instances_json = official if official.is_file() else None

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> base.Example:
    """See `panoptic.UniversalDataset`; the record is read once."""
    record = self._records[index]
    return panoptic.make_example(self._image(record), _truth(record))

  def image(self, index: int) -> np.ndarray:
    """See `panoptic.UniversalDataset`."""
    return self._image(self._records[index])

  def image_size(self, index: int) -> tuple[int, int]:
    """From the index."""
    rows, cols = self._records.index["size"][index]
    return int(rows), int(cols)

  def ground_truth(self, index: int) -> panoptic.GroundTruth:
    """See `panoptic.UniversalDataset`."""
    return _truth(self._records[index])

  def _image(self, record: records.Record) -> np.ndarray:
    return codecs.decode_image(record["image"], f"{self._root}: {record['truth']['name']}")


class PackedClips:
  """Clips: frames, masks, and log-mel patches."""

  def __init__(self, root: str | Path, manifest: Mapping[str, Any], split: str):
    """Opens the records."""
    self._root, self._records = root, records.Records(root, split)
    self.name, self.split = manifest["name"], split
    self.classes = tuple(manifest["classes"])
    self.palette = np.array(manifest["palette"], np.uint8).reshape(-1, 3)
    self.num_frames = manifest["num_frames"]
    size = manifest["prediction_size"]
    self.prediction_size = None if size is None else tuple(size)

  @property
  def num_classes(self) -> int:
    """Number of classes, the background included where there is more than one."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> base.Example:
    """The example as it was packed."""
    record = self._records[index]
    pictures = [
      codecs.decode_image(content, f"{self._root}: {record['name']}")
      for content in record.pop("pictures")
    ]
    pictures.append(np.zeros_like(pictures[0]))
    frames = np.stack([pictures[place] for place in record.pop("places")])
    return {**record, "frames": frames}

  def group(self, index: int) -> str:
    """The group by which results of a clip are also listed, or ""."""
    return str(self._records.index["group"][index])

  def prediction_path(self, index: int, frame: int) -> Path:
    """Where the official format has the prediction of a frame, below its folder."""
    return Path(str(self._records.index["paths"][index][frame]))


def _truth(record: records.Record) -> panoptic.GroundTruth:
  fields = record["truth"]
  if isinstance(fields["segments"], dict):
    stored = fields["segments"]
    fields = {**fields, "segments": MaskRuns.of(stored["runs"], tuple(stored["of"]))}
  return panoptic.GroundTruth(**fields)


def _kind(dataset: Any) -> str:
  if isinstance(dataset, panoptic.UniversalDataset):
    return "segments"
  return "clips" if hasattr(dataset, "num_frames") else "images"


def _encode_image(dataset: Any, index: int) -> tuple[records.Record, dict[str, Any]]:
  with codecs.recording() as files:
    example = dataset[index]
  size = example["image"].shape[:2]
  return {**example, "image": _file_of(example["image"], files)}, {"size": size}


def _encode_segments(
  dataset: panoptic.UniversalDataset, index: int
) -> tuple[records.Record, dict[str, Any]]:
  with codecs.recording() as files:
    image = dataset.image(index)
  truth = dataset.ground_truth(index)
  if image.shape[:2] != truth.size:
    dataset[index]  # reports its defect
  fields = {field.name: getattr(truth, field.name) for field in dataclasses.fields(truth)}
  if isinstance(truth.segments, MaskRuns):
    fields["segments"] = {"runs": list(truth.segments.counts), "of": list(truth.segments.size)}
  return {"image": _file_of(image, files), "truth": fields}, {"size": image.shape[:2]}


def _encode_clip(dataset: Any, index: int) -> tuple[records.Record, dict[str, Any]]:
  with codecs.recording() as files:
    example = dataset[index]
  frames = example.pop("frames")
  pictures: list[bytes] = []
  places: list[int] = []
  for frame, valid in zip(frames, example["valid_frames"], strict=True):
    if not valid:  # zeros that continue a short clip, see `PackedClips`
      places.append(-1)
      continue
    content = _file_of(frame, files)
    if not pictures or content != pictures[-1]:
      pictures.append(content)
    places.append(len(pictures) - 1)
  paths = [str(dataset.prediction_path(index, frame)) for frame in range(len(frames))]
  row = {"group": dataset.group(index), "paths": paths}
  return {**example, "pictures": pictures, "places": places}, row


def _file_of(picture: np.ndarray, files: Sequence[tuple[bytes, np.ndarray]]) -> bytes:
  """The file that a picture was read from; a PNG of it, if it was drawn."""
  for content, image in files:
    if image is picture or np.array_equal(image, picture):
      return content
  return records.encode_png(picture)
