r"""SegFormer on Cityscapes (Xie et al., NeurIPS 2021): the official recipe.

Published, single scale: 76.2 / 78.5 / 81.0 / 81.7 / 82.3 / 82.4 mIoU for b0 to b5, windows of
1024x1024 every 768 pixels; MMSegmentation's runs: 76.5 / 78.6 / 81.1 / 81.9 / 81.9 / 82.3.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 8, 160,000 steps, crops of 1024x1024, float32; hours are not
published. Encoder pretrained on ImageNet: --config.init_from=mit_b0.pth, or a file of the hub;
their terms are NVIDIA's, non-commercial.

  effseg train --config=segformer/cityscapes:b0 --workdir=runs/cityscapes \
    --config.data.root=data/cityscapes
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import segformer, semantic


def get_config(variant: str = "b0") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `b0` to `b5`.
  """
  config = segformer.optimize(semantic.cityscapes(segformer.model(variant)))
  config.eval.mode = "slide"
  return config
