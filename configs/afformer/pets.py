r"""AFFormer on Oxford-IIIT Pet from TensorFlow Datasets: pet, background and border.

A small real data set that TensorFlow Datasets fetches and prepares (800 MB), once:
  tfds build oxford_iiit_pet --file_format=array_record --data_dir=data/tfds

Measured here: not trained (the data set is not at hand). Any other data set of semantic
segmentation that was prepared this way: set `data.options.label` and `classes` (docs/datasets.md).

  effseg train --config=afformer/pets:tiny --workdir=runs/pets \
    --config.data.root=data/tfds/oxford_iiit_pet/3.2.0
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
    data="tfds",
    root="data/tfds/oxford_iiit_pet/3.2.0",
    splits=("train", "test"),
    scale=(512, 256),
    crop=(256, 256),
    normalize_by="valid",
    batch_size=16,
    num_steps=10_000,
    average_decay=0.999,
  )
  config.data.options = ConfigDict({"label": "", "classes": "", "first": 1})
  config.data.augment.update({"ratio": (0.75, 1.5), "max_class_share": 1.0})
  config.optimizer = defaults.adamw(learning_rate=1e-3, weight_decay=0.02)
  config.schedule = defaults.poly(warmup_steps=500)
  semantic.evaluate_whole_images(config, scale=(512, 256), multiple=32, batch_size=16, every=1000)
  return config
