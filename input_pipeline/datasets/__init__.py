"""The data sets, by name."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

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
  if name not in DATASETS:
    raise UserError(
      f"data.name is {name!r}; expected one of {', '.join(DATASETS)}.{suggestion(name, DATASETS)}"
    )
  module, _, function = DATASETS[name].partition(":")
  opener = getattr(importlib.import_module(module), function or "open_split")
  known = list(inspect.signature(opener).parameters)[2:]
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
