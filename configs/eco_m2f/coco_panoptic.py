"""ECO-M2F on COCO panoptic (Yao et al., 2024; arXiv 2404.15244): training the exits (step A).

Published, Swin-T: beta 0.0005 52.06 PQ at 202.4 GFLOPs, beta 0.02 50.79 PQ at 181.6. Step A's code
was not released; the recipe is Mask2Former's with an exit drawn in each step. Measured here: not
trained. Hardware of the recipe: 8 V100, global batch 16. Afterwards tools/train_gate.py measures
the exits and trains the gate (steps B and C).
Start from Mask2Former's own weights, or from a backbone pretrained on ImageNet:
  --config.init_from=FILE

  python train.py --config=configs/eco_m2f/coco_panoptic.py:swin_tiny --workdir=runs/eco \
    --config.data.root=data/coco --config.init_from=swin_tiny_patch4_window7_224.pth
  python tools/train_gate.py --config=configs/eco_m2f/coco_panoptic.py:swin_tiny --beta=0.0005 \
    --config.data.root=data/coco --checkpoint=runs/eco --output=eco.safetensors
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import universal


def get_config(variant: str = "swin_tiny") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50` or `swin_tiny`.
  """
  return universal.coco_panoptic(universal.eco_m2f(variant))
