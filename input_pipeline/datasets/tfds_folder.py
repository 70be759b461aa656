"""Semantic segmentation prepared by TensorFlow Datasets, read without TensorFlow.

The data set must have been prepared as ArrayRecord: `tfds build oxford_iiit_pet
--file_format=array_record`, on any machine. The resulting folder is read.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import ade20k, base, files

TREE = """  dataset_info.json    features.json
  <name>-<split>.array_record-00000-of-*
(what `tfds build NAME --file_format=array_record` leaves in ~/tensorflow_datasets/NAME/VERSION)"""

# Name -> feature of the class map, class names, and the stored value of the first class.
_KNOWN = {
  "oxford_iiit_pet": ("segmentation_mask", ("pet", "background", "border"), 1),
  "scene_parse150": ("annotation", ade20k.CLASSES, 1),
}


class TfdsFolder:
  """A split of images and class maps.

  Attributes:
    name: that TensorFlow Datasets has for it.
    split: of it.
    classes: name per class id.
    palette: uint8 (K, 3).
  """

  ignore_label = base.IGNORE_LABEL

  def __init__(
    self, folder: Path, split: str, features: tuple[str, str], classes: tuple[str, ...], first: int
  ):
    """Opens the records.

    Args:
      folder: of one version of the data set.
      split: of it.
      features: names of the image and of the class map.
      classes: names.
      first: stored value of class 0; lower values have no class.
    """
    self.name, self.split, self.classes = _builder(folder).name, split, classes
    self.palette = files.distinct_palette(len(classes))
    self._folder, self._features, self._first = folder, features, first

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> base.Example:
    """Decodes one example: `image`, `label`, `valid_size` and `name`.

    Raises:
      UserError: for a broken example, or a value that is no class.
    """
    record, where = self._source[index], self._where(index)
    image = codecs.decode_image(record[self._features[0]], where)
    label = codecs.decode_label(io.BytesIO(record[self._features[1]]), where)
    if label.shape != image.shape[:2]:
      raise UserError(f"{where}: the image is {image.shape[:2]} and its class map {label.shape}.")
    stored = label.astype(np.int32)
    void = (stored < self._first) | (stored == base.IGNORE_LABEL)
    label = np.where(void, base.IGNORE_LABEL, stored - self._first)
    base.check_labels(label, self.num_classes, Path(where))
    return {
      "image": image,
      "label": label.astype(np.uint8),
      "valid_size": np.array(label.shape, np.int32),
      "name": f"{self.split}_{index:06d}",
    }

  def image_size(self, index: int) -> tuple[int, int]:
    """Rows and columns of an image, from its header."""
    image = self._source[index][self._features[0]]
    return codecs.decode_size(io.BytesIO(image), self._where(index))

  def __getstate__(self) -> dict[str, Any]:  # workers open the records themselves
    return {key: value for key, value in self.__dict__.items() if key != "_source"}

  @functools.cached_property
  def _source(self) -> Any:
    """Encoded examples."""
    with extra("train"):
      from tensorflow_datasets import decode

    encoded = {name: decode.SkipDecoding() for name in self._features}
    return _builder(self._folder).as_data_source(self.split, decoders=encoded)

  def _where(self, index: int) -> str:
    return f"{self._folder}, {self.split} {index}"


def open_split(
  root: str | Path | None, split: str, *, label: str = "", classes: str = "", first: int = 1
) -> TfdsFolder:
  """Opens a split of a prepared data set.

  Args:
    root: folder of one version, with `features.json`.
    split: of the data set.
    label: feature that holds the class map; known for `oxford_iiit_pet` and `scene_parse150`.
    classes: names with commas between them; known for these, too.
    first: stored value of the first class (for data sets that are not known).

  Raises:
    UserError: for a missing folder, split or feature.
  """
  folder = base.require_tree(root, "tfds", "features.json", TREE)
  info = _builder(folder).info
  base.require_split(split, tuple(info.splits), f"tfds {info.name}")
  if info.name in _KNOWN and not (label or classes):
    label, names, first = _KNOWN[info.name]
  else:
    names = files.split_names(classes) if classes else ()
  if label not in info.features or not names:
    raise UserError(
      f"tfds: {info.name} has the features {', '.join(info.features)}; set data.options.label to"
      " the one with the class map, and data.options.classes to the names, with commas."
    )
  return TfdsFolder(folder, split, ("image", label), names, first)


@functools.lru_cache(8)
def _builder(folder: Path) -> Any:
  """Reads the folder's own description; no code of the data set is needed."""
  with extra("train"):
    import tensorflow_datasets

  return tensorflow_datasets.builder_from_directory(str(folder))
