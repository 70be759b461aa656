r"""AFFormer on your own images: a folder of pictures, a folder of index PNGs, a list of classes.

See docs/datasets.md for the folder tree. Adjust `scale` to the size of your images and `num_steps`
to their number (about 100 passes over them are a beginning), and start from released weights:
  --config.init_from=AFFormer_base_ImageNet1k.pth

  effseg train --config=afformer/folder:tiny --workdir=runs/mine \
    --config.data.root=my_images
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
    data="folder",
    root="data/folder",
    splits=("train", "val"),
    scale=(2048, 512),
    crop=(512, 512),
    normalize_by="valid",
    batch_size=8,
    num_steps=10_000,
    average_decay=0.999,
  )
  config.data.options = ConfigDict(
    {
      "ignore": 255,  # stored value of what has no class
      "labels": "index",  # or from_one, binary, colours
      "turn_labels": False,  # as the EXIF orientation turns their pictures
    }
  )
  config.optimizer = defaults.adamw(learning_rate=3e-4, weight_decay=0.01)
  config.schedule = defaults.poly(warmup_steps=500)
  semantic.evaluate_whole_images(config, scale=(2048, 512), multiple=32, batch_size=4, every=1000)
  return config
