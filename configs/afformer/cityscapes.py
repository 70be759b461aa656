r"""AFFormer on Cityscapes (Dong et al., AAAI 2023): the official recipe.

Published: base 78.7 mIoU (3.0 M parameters, 34.4 GFLOPs at 1024x2048).
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 8, 160,000 steps, crops of 1024x1024, float32. Backbone
pretrained on ImageNet: --config.init_from=AFFormer_base_ImageNet1k.pth

  effseg train --config=afformer/cityscapes:base --workdir=runs/cityscapes \
    --config.data.root=data/cityscapes
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, semantic


def get_config(variant: str = "base") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models.
  """
  config = semantic.cityscapes(semantic.afformer(variant))
  config.optimizer = defaults.adamw(learning_rate=4e-4, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=1500)
  return config
