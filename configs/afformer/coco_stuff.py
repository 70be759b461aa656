"""AFFormer on COCO-Stuff (Dong et al., AAAI 2023), 171 classes.

Published: base on COCO-Stuff-10k, retrained by others (SSA-Seg, arXiv 2405.06525): 33.22 mIoU.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 16, 80,000 steps, crops of 512x512, float32. The official
repository has no configuration for this data set; learning rate and schedule are ADE20K's.

  python train.py --config=configs/afformer/coco_stuff.py:base --workdir=runs/coco_stuff \
    --config.data.root=data/coco_stuff10k

Variants ending in `_164k` train on COCO-Stuff-164k.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults


def get_config(variant: str = "base") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models; then with `_164k`, the
      large data set.
  """
  large = variant.endswith("_164k")
  config = defaults.run()
  config.model = ConfigDict(
    {"name": f"afformer_{variant.removesuffix('_164k')}", "dtype": "float32", "remat": False}
  )
  config.task = ConfigDict({"name": "semantic", "normalize_by": "all"})

  config.data = ConfigDict(defaults.loading())
  config.data.name = "coco_stuff_164k" if large else "coco_stuff_10k"
  config.data.root = "data/coco_stuff164k" if large else "data/coco_stuff10k"
  config.data.train_split = "train2017" if large else "train2014"
  config.data.options = ConfigDict({"labels": "auto"} if large else {})  # or "ids", "train_ids"
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
    {"batch_size": 16, "num_steps": 80_000, "accumulate": 1, "average_decay": 0.0}
  )
  config.optimizer = defaults.adamw(learning_rate=3e-4, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=1500)

  config.eval = ConfigDict(defaults.whole_image(scale=(2048, 512), multiple=1))
  config.eval.split = "val2017" if large else "test2014"
  config.eval.batch_size = 8
  config.eval.every = 5000
  return config
