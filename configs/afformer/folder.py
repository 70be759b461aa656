"""AFFormer on your own images: a folder of pictures, a folder of index PNGs, a list of classes.

See docs/datasets.md for the folder tree. Adjust `scale` to the size of your images and `num_steps`
to their number (about 100 passes over them are a beginning), and start from released weights:
  --config.init_from=AFFormer_base_ImageNet1k.pth

  python train.py --config=configs/afformer/folder.py:tiny --workdir=runs/mine \
    --config.data.root=my_images
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
  config.data.name = "folder"
  config.data.root = "data/folder"
  config.data.train_split = "train"
  config.data.options = ConfigDict({"ignore": 255})  # stored value of what has no class
  config.data.augment = ConfigDict(
    {
      "scale": (2048, 512),
      "ratio": (0.5, 2.0),
      "crop": (512, 512),
      "max_class_share": 0.75,
      "flip": 0.5,
      "photometric": True,
      "mix": "",  # or "classmix", "cutmix": parts of a second image are pasted
      "mix_probability": 0.5,
    }
  )

  config.train = ConfigDict(
    {"batch_size": 8, "num_steps": 10_000, "accumulate": 1, "average_decay": 0.999}
  )
  config.optimizer = defaults.adamw(learning_rate=3e-4, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=500)

  config.eval = ConfigDict(defaults.whole_image(scale=(2048, 512), multiple=32))
  config.eval.split = "val"
  config.eval.batch_size = 4
  config.eval.every = 1000
  return config
