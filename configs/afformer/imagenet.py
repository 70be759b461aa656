r"""Pretraining AFFormer's backbone on ImageNet-1k.

The authors publish weights but neither code, recipe nor accuracy. This is DeiT's public recipe
(Touvron et al., 2021), an assumption and not a fact about AFFormer: AdamW, 300 epochs, learning
rate 5e-4 x batch / 512, decay 0.05 except on norms and biases, cosine with 5 epochs of warm-up,
RandAugment, mixup 0.8, CutMix 1.0, label smoothing 0.1, random erasing 0.25, 224x224.
Measured here: not trained (the data set is not at hand).

  effseg train --config=afformer/imagenet:base --workdir=runs/imagenet \
    --config.data.root=data/imagenet
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults

_NUM_IMAGES, _BATCH_SIZE, _EPOCHS = 1_281_167, 1024, 300


def get_config(variant: str = "base") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models.
  """
  config = defaults.run()
  config.model = ConfigDict(
    {"name": f"afformer_{variant}", "head": "image", "dtype": "float32", "remat": False}
  )
  config.task = ConfigDict(
    {"name": "classification", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0}
  )

  config.data = ConfigDict(defaults.loading())
  config.data.name = "imagenet"
  config.data.root = "data/imagenet"
  config.data.train_split = "train"
  config.data.options = ConfigDict()
  config.data.augment = ConfigDict(
    {"size": 224, "area": (0.08, 1.0), "flip": 0.5, "randaugment": (2, 9.0), "erasing": 0.25}
  )

  epoch = _NUM_IMAGES // _BATCH_SIZE
  config.train = ConfigDict(
    {
      "batch_size": _BATCH_SIZE,
      "num_steps": _EPOCHS * epoch,
      "accumulate": 1,
      "average_decay": 0.0,
    }
  )
  config.optimizer = defaults.adamw(learning_rate=5e-4 * _BATCH_SIZE / 512, weight_decay=0.05)
  config.optimizer.decay_rules = ((r"(bias|scale)$", 0.0),)
  config.schedule = ConfigDict(
    {"name": "cosine", "end": 1e-5, "warmup_steps": 5 * epoch, "warmup_ratio": 1e-3}
  )

  config.eval = ConfigDict(
    {
      "split": "val",
      "batch_size": 256,
      "every": 5 * epoch,
      "resize": 256,
      "crop": config.data.augment.get_ref("size"),
      "best_by": "top1",
    }
  )
  config.log.every = 200
  return config
