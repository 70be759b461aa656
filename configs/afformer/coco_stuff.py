r"""AFFormer on COCO-Stuff (Dong et al., AAAI 2023), 171 classes.

Published: base on COCO-Stuff-10k, retrained by others (SSA-Seg, arXiv 2405.06525): 33.22 mIoU.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 16, 80,000 steps, crops of 512x512, float32. The official
repository has no configuration for this data set; learning rate and schedule are ADE20K's.

  effseg train --config=afformer/coco_stuff:base --workdir=runs/coco_stuff \
    --config.data.root=data/coco_stuff10k

Variants ending in `_164k` train on COCO-Stuff-164k.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, semantic


def get_config(variant: str = "base") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models; then with `_164k`, the
      large data set.
  """
  large = variant.endswith("_164k")
  config = semantic.coco_stuff(semantic.afformer(variant.removesuffix("_164k")), large=large)
  config.optimizer = defaults.adamw(learning_rate=3e-4, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=1500)
  return config
