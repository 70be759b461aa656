r"""AFFormer on ADE20K (Dong et al., AAAI 2023): the official recipe.

Published: base 41.8 mIoU (3.0 M parameters, 4.6 GFLOPs at 512x512); retrained by others 39.94.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 16, 160,000 steps, float32. Backbone pretrained on ImageNet:
  --config.init_from=AFFormer_base_ImageNet1k.pth

  effseg train --config=afformer/ade20k:base --workdir=runs/ade20k \
    --config.data.root=ADEChallengeData2016
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, semantic


def get_config(variant: str = "base") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models.
  """
  config = semantic.ade20k(semantic.afformer(variant))
  config.optimizer = defaults.adamw(learning_rate=3e-4, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=1500)
  return config
