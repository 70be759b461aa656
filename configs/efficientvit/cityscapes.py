r"""EfficientViT on Cityscapes (Cai et al., ICCV 2023). The authors' recipe is unpublished: ours.

Published: 75.65 / 80.55 / 82.07 / 83.02 mIoU for b0 to b3 (4.4 / 25 / 74 / 179 GMACs at 1024x2048);
b0 without ImageNet 74.5.
Measured here: not trained (the data set is not at hand).
Hardware: global batch 8, 160,000 steps, crops of 1024x1024, float32. Backbone pretrained on
ImageNet: --config.init_from=b1-r288.pt (the authors'), or timm's efficientvit_b1

  effseg train --config=efficientvit/cityscapes:b1 --workdir=runs/cityscapes \
    --config.data.root=data/cityscapes
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import efficientvit, semantic


def get_config(variant: str = "b1") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `b0` to `b3`.
  """
  config = semantic.cityscapes(semantic.network(f"efficientvit_{variant}"))
  return efficientvit.optimize(config, learning_rate=4e-4)
