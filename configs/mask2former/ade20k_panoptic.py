"""Mask2Former on ADE20K panoptic, 100 + 50 classes (Cheng et al., CVPR 2022): the official recipe.

Published: R50 39.7 PQ, 26.5 AP, 46.1 mIoU. Measured here: not trained.
Hardware of the recipe: 8 V100, global batch 16, float16 but for the pixel decoder. On TPUs and GPUs
add --config.model.dtype=bfloat16; sampling, softmax and losses stay float32.
Start from a backbone pretrained on ImageNet (Swin-T or ResNet-50 in their official files):
  --config.init_from=FILE

  python train.py --config=configs/mask2former/ade20k_panoptic.py:r50 --workdir=runs/ade20k \
    --config.data.root=data/ADEChallengeData2016 --config.init_from=R-50.pkl
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import universal


def get_config(variant: str = "r50") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50` or `swin_tiny`.
  """
  return universal.ade20k_panoptic(universal.mask2former(variant))
