"""ImageNet, or any other pictures sorted into one folder per class."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import base

TREE = """  train/<class>/*.JPEG|jpg|png    one folder per class, for ImageNet n01440764 and so on
  val/<class>/*.JPEG|jpg|png"""

_SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class ClassificationFiles:
  """Photographs with one class each.

  Attributes:
    name: of the data set.
    split: of it.
    folder: of the split.
    classes: folder name per class id, sorted.
    file_names: per example, below the folder of its class; text, because a million paths are big.
    labels: int32 (N,), class id per example.
  """

  name: str
  split: str
  folder: Path
  classes: tuple[str, ...]
  file_names: tuple[str, ...]
  labels: np.ndarray

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self.file_names)

  def __getitem__(self, index: int) -> base.Example:
    """Decodes one example: `image`, `label` (int32 scalar), `valid_size` and `name`.

    Raises:
      UserError: for a broken file.
    """
    path = self._path(index)
    image = codecs.read_image(path)
    return {
      "image": image,
      "label": np.int32(self.labels[index]),
      "valid_size": np.array(image.shape[:2], np.int32),
      "name": path.stem,
    }

  def image_size(self, index: int) -> tuple[int, int]:
    """Rows and columns of an image, from its header."""
    return codecs.image_size(self._path(index))

  def _path(self, index: int) -> Path:
    return self.folder / self.classes[self.labels[index]] / self.file_names[index]


def open_split(root: str | Path | None, split: str) -> ClassificationFiles:
  """Opens `train` or `val`.

  The classes are the folders of `train` where it exists, so that both splits agree.

  Raises:
    UserError: for a missing folder, an empty split, pictures without a class folder, or a class
      that `train` does not have.
  """
  base.require_split(split, _SPLITS, "imagenet")
  root_folder = base.require_tree(root, "imagenet", split, TREE)
  folder = root_folder / split
  present = _class_folders(folder)
  reference = root_folder / "train"
  classes = _class_folders(reference) if split != "train" and reference.is_dir() else present
  unknown = sorted(set(present) - set(classes))
  if unknown:
    raise UserError(f"imagenet: {folder / unknown[0]} is a class that {reference} does not have.")
  file_names: list[str] = []
  labels: list[int] = []
  for index, name in enumerate(classes):
    found = _pictures(folder / name) if name in set(present) else []
    file_names += found
    labels += [index] * len(found)
  if not file_names and _pictures(folder):
    raise UserError(
      f"imagenet: {folder} holds pictures that are not in class folders. Expected:\n{TREE}"
    )
  base.require_some(tuple(file_names), "imagenet", split, folder)
  return ClassificationFiles(
    "imagenet", split, folder, tuple(classes), tuple(file_names), np.array(labels, np.int32)
  )


def _class_folders(folder: Path) -> list[str]:
  return sorted(
    entry.name
    for entry in os.scandir(folder)
    if entry.is_dir() and not codecs.is_hidden(Path(entry.name))
  )


def _pictures(folder: Path) -> list[str]:
  return sorted(
    entry.name
    for entry in os.scandir(folder)
    if codecs.is_picture(Path(entry.name)) and entry.is_file()
  )
