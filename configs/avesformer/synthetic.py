r"""AVESFormer on the embedded clips with sound: no data needed, a result in two minutes.

Two objects move, one of them (or both, or none) makes a sound; the picture does not show which.
With `--config.model.blind_to=sound` the same model trains without sound: the difference of the two
results is the value of sound.

Measured here, seed 0, about two minutes on two CPU cores: 93.1 M_J with sound, 51.8 without
(docs/results.md has the ablations).

  effseg train --config=avesformer/synthetic --workdir=runs/hearing
  effseg train --config=avesformer/synthetic --workdir=runs/blind \
    --config.model.blind_to=sound
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import audio_visual, defaults


def get_config(variant: str = "lite") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `lite`, `r50`, or another of the `avesformer_*` models.
  """
  config = defaults.run()
  config.model = audio_visual.model(variant)
  if variant == "lite":  # four kinds of objects on small frames need even less
    config.model.backbone = "small"
    # Strides 4 to 32 leave 16x16, 8x8, 4x4 and 2x2 positions: if only the last two stages attend to
    # the sound, they are too coarse to distinguish the objects.
    config.model.stage_types = ("conv", "attn", "attn", "attn")
    config.model.depths = (1, 1, 1, 1)
    config.model.widths = (32, 64, 64, 64)
    config.model.width = 64
    config.model.hidden = 128
    config.model.prompts = 8
    config.model.prompt_layers = 1
    config.model.prompt_hidden = 128
    config.model.dropout = 0.0
  config.task = ConfigDict({"name": "audio_visual", "mask_loss": "bce_dice", "mix_weight": 0.0})

  config.data = ConfigDict(defaults.loading())
  config.data.name = "synthetic_av"
  config.data.root = ""  # nothing to read
  config.data.train_split = "train"
  config.data.options = ConfigDict(
    {"size": (64, 64), "num_frames": 3, "semantic": False, "seed": 0}
  )
  config.data.augment = ConfigDict({"size": (64, 64), "flip": 0.5})

  config.train = ConfigDict(
    {"batch_size": 8, "num_steps": 600, "accumulate": 1, "average_decay": 0.98}
  )
  config.optimizer = defaults.adamw(learning_rate=1e-3, weight_decay=0.01)
  config.optimizer.clip_norm = 1.0
  config.optimizer.freeze = () if variant == "lite" else ("^audio/",)  # VGGish is not trained
  config.schedule = defaults.poly(warmup_steps=30)

  config.eval = audio_visual.evaluation(size=(64, 64), mask_size=(64, 64))
  config.eval.split = "val"
  config.eval.every = 300
  config.checkpoint.every = 300
  config.log.every = 20
  return config
