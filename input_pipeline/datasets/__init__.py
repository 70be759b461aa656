"""The data sets, by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline import records

# Name -> module with `open_split(root, split, **options)`, or "module:function" of that signature.
DATASETS = {
  "synthetic": "effseg_jax.input_pipeline.datasets.synthetic",
  "folder": "effseg_jax.input_pipeline.datasets.folder",
  "camvid": "effseg_jax.input_pipeline.datasets.camvid",
  "ade20k": "effseg_jax.input_pipeline.datasets.ade20k",
  "cityscapes": "effseg_jax.input_pipeline.datasets.cityscapes",
  "coco_stuff_10k": "effseg_jax.input_pipeline.datasets.coco_stuff:open_10k",
  "coco_stuff_164k": "effseg_jax.input_pipeline.datasets.coco_stuff:open_164k",
  "imagenet": "effseg_jax.input_pipeline.datasets.imagenet",
  "tfds": "effseg_jax.input_pipeline.datasets.tfds_folder",
  "coco_panoptic": "effseg_jax.input_pipeline.datasets.coco_panoptic",
  "coco_instances": "effseg_jax.input_pipeline.datasets.coco_instances",
  "ade20k_panoptic": "effseg_jax.input_pipeline.datasets.ade20k_panoptic",
  "cityscapes_panoptic": "effseg_jax.input_pipeline.datasets.cityscapes_panoptic",
  "synthetic_instances": "effseg_jax.input_pipeline.datasets.synthetic_instances",
  "s4": "effseg_jax.input_pipeline.datasets.avsbench:open_s4",
  "ms3": "effseg_jax.input_pipeline.datasets.avsbench:open_ms3",
  "avss": "effseg_jax.input_pipeline.datasets.avsbench:open_avss",
  "synthetic_av": "effseg_jax.input_pipeline.datasets.synthetic_av",
}


def open_dataset(name: str, *, root: str | Path | None = None, split: str, **options: Any) -> Any:
  """Opens a split of a data set; cheap: no picture is read.

  Args:
    name: one of `DATASETS`.
    root: folder of the data set, as it comes or packed by effseg prepare.
    split: of it.
    **options: of the data set's `open_split`.

  Returns:
    An object with `name`, `split`, `classes`, `num_classes`, `len()`, `[i]` (an example) and
    `image_size(i)`; for segmentation also `palette` and `ignore_label`.

  Raises:
    UserError: for an unknown name, split or option, or a missing folder (with the expected tree).
  """
  opener = find_opener(name)
  known = list(all_options(name, {}))
  for option in options:
    if option not in known:
      raise UserError(
        f"data.options.{option} means nothing to {name}; its options: {', '.join(known) or 'none'}."
        f"{suggestion(option, known)}"
      )
  if records.is_packed(root):
    from effseg_jax.input_pipeline.packed import open_packed

    return open_packed(root, name, split, options)
  return opener(root, split, **options)


def find_opener(name: str) -> Callable[..., Any]:
  """The function that opens a split of a data set.

  Raises:
    UserError: for an unknown name.
  """
  if name not in DATASETS and ":" not in name:
    raise UserError(
      f"data.name is {name!r}; expected one of {', '.join(DATASETS)}, or module:function of your"
      f" own.{suggestion(name, DATASETS)}"
    )
  module, _, function = DATASETS.get(name, name).partition(":")
  try:
    return getattr(importlib.import_module(module), function or "open_split")
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(
      f"data.name is {name!r}, but {error}; expected module:function that can be imported (is its"
      " folder on PYTHONPATH?)."
    ) from None


def fixed_classes(name: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray] | None:
  """The classes of a data set that always has the same ones.

  Returns:
    Names (K), their palette uint8 (K, 3), and bool (K,), which of them are things; None if the
    classes are in the data set's files, there are no colours, or the name is unknown.
  """
  if name not in DATASETS:
    return None
  opener = find_opener(name)
  module = importlib.import_module(opener.__module__)
  classes, palette = getattr(module, "CLASSES", None), getattr(module, "PALETTE", None)
  if hasattr(module, "FIXED_CLASSES"):  # a module of several data sets
    classes, palette = module.FIXED_CLASSES.get(name, (None, None))
  if classes is None or palette is None:
    return None
  table = getattr(module, "CLASS_TABLE", None)
  things = np.zeros(len(classes), bool) if table is None else np.asarray(table.things, bool)
  return tuple(classes), np.asarray(palette, np.uint8), things


def all_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
  """The options of a data set, those that were left out at their defaults."""
  parameters = list(inspect.signature(find_opener(name)).parameters.values())[2:]
  return {**{parameter.name: parameter.default for parameter in parameters}, **options}
