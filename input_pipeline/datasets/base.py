"""The interface of data sets to the rest of the pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs

IGNORE_LABEL = 255

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SegmentationFiles:
  """Pairs of a photograph and an index picture.

  Attributes:
    name: of the data set.
    split: of it.
    classes: name per class id.
    palette: uint8 (K, 3), RGB per class id.
    pairs: (image, label) paths.
    label_rule: stored label values -> class ids and 255, on uint8 (or int) arrays.
    read_label: path -> stored values (H, W).
    turn_labels: whether labels are turned as the EXIF orientation turns their photographs.
    unused: classes whose stored value is not counted, so that no label has them.
  """

  name: str
  split: str
  classes: tuple[str, ...]
  palette: np.ndarray
  pairs: tuple[tuple[Path, Path], ...]
  label_rule: Callable[[np.ndarray], np.ndarray]
  read_label: Callable[[Path], np.ndarray] = codecs.read_label
  turn_labels: bool = False
  unused: tuple[int, ...] = ()

  ignore_label = IGNORE_LABEL

  @property
  def num_classes(self) -> int:
    """Number of classes; the ignored label is none of them."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self.pairs)

  def __getitem__(self, index: int) -> Example:
    """Decodes one example: `image`, `label`, `valid_size` and `name`.

    Raises:
      UserError: for a broken file, a label of another size, or a value that is no class.
    """
    image_path, label_path = self.pairs[index]
    image = codecs.read_image(image_path)
    label = self.label_rule(self.read_label(label_path))
    if self.turn_labels:
      label = codecs.turned(label, codecs.orientation(image_path))
    if label.shape != image.shape[:2]:
      raise UserError(
        f"{label_path} is {label.shape[0]}x{label.shape[1]} and its image {image_path} is"
        f" {image.shape[0]}x{image.shape[1]}; expected the same size."
        f"{self._turning_hint(label.shape, image_path)}"
      )
    check_labels(label, self.num_classes, label_path)
    return {
      "image": image,
      "label": label.astype(np.uint8),
      "valid_size": np.array(label.shape, np.int32),
      "name": image_path.stem,
    }

  def image_size(self, index: int) -> tuple[int, int]:
    """Rows and columns of an image, from its header."""
    return codecs.image_size(self.pairs[index][0])

  def _turning_hint(self, shape: tuple[int, ...], image_path: Path) -> str:
    turn = codecs.orientation(image_path)
    if turn not in codecs.TURNED or shape[::-1] != codecs.image_size(image_path):
      return ""
    cure = (
      "set --config.data.options.turn_labels=True" if self.name == "folder" else "turn the labels"
    )
    return (
      f" The label fits the picture before its EXIF orientation ({turn}) turns it upright; {cure}."
    )


def check_labels(label: np.ndarray, num_classes: int, path: Path) -> None:
  """Raises `UserError` where a label is neither a class nor the ignored value."""
  if label.dtype == np.uint8:
    seen = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()
  else:
    seen = np.bincount(label.ravel(), minlength=IGNORE_LABEL + 1)
  bad = [int(value) for value in np.flatnonzero(seen) if value >= num_classes]
  bad = [value for value in bad if value != IGNORE_LABEL]
  if bad:
    more = f" (and {len(bad) - 1} other values beyond the classes)" if len(bad) > 1 else ""
    raise UserError(
      f"{path} holds the label value {bad[0]}{more}; expected 0 to {num_classes - 1}, or"
      f" {IGNORE_LABEL} where nothing is labelled: there are {num_classes} classes."
    )


def require_tree(root: str | Path | None, name: str, probe: str, tree: str) -> Path:
  """Returns the root folder of a data set, or explains the expected layout.

  Args:
    root: as the user gave it.
    name: of the data set.
    probe: path below the root that must exist.
    tree: the expected folders and files, one a line.

  Raises:
    UserError: with the expected tree.
  """
  if root is None:
    raise UserError(f"{name} needs a folder: --config.data.root=DIR with\n{tree}")
  path = Path(root)
  if not (path / probe).exists():
    found = "does not exist" if not path.is_dir() else f"has no {probe}"
    raise UserError(f"{name}: {path} {found}. Expected (--config.data.root=DIR):\n{tree}")
  return path


def require_split(split: str, known: tuple[str, ...], name: str) -> None:
  """Raises `UserError` for a split the data set does not have."""
  if split not in known:
    raise UserError(f"{name} has no split {split!r}; expected one of {', '.join(known)}.")


def require_some(pairs: tuple[Any, ...], name: str, split: str, where: Path) -> None:
  """Raises `UserError` for an empty split."""
  if not pairs:
    raise UserError(f"{name}: the split {split!r} is empty; nothing was found in {where}.")
