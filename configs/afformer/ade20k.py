"""AFFormer on ADE20K (Dong et al., AAAI 2023): the official recipe.

Published: base 41.8 mIoU (3.0 M parameters, 4.6 GFLOPs at 512x512); retrained by others 39.94.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 16, 160,000 steps, float32. Backbone pretrained on ImageNet:
  --config.init_from=AFFormer_base_ImageNet1k.pth

  python train.py --config=configs/afformer/ade20k.py:base --workdir=runs/ade20k \
    --config.data.root=ADEChallengeData2016
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
  config.data.name = "ade20k"
  config.data.root = "data/ADEChallengeData2016"
  config.data.train_split = "training"
  config.data.options = ConfigDict()
  config.data.augment = ConfigDict(
    {
      "scale": (2048, 512),
      "ratio": (0.5, 2.0),
      "crop": (512, 512),
      "max_class_share": 0.75,
      "flip": 0.5,
      "photometric": True,
    }
  )

  config.train = ConfigDict(
    {"batch_size": 16, "num_steps": 160_000, "accumulate": 1, "average_decay": 0.0}
  )
  config.optimizer = defaults.adamw(learning_rate=3e-4, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=1500)

  config.eval = ConfigDict(defaults.whole_image(scale=(2048, 512), multiple=32))
  config.eval.split = "validation"
  config.eval.batch_size = 8
  config.eval.every = 5000
  return config
