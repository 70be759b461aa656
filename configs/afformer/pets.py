"""AFFormer on Oxford-IIIT Pet from TensorFlow Datasets: pet, background and border.

A small real data set that TensorFlow Datasets fetches and prepares (800 MB), once:
  tfds build oxford_iiit_pet --file_format=array_record --data_dir=data/tfds

Measured here: not trained (the data set is not at hand). Any other data set of semantic
segmentation that was prepared this way: set `data.options.label` and `classes` (docs/datasets.md).

  python train.py --config=configs/afformer/pets.py:tiny --workdir=runs/pets \
    --config.data.root=data/tfds/oxford_iiit_pet/3.2.0
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
  config.data.name = "tfds"
  config.data.root = "data/tfds/oxford_iiit_pet/3.2.0"
  config.data.train_split = "train"
  config.data.options = ConfigDict({"label": "", "classes": "", "first": 1})
  config.data.augment = ConfigDict(
    {
      "scale": (512, 256),
      "ratio": (0.75, 1.5),
      "crop": (256, 256),
      "max_class_share": 1.0,
      "flip": 0.5,
      "photometric": True,
    }
  )

  config.train = ConfigDict(
    {"batch_size": 16, "num_steps": 10_000, "accumulate": 1, "average_decay": 0.999}
  )
  config.optimizer = defaults.adamw(learning_rate=1e-3, weight_decay=0.02)
  config.schedule = defaults.poly(warmup_steps=500)

  config.eval = ConfigDict(defaults.whole_image(scale=(512, 256), multiple=32))
  config.eval.split = "test"
  config.eval.batch_size = 16
  config.eval.every = 1000
  return config
