"""Common parts of the recipes of semantic segmentation; each experiment sets the rest."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from effseg_jax.configs import defaults


def afformer(variant: str, **fields: Any) -> ConfigDict:
  """The model `afformer_<variant>`: `tiny`, `small` or `base`; with `_fft`, the spectral models."""
  return ConfigDict({"name": f"afformer_{variant}", "dtype": "float32", "remat": False, **fields})


def recipe(
  model: ConfigDict,
  *,
  data: str,
  root: str,
  splits: tuple[str, str],
  scale: tuple[int, int],
  crop: tuple[int, int],
  normalize_by: str,
  batch_size: int,
  num_steps: int,
  average_decay: float = 0.0,
) -> ConfigDict:
  """Model, data, task and MMSegmentation's augmentation, without optimizer and evaluation.

  Args:
    model: fields of `create_model`.
    data: name of the data set.
    root: its folder; empty where there is nothing to read.
    splits: that are trained and evaluated on.
    scale: (long, short) side that training images are resized to, times a ratio of 0.5 to 2.
    crop: rows and columns of a training example.
    normalize_by: see `SemanticTask`.
    batch_size: of all devices together.
    num_steps: of the optimizer.
    average_decay: of the averaged weights; 0: none are kept.
  """
  config = defaults.run()
  config.model = model
  config.task = ConfigDict(
    {"name": "semantic", "normalize_by": normalize_by, "class_weights": ()}  # (): 1 each
  )
  config.data = ConfigDict(defaults.loading())
  config.data.name, config.data.root = data, root
  config.data.train_split = splits[0]
  config.data.options = ConfigDict()
  config.data.augment = ConfigDict(
    {
      "scale": scale,
      "ratio": (0.5, 2.0),
      "crop": crop,
      "max_class_share": 0.75,
      "flip": 0.5,
      "photometric": True,
      "mix": "",  # or "classmix", "cutmix": parts of a second image are pasted
      "mix_probability": 0.5,
    }
  )
  config.train = ConfigDict(
    {
      "batch_size": batch_size,
      "num_steps": num_steps,
      "accumulate": 1,
      "average_decay": average_decay,
    }
  )
  config.eval = ConfigDict({"split": splits[1]})
  return config


def evaluate_whole_images(
  config: ConfigDict, *, scale: tuple[int, int], multiple: int, batch_size: int, every: int
) -> None:
  """Sets the evaluation of whole images, as MMSegmentation's `mode="whole"` does it.

  Args:
    config: of `recipe`.
    scale: (long, short) side that images are resized to, keeping their ratio; (0, 0): as they are.
    multiple: then both sides are stretched up to a multiple of this; 1: not.
    batch_size: of all devices together.
    every: steps between two evaluations.
  """
  config.eval.update(defaults.whole_image(scale=scale, multiple=multiple))
  config.eval.update({"batch_size": batch_size, "every": every})
