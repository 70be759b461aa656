r"""AFFormer with SSA-Seg's classifier on COCO-Stuff-10k (Ma et al., NeurIPS 2024).

Published: base 36.40 mIoU, where their AFFormer-base has 33.22. Ours is written from the paper's
equations, without the authors' code.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 16, 80,000 steps, crops of 512x512, float32.

  effseg train --config=ssa_seg/coco_stuff:base --workdir=runs/ssa \
    --config.data.root=data/coco_stuff10k --config.init_from=AFFormer_base_ImageNet1k.pth
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import ssa_seg
from effseg_jax.configs.afformer import coco_stuff


def get_config(variant: str = "base") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: of AFFormer, `tiny`, `small` or `base`.
  """
  return ssa_seg.with_classifier(coco_stuff.get_config(variant))
