"""Common parts of the recipes of semantic segmentation; each experiment sets the rest."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from effseg_jax.configs import defaults


def afformer(variant: str, **fields: Any) -> ConfigDict:
  """The model `afformer_<variant>`: `tiny`, `small` or `base`; with `_fft`, the spectral models."""
  return network(f"afformer_{variant}", **fields)


def network(name: str, **fields: Any) -> ConfigDict:
  """A model by name: computed in float32, keeping its activations, unless fields say otherwise."""
  return ConfigDict({"name": name, "dtype": "float32", "remat": False, **fields})


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


def ade20k(model: ConfigDict, crop: int = 512) -> ConfigDict:
  """MMSegmentation's data, augmentation and evaluation of ADE20K: 160,000 steps of 16 images.

  Args:
    model: of `network`.
    crop: side of a training example; the short side of images is as long.
  """
  config = recipe(
    model,
    data="ade20k",
    root="data/ADEChallengeData2016",
    splits=("training", "validation"),
    scale=(2048, crop),
    crop=(crop, crop),
    normalize_by="all",
    batch_size=16,
    num_steps=160_000,
  )
  evaluate_whole_images(config, scale=(2048, crop), multiple=32, batch_size=8, every=5000)
  return config


def cityscapes(model: ConfigDict) -> ConfigDict:
  """MMSegmentation's data, augmentation and evaluation of Cityscapes: 160,000 steps of 8 images."""
  config = recipe(
    model,
    data="cityscapes",
    root="data/cityscapes",
    splits=("train", "val"),
    scale=(2048, 1024),
    crop=(1024, 1024),
    normalize_by="all",
    batch_size=8,
    num_steps=160_000,
  )
  config.data.options.labels = "auto"  # or "ids", "train_ids"
  evaluate_whole_images(config, scale=(2048, 1024), multiple=32, batch_size=8, every=5000)
  config.eval.crop, config.eval.stride = (1024, 1024), (768, 768)  # of eval.mode="slide"
  return config


def coco_stuff(model: ConfigDict, *, large: bool) -> ConfigDict:
  """COCO-Stuff, 171 classes: 80,000 steps of 16 images.

  Args:
    model: of `network`.
    large: of the 164 thousand images, or the 10 thousand.
  """
  config = recipe(
    model,
    data="coco_stuff_164k" if large else "coco_stuff_10k",
    root="data/coco_stuff164k" if large else "data/coco_stuff10k",
    splits=("train2017", "val2017") if large else ("train2014", "test2014"),
    scale=(2048, 512),
    crop=(512, 512),
    normalize_by="all",
    batch_size=16,
    num_steps=80_000,
  )
  if large:
    config.data.options.labels = "auto"  # or "ids", "train_ids"
  evaluate_whole_images(config, scale=(2048, 512), multiple=1, batch_size=8, every=5000)
  return config


# Square root of the median-frequency weights of SegNet's prototxt, in class order.
_CAMVID_WEIGHTS = (0.509, 0.427, 2.136, 0.376, 0.951, 0.619, 3.106, 1.357, 0.826, 2.500, 2.713)


def camvid(model: ConfigDict) -> ConfigDict:
  """CamVid from random weights, with everything but the model as `configs/afformer/camvid.py` says.

  Args:
    model: of `network`.
  """
  config = recipe(
    model,
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
  config.task.class_weights = _CAMVID_WEIGHTS
  # Sequences of train that are trained on; `rest` is then a split with the others. Empty: all.
  config.data.options.sequences = ""
  config.data.augment.ratio = (0.75, 2.25)
  config.optimizer = defaults.adamw(learning_rate=1.5e-3, weight_decay=0.02)
  config.schedule = defaults.poly(warmup_steps=150, power=0.9)
  evaluate_whole_images(config, scale=(720, 540), multiple=1, batch_size=4, every=400)
  config.checkpoint.every = 200
  return config
