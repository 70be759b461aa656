r"""SegFormer on COCO-Stuff-164k (Xie et al., NeurIPS 2021), 171 classes.

Published, from memory of the paper's table and not checked again: 35.6 / 40.2 / 44.6 / 45.5 / 46.5
/ 46.7 mIoU for b0 to b5.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 16, 80,000 steps, crops of 512x512, float32; hours are not
published. Encoder pretrained on ImageNet: --config.init_from=mit_b0.pth, or a file of the hub;
their terms are NVIDIA's, non-commercial.

  effseg train --config=segformer/coco_stuff:b0 --workdir=runs/coco_stuff \
    --config.data.root=data/coco_stuff164k
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import segformer, semantic


def get_config(variant: str = "b0") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `b0` to `b5`.
  """
  return segformer.optimize(semantic.coco_stuff(segformer.model(variant), large=True))
