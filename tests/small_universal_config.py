"""PRO-SCALE of few channels on a few pictures in COCO's form: seconds instead of days."""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax import configs
from tests.universal_models import SMALL, SMALL_BACKBONE


def get_config(variant: str = "swin_tiny,111") -> ConfigDict:
  """Returns the experiment; its data are a folder's `val2017`."""
  config = configs.load(f"proscale/overfit:{variant}")
  config.model.update({**SMALL, **SMALL_BACKBONE["swin_tiny"]})
  config.model.update({"backbone_depths": (1, 1, 1, 1), "decoder_layers": 1})
  config.model.proscale_layers = (1, 0, 0)
  del config.model.num_classes  # those of the data
  config.task.num_points = 64
  config.data.train_split = config.eval.split = "val2017"
  config.data.options.first = 0
  config.data.augment.crop = (64, 64)
  config.data.augment.max_segments = 4
  config.train.num_steps = 4
  config.eval.short_side = config.eval.max_size = config.eval.multiple = 64
  config.eval.batch_size = 3
  config.eval.every = config.checkpoint.every = 4
  config.log.every = 2
  return config
