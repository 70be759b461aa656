"""Makes a data set of what annotation tools export: polygons and masks of objects.

  effseg import --from=yolo --input=export --output=my_objects

`--from` is yolo (segmentation), labelme, voc, cvat (for images 1.1), roboflow (COCO) or labelstudio
(COCO). The pictures are copied; the annotations become COCO's instances, which the configuration
`proscale/folder_instances` trains on. It ends with the number of pictures and objects, and with a
sheet of examples in the output folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import annotations_import
from effseg_jax.input_pipeline.datasets import open_dataset

_SHEET = 8


def draw_sheet(output: Path, split: str) -> np.ndarray:
  """Some pictures of a split beside their objects, uint8 (H, W, 3)."""
  from effseg_jax.cli.browse import sheet_of_segments

  dataset = open_dataset("coco_instances", root=output, split=split)
  rows = np.unique(np.linspace(0, len(dataset) - 1, min(_SHEET, len(dataset))).astype(int))
  return sheet_of_segments([dataset[int(row)] for row in rows], dataset)


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  known = ", ".join(annotations_import.READERS)
  flags.DEFINE_string("from", None, f"The tool or its format: {known}.", flag_values=values)
  flags.DEFINE_string("input", None, "The tool's export, unpacked.", flag_values=values)
  flags.DEFINE_string("output", None, "Folder of the data set.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and imports."""
  no_arguments(arguments)
  form = values["from"].value
  if not (form and values.input and values.output):
    raise UserError("--from, --input and --output are needed; see effseg import --help.")
  output = Path(values.output)
  counts = annotations_import.import_annotations(form, Path(values.input), output)
  for split, found in counts.items():
    pictures, empty = found.pop("pictures"), found.pop("without a pixel", 0)
    classes = ", ".join(f"{count:,} {name}" for name, count in found.most_common())
    print(f"{split}: {pictures:,} pictures, {sum(found.values()):,} objects ({classes})")
    if empty:
      print(f"  left out: {empty:,} objects without a pixel in their picture")
  path = output / "sheet.png"
  Image.fromarray(draw_sheet(output, next(iter(counts)))).save(path)
  print(f"{path}: some of them, to look at")
  return 0
