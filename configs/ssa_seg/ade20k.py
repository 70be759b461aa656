r"""AFFormer with SSA-Seg's classifier on ADE20K (Ma et al., NeurIPS 2024): AFFormer's recipe.

Published: base 41.92 mIoU (42.74 in the authors' README), where their AFFormer-base has 39.94;
3.3 M parameters, 0.1 GFLOPs more. Ours is written from the paper's equations, without their code.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 16, 160,000 steps, float32; training takes 1.1 times as long.

  effseg train --config=ssa_seg/ade20k:base --workdir=runs/ssa \
    --config.data.root=ADEChallengeData2016 --config.init_from=AFFormer_base_ImageNet1k.pth
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import ssa_seg
from effseg_jax.configs.afformer import ade20k


def get_config(variant: str = "base") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: of AFFormer, `tiny`, `small` or `base`.
  """
  return ssa_seg.with_classifier(ade20k.get_config(variant))
