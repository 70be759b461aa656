"""AFFormer on the embedded synthetic scenes: no data to fetch.

Without a variant, an AFFormer of half the blocks and channels, and a recipe for the first minutes;
`tiny` trains the published model on small images, and `tiny,long` on scenes at twice their size.

Measured here, one seed each: 58.2 val mIoU in 450 steps, 175 CPU seconds besides compiling; `tiny`
36.8 in 107 s on two cores; `tiny,long` 86.1 after 1,500 steps (docs/results.md).

  effseg train --config=afformer/synthetic --workdir=runs/synthetic
  effseg train --config=afformer/synthetic:tiny,long --workdir=runs/scenes
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, semantic
from effseg_jax.errors import UserError

# Square roots of the classes' shares, inverted: shapes cover little, and are what is to be learned.
_CLASS_WEIGHTS = (0.9, 1.1, 1.0, 2.1, 2.7, 2.0, 2.0, 2.5)


def get_config(variant: str = "quick") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `quick`; or `tiny`, `small` or `base`, with `_fft` the spectral models; `,long` after
      one of these is the long recipe.
  """
  name, _, length = variant.partition(",")
  if length not in ("", "long") or (name == "quick" and length):
    raise UserError(f"{variant!r}: expected quick, or a size such as tiny, or tiny,long.")
  config = semantic.recipe(
    semantic.afformer("tiny" if name == "quick" else name),
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
  if name == "quick":
    _quick(config)
  elif length:
    _long(config)
  return config


def _quick(config: ConfigDict) -> None:
  """Half the channels and half the blocks: half the time to compile, and to take a step."""
  config.model.update({"widths": (32, 64, 96, 128), "depths": (0, 1, 2, 1)})
  config.task.class_weights = _CLASS_WEIGHTS
  # Logits have an eighth of the image's resolution, which is coarse for shapes of 30 pixels.
  config.data.augment.update({"scale": (192, 192), "ratio": (0.75, 1.33)})
  config.eval.update({"scale": (192, 192), "every": 450})
  config.train.update({"num_steps": 450, "average_decay": 0.98})
  config.optimizer.update({"learning_rate": 5e-3, "b2": 0.99, "clip_norm": 1.0})
  config.checkpoint.every = 450


def _long(config: ConfigDict) -> None:
  """Every scene new, seen at twice its size, of which a crop is a quarter."""
  config.data.options.num_train = 40_000
  config.data.augment.update({"scale": (256, 256), "ratio": (0.7, 1.4)})
  config.eval.update({"scale": (256, 256), "every": 500})
  config.train.update({"batch_size": 16, "num_steps": 2000, "average_decay": 0.998})
  config.optimizer.clip_norm = 1.0
  config.schedule.update({"power": 0.9, "warmup_steps": 100})
  config.checkpoint.every = 100
