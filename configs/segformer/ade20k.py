r"""SegFormer on ADE20K (Xie et al., NeurIPS 2021): the official recipe.

Published, single scale: 37.4 / 42.2 / 46.5 / 49.4 / 50.3 / 51.0 mIoU for b0 to b5 (the last with
crops of 640); MMSegmentation's runs of the recipe: 38.1 / 41.6 / 46.5 / 48.5 / 49.3 / 50.6.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 16, 160,000 steps, float32; hours are not published. Encoder
pretrained on ImageNet: --config.init_from=mit_b0.pth, or a file of the hub; their terms are
NVIDIA's, non-commercial.

  effseg train --config=segformer/ade20k:b2 --workdir=runs/ade20k \
    --config.data.root=ADEChallengeData2016
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import segformer, semantic


def get_config(variant: str = "b0") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `b0` to `b5`.
  """
  crop = 640 if variant == "b5" else 512
  return segformer.optimize(semantic.ade20k(segformer.model(variant), crop))
