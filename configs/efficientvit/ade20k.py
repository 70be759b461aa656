r"""EfficientViT on ADE20K (Cai et al., ICCV 2023). The authors' recipe is unpublished: ours.

Published: 42.84 / 45.94 / 49.01 mIoU for b1 to b3 (3.1 / 9.1 / 22 GMACs); b0 has no number.
Measured here: not trained (the data set is not at hand).
Hardware: global batch 16, 160,000 steps, float32. Backbone pretrained on ImageNet:
  --config.init_from=b1-r288.pt (the authors'), or timm's efficientvit_b1

  effseg train --config=efficientvit/ade20k:b1 --workdir=runs/ade20k \
    --config.data.root=ADEChallengeData2016
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import efficientvit, semantic


def get_config(variant: str = "b1") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `b0` to `b3`.
  """
  model = semantic.network(f"efficientvit_{variant}", head_expand=0)  # the head for ADE20K
  return efficientvit.optimize(semantic.ade20k(model), learning_rate=3e-4)
