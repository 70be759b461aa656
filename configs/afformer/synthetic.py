"""AFFormer on the embedded synthetic scenes: no data to fetch, a result in three minutes.

Measured here (2 CPU cores): see docs/results.md.

  effseg train --config=afformer/synthetic --workdir=runs/synthetic
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, semantic


def get_config(variant: str = "tiny") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models.
  """
  config = semantic.recipe(
    semantic.afformer(variant),
    data="synthetic",
    root="",  # nothing to read
    splits=("train", "val"),
    scale=(128, 128),
    crop=(128, 128),
    normalize_by="valid",
    batch_size=8,
    num_steps=320,
    average_decay=0.95,
  )
  config.data.options = ConfigDict({"size": (128, 128), "seed": 0, "num_train": 2048})
  config.data.augment.update({"ratio": (0.75, 1.5), "max_class_share": 1.0, "photometric": False})
  config.optimizer = defaults.adamw(learning_rate=2e-3, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=30)
  semantic.evaluate_whole_images(config, scale=(0, 0), multiple=1, batch_size=16, every=160)
  config.checkpoint.every = 160
  config.log.every = 20
  return config
