"""AFFormer of 25k parameters on the synthetic scenes: seconds instead of minutes.

All tests that train a real model use this configuration, so that its programs compile once: the
schedule's numbers are constants in them.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs.afformer import synthetic

SIZE = 64


def get_config(variant: str = "scenes") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `scenes` (the synthetic data set), or `blocks` (a folder of pictures, not augmented).
  """
  config = synthetic.get_config("tiny")
  config.model.widths = (8, 16, 32, 32)
  config.model.depths = (0, 1, 1, 1)
  config.model.dropout = 0.0
  if variant == "blocks":
    config.data.name = "folder"
    config.data.options = ConfigDict()
    config.data.augment.ratio = (1.0, 1.0)
    config.data.augment.flip = 0.0
    config.eval.split = "train"
  else:
    config.data.options.size = (SIZE, SIZE)
  config.data.augment.scale = (SIZE, SIZE)
  config.data.augment.crop = (SIZE, SIZE)
  config.train.batch_size = 4
  config.train.num_steps = 80
  config.train.average_decay = 0.9
  config.optimizer.learning_rate = 1e-2
  config.schedule.warmup_steps = 10
  config.eval.every = 40
  config.eval.batch_size = 4
  config.checkpoint.every = 40
  config.log.every = 20
  return config
