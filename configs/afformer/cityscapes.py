"""AFFormer on Cityscapes (Dong et al., AAAI 2023): the official recipe.

Published: base 78.7 mIoU (3.0 M parameters, 34.4 GFLOPs at 1024x2048).
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 8, 160,000 steps, crops of 1024x1024, float32. Backbone
pretrained on ImageNet: --config.init_from=AFFormer_base_ImageNet1k.pth

  python train.py --config=configs/afformer/cityscapes.py:base --workdir=runs/cityscapes \
    --config.data.root=data/cityscapes
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults


def get_config(variant: str = "base") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models.
  """
  config = defaults.run()
  config.model = ConfigDict({"name": f"afformer_{variant}", "dtype": "float32", "remat": False})
  config.task = ConfigDict({"name": "semantic", "normalize_by": "all"})

  config.data = ConfigDict(defaults.loading())
  config.data.name = "cityscapes"
  config.data.root = "data/cityscapes"
  config.data.train_split = "train"
  config.data.options = ConfigDict({"labels": "auto"})  # or "ids", "train_ids"
  config.data.augment = ConfigDict(
    {
      "scale": (2048, 1024),
      "ratio": (0.5, 2.0),
      "crop": (1024, 1024),
      "max_class_share": 0.75,
      "flip": 0.5,
      "photometric": True,
    }
  )

  config.train = ConfigDict(
    {"batch_size": 8, "num_steps": 160_000, "accumulate": 1, "average_decay": 0.0}
  )
  config.optimizer = defaults.adamw(learning_rate=4e-4, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=1500)

  config.eval = ConfigDict(defaults.whole_image(scale=(2048, 1024), multiple=32))
  config.eval.crop = (1024, 1024)
  config.eval.stride = (768, 768)
  config.eval.split = "val"
  config.eval.batch_size = 8
  config.eval.every = 5000
  return config
