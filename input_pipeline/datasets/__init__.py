"""The data sets, by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from effseg_jax.errors import UserError, suggestion

# Name -> module with `open_split(root, split, **options)`.
DATASETS = {
  "camvid": "input_pipeline.datasets.camvid",
}


def open_dataset(name: str, *, root: str | Path | None = None, split: str, **options: Any) -> Any:
  """Opens a split of a data set; cheap: no picture is read.

  Args:
    name: one of `DATASETS`.
    root: folder of the data set.
    split: of it.
    **options: of the data set's `open_split`.

  Returns:
    An object with `name`, `split`, `classes`, `num_classes`, `len()`, `[i]` (an example) and
    `image_size(i)`; for segmentation also `palette` and `ignore_label`.

  Raises:
    UserError: for an unknown name or split, or a missing folder (with the expected tree).
  """
  if name not in DATASETS:
    raise UserError(
      f"data.name is {name!r}; expected one of {', '.join(DATASETS)}.{suggestion(name, DATASETS)}"
    )
  return importlib.import_module(DATASETS[name]).open_split(root, split, **options)
