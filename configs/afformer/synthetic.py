"""AFFormer on the embedded synthetic scenes: no data to fetch, a result in three minutes.

Measured here (2 CPU cores): see docs/results.md.

  python train.py --config=configs/afformer/synthetic.py --workdir=runs/synthetic
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults


def get_config(variant: str = "tiny") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models.
  """
  config = defaults.run()
  config.model = ConfigDict({"name": f"afformer_{variant}", "dtype": "float32", "remat": False})
  config.task = ConfigDict({"name": "semantic", "normalize_by": "valid"})

  config.data = ConfigDict(defaults.loading())
  config.data.name = "synthetic"
  config.data.root = ""  # nothing to read
  config.data.train_split = "train"
  config.data.options = ConfigDict({"size": (128, 128), "seed": 0, "num_train": 2048})
  config.data.augment = ConfigDict(
    {
      "scale": (128, 128),
      "ratio": (0.75, 1.5),
      "crop": (128, 128),
      "max_class_share": 1.0,
      "flip": 0.5,
      "photometric": False,
    }
  )

  config.train = ConfigDict(
    {"batch_size": 8, "num_steps": 320, "accumulate": 1, "average_decay": 0.95}
  )
  config.optimizer = defaults.adamw(learning_rate=2e-3, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=30)

  config.eval = ConfigDict(defaults.whole_image(scale=(0, 0), multiple=1))
  config.eval.split = "val"
  config.eval.batch_size = 16
  config.eval.every = 160
  config.checkpoint.every = 160
  config.log.every = 20
  return config
