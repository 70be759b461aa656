"""Experiments that differ in a recipe and a model alone, as rows of a table.

A folder of `configs/` holds files with `get_config`, or its `__init__` holds `EXPERIMENTS`, such a
table, or both. Each is selected by name: `proscale/coco_panoptic:swin_tiny,333`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Row:
  """An experiment.

  Attributes:
    recipe: model -> complete configuration.
    model: variant -> fields of the model.
    variant: that is used unless another is named.
    variants: which there are, in words.
    about: paper, published and measured results, hardware, time and the exact command.
  """

  recipe: Callable[[ConfigDict], ConfigDict]
  model: Callable[[str], ConfigDict]
  variant: str
  variants: str
  about: str

  def get_config(self, variant: str = "") -> ConfigDict:
    """Returns the experiment."""
    return self.recipe(self.model(variant or self.variant))


# Common to all experiments of full size by Mask2Former's recipe.
FULL_SIZE = """
Hardware of the recipe: 8 V100, global batch 16, float16 but for the pixel decoder. On TPUs and GPUs
add --config.model.dtype=bfloat16; sampling, softmax and losses stay float32.
Start from a backbone pretrained on ImageNet (Swin-T or ResNet-50 in their official files):
  --config.init_from=FILE
"""
