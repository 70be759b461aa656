"""EfficientNet-Lite under the names of its PyTorch port, efficientnet_lite_pytorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from effseg_jax.models.backbones.efficientnet_lite import STAGES, EfficientNetLite, stage_size
from effseg_jax.weights import table
from effseg_jax.weights.table import Row

# How names begin in a file that holds a classifier.
BEGINNINGS = ("_conv_stem.", "_bn0.", "_blocks.")


def rows(
  backbone: EfficientNetLite, name: str = "backbone", path: str = "backbone"
) -> Iterator[Row]:
  """The official tensors, without the classifier's.

  Args:
    backbone: gives the depth.
    name: prefix of the official names.
    path: of the backbone among our variables, without the collection.
  """
  yield from table.conv(f"{name}._conv_stem", f"params/{path}/stem")
  yield from table.batch_norm(f"{name}._bn0", f"{path}/stem_norm")
  numbers = itertools.count()
  for stage in range(len(STAGES)):
    _, blocks = stage_size(stage, backbone.width, backbone.depth)
    for index in range(blocks):
      theirs, ours = f"{name}._blocks.{next(numbers)}", f"{path}/stage_{stage}_block_{index}"
      if STAGES[stage].expansion > 1:
        yield from table.conv(f"{theirs}._expand_conv", f"params/{ours}/expand")
        yield from table.batch_norm(f"{theirs}._bn0", f"{ours}/expand_norm")
      yield from table.conv(f"{theirs}._depthwise_conv", f"params/{ours}/depthwise")
      yield from table.batch_norm(f"{theirs}._bn1", f"{ours}/depthwise_norm")
      yield from table.conv(f"{theirs}._project_conv", f"params/{ours}/project")
      yield from table.batch_norm(f"{theirs}._bn2", f"{ours}/project_norm")
