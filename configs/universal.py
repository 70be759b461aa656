"""The recipes of universal segmentation, which Mask2Former, PRO-SCALE and ECO-M2F share.

A recipe is a complete experiment for a model; a row in `configs/mask2former`, `configs/proscale`
or `configs/eco_m2f` names both. All follow Mask2Former's released configurations.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults
from effseg_jax.errors import UserError, suggestion

_BACKBONES = ("r50", "swin_tiny")


def mask2former(variant: str) -> ConfigDict:
  """The model `mask2former_<backbone>`; `variant` is the backbone."""
  return _with_backbone("mask2former", variant)


def proscale(variant: str) -> ConfigDict:
  """The model `proscale_<backbone>`.

  Args:
    variant: `<backbone>,<layers>` such as `swin_tiny,333`: layers of the encoder's three stages, on
      the tokens of one level, two and all three.
  """
  backbone, _, layers = variant.partition(",")
  layers = layers or "333"
  if len(layers) != 3 or not layers.isdigit():
    raise UserError(f"{variant!r}: {layers!r} is not a digit for each of three stages, like 333.")
  model = _with_backbone("proscale", backbone)
  model.proscale_layers = tuple(int(digit) for digit in layers)
  return model


def eco_m2f(variant: str) -> ConfigDict:
  """The model `eco_m2f_<backbone>`; `variant` is the backbone."""
  return _with_backbone("eco_m2f", variant)


def coco_panoptic(model: ConfigDict) -> ConfigDict:
  """50 epochs of COCO panoptic with large-scale jitter."""
  config = _recipe(model)
  config.data.name = "coco_panoptic"
  config.data.root = "data/coco"
  config.data.train_split = "train2017"
  config.data.options = ConfigDict({"first": 0})  # number of images of each split; 0: all
  config.data.augment = _large_scale_jitter(keep_empty=True)
  config.train.num_steps = 368_750
  config.schedule = _steps(327_778, 355_092)
  config.eval = _masks(short_side=800, max_size=1333)
  config.eval.split = "val2017"
  return config


def coco_instances(model: ConfigDict) -> ConfigDict:
  """50 epochs of COCO's instances, which overlap."""
  config = coco_panoptic(model)
  config.data.name = "coco_instances"
  # Whether pictures without an object are trained on; the recipe leaves them out.
  config.data.options = ConfigDict({"negatives": False})
  config.data.augment = _large_scale_jitter(keep_empty=False, layers=4)
  config.eval.panoptic = config.eval.semantic = False
  config.eval.best_by = "AP"
  return config


def folder_instances(model: ConfigDict) -> ConfigDict:
  """Instances of your own: polygons or masks in a COCO json, as effseg import writes it.

  Smaller than COCO's recipe in every number: 640x640, 10,000 steps of 8 images, and pictures
  without an object are trained on, too.
  """
  config = coco_instances(model)
  config.data.root = "data/folder_instances"
  config.data.train_split = "train"
  config.data.options = ConfigDict({"negatives": True})
  config.data.augment.crop = (640, 640)
  config.train.update({"batch_size": 8, "num_steps": 10_000})
  config.schedule = _steps(8_900, 9_600)
  config.eval.update({"split": "val", "short_side": 640, "max_size": 1066, "every": 1000})
  config.checkpoint.every = 1000
  return config


def ade20k_semantic(model: ConfigDict) -> ConfigDict:
  """ADE20K's 150 classes, a mask each."""
  config = _recipe(model)
  config.data.name = "ade20k"
  config.data.root = "data/ADEChallengeData2016"
  config.data.train_split = "training"
  config.data.augment = _shortest_edge(short_side=512, crop=(512, 512), keep_empty=False)
  config.train.num_steps = 160_000
  config.schedule = defaults.poly(warmup_steps=0, power=0.9)
  config.eval = _masks(short_side=512, max_size=2048)
  config.eval.panoptic = config.eval.instance = False
  config.eval.best_by = "mIoU"
  config.eval.split = "validation"
  return config


def ade20k_panoptic(model: ConfigDict) -> ConfigDict:
  """ADE20K with 100 classes of things and 50 of stuff."""
  config = ade20k_semantic(model)
  config.data.name = "ade20k_panoptic"
  config.data.augment = _shortest_edge(short_side=640, crop=(640, 640), keep_empty=True)
  config.eval = _masks(short_side=640, max_size=2560)
  config.eval.split = "validation"
  return config


def cityscapes_panoptic(model: ConfigDict) -> ConfigDict:
  """Cityscapes with 8 classes of things and 11 of stuff, evaluated at full size."""
  config = _recipe(model)
  if model.name.endswith("_r50"):
    config.model.norm = "bn"  # over the global batch, where the other recipes freeze it
  config.data.name = "cityscapes_panoptic"
  config.data.root = "data/cityscapes"
  config.data.train_split = "train"
  config.data.augment = _shortest_edge(short_side=1024, crop=(512, 1024), keep_empty=True)
  config.train.num_steps = 90_000
  config.schedule = defaults.poly(warmup_steps=0, power=0.9)
  config.eval = _masks(short_side=1024, max_size=2048)
  config.eval.split = "val"
  config.eval.batch_size = 4
  return config


def synthetic(model: ConfigDict) -> ConfigDict:
  """The embedded scenes, with a model that is small in every part: no data to fetch."""
  config = _recipe(small(model))
  config.data.name = "synthetic_instances"
  config.data.root = ""  # nothing to read
  config.data.train_split = "train"
  config.data.options = ConfigDict({"size": (128, 128), "seed": 0, "num_train": 2048})
  config.data.augment = ConfigDict(
    {
      "kind": "lsj",
      "crop": (128, 128),
      "scale": (0.8, 1.25),
      "flip": 0.5,
      "max_segments": 16,
      "layers": 1,
      "keep_empty": False,
      "pad_as_picture": False,
    }
  )
  config.task.num_points = 1024
  config.train.batch_size = 8
  config.train.num_steps = 1200
  config.optimizer = from_scratch(model, learning_rate=1e-3, weight_decay=0.05)
  config.schedule = defaults.poly(warmup_steps=30, power=0.9)
  config.eval = _masks(short_side=128, max_size=128)
  config.eval.split = "val"
  config.eval.every = 600
  config.checkpoint.every = 300
  config.log.every = 20
  return config


def overfit(model: ConfigDict) -> ConfigDict:
  """Overfits eight images of COCO: a check of everything from pixels to PQ."""
  config = coco_panoptic(small(model))
  config.data.options.first = 8
  config.data.augment.update(
    {
      "crop": (256, 256),
      "scale": (1.0, 1.0),
      "flip": 0.0,
      "max_segments": 20,
      "keep_empty": False,
      # Grey padding in training and none in evaluation halve the PQ of overfitted pictures.
      "pad_as_picture": False,
    }
  )
  config.task.num_points = 2048
  config.train.update({"batch_size": 2, "num_steps": 800})
  config.optimizer = from_scratch(model, learning_rate=1e-3, weight_decay=0.0)
  config.schedule = defaults.poly(warmup_steps=50, power=0.9)
  config.eval = _masks(short_side=256, max_size=256)
  config.eval.multiple = 256  # all pictures have the shape of training
  config.eval.split = config.data.train_split
  config.eval.every = 400
  config.eval.pictures = 8
  config.checkpoint.every = 200
  config.log.every = 25
  return config


def small(model: ConfigDict) -> ConfigDict:
  """A model that trains on a CPU: few features and queries, one round of the decoder.

  The backbone is a ResNet-18 with trained normalisation, or a tenth of a Swin-T.
  """
  if model.name.endswith("_r50"):
    backbone = {"depth": 18, "norm": "bn"}
  else:
    backbone = {
      "backbone_features": 32,
      "backbone_depths": (1, 1, 2, 1),
      "backbone_heads": (1, 2, 4, 8),
      "window": 8,
      "drop_path": 0.0,
    }
  decoder = {
    "features": 64,
    "heads": 4,
    "encoder_mlp_features": 128,
    "decoder_mlp_features": 256,
    "decoder_layers": 3,
    "num_queries": 30,
  }
  model.update({**backbone, **decoder})
  return model


def from_scratch(model: ConfigDict, *, learning_rate: float, weight_decay: float) -> ConfigDict:
  """One rate for all parts: no backbone is pretrained."""
  optimizer = defaults.adamw(learning_rate=learning_rate, weight_decay=weight_decay)
  optimizer.clip_norm = 1.0  # of a gradient that is ten times longer without pretraining
  optimizer.decay_rules = _decay_rules(model)
  return optimizer


def _decay_rules(model: ConfigDict) -> tuple[tuple[str, float], ...]:
  """No weight decay for normalisations, PyTorch's embeddings and relative positions.

  Biases decay, as in the recipe, and so does the pixel decoder's level embedding, which is no
  `nn.Embedding` there.
  """
  rules = [r"norm[^/]*/(scale|bias)$", r"^decoder/(query_features|query_positions|level_embed)$"]
  if model.name.endswith("swin_tiny"):
    rules.append(r"relative_position_bias$")
  return tuple((rule, 0.0) for rule in rules)


def _with_backbone(family: str, backbone: str) -> ConfigDict:
  if backbone not in _BACKBONES:
    raise UserError(
      f"there is no backbone {backbone!r}; expected one of {', '.join(_BACKBONES)}."
      f"{suggestion(backbone, _BACKBONES)}"
    )
  model = ConfigDict({"name": f"{family}_{backbone}", "dtype": "float32", "remat": False})
  model.num_queries = 100
  if backbone == "swin_tiny":
    model.drop_path = 0.3
  else:
    model.norm = "frozen_bn"
  return model


def _recipe(model: ConfigDict) -> ConfigDict:
  """Common to all recipes: batch, optimizer, losses."""
  config = defaults.run()
  config.model = model
  config.task = ConfigDict(
    {
      "name": "universal",
      "class_weight": 2.0,
      "mask_weight": 5.0,
      "dice_weight": 5.0,
      "no_object_weight": 0.1,
      "num_points": 12544,
      "oversample_ratio": 3.0,
      "importance_ratio": 0.75,
    }
  )
  config.data = ConfigDict(defaults.loading())
  config.data.options = ConfigDict()
  config.train = ConfigDict({"batch_size": 16, "accumulate": 1, "average_decay": 0.0})
  config.optimizer = defaults.adamw(learning_rate=1e-4, weight_decay=0.05)
  config.optimizer.clip_norm = 0.01  # of the gradient of all parameters together
  config.optimizer.lr_rules = (("^backbone/", 0.1),)
  config.optimizer.decay_rules = _decay_rules(model)
  config.checkpoint.every = 5000
  return config


def _large_scale_jitter(*, keep_empty: bool, layers: int = 1) -> ConfigDict:
  """COCO's augmentation: 3 MiB of image and 1 MiB a layer of targets an example."""
  return ConfigDict(
    {
      "kind": "lsj",
      "crop": (1024, 1024),
      "scale": (0.1, 2.0),
      "flip": 0.5,
      "max_segments": 100,
      "layers": layers,
      "keep_empty": keep_empty,
      "pad_as_picture": True,
    }
  )


def _shortest_edge(*, short_side: int, crop: tuple[int, int], keep_empty: bool) -> ConfigDict:
  """The augmentation of ADE20K and Cityscapes."""
  return ConfigDict(
    {
      "kind": "shortest_edge",
      "short_side": short_side,
      "crop": crop,
      "photometric": True,
      "flip": 0.5,
      "max_segments": 100,
      "layers": 1,
      "keep_empty": keep_empty,
      "pad_as_picture": True,
    }
  )


def _steps(*milestones: int) -> ConfigDict:
  """A tenth of the rate from each milestone on; no warm-up."""
  return ConfigDict(
    {
      "name": "step",
      "milestones": milestones,
      "factor": 0.1,
      "warmup_steps": 0,
      "warmup_ratio": 1.0,
    }
  )


def _masks(*, short_side: int, max_size: int) -> ConfigDict:
  """How masks are evaluated, and which results are made of them."""
  return ConfigDict(
    {
      "short_side": short_side,  # of the network's input
      "max_size": max_size,  # of its long side
      "multiple": 32,  # pictures are padded to a multiple of this
      "panoptic": True,
      "instance": True,
      "semantic": True,
      "score_threshold": 0.8,  # of panoptic segments
      "overlap_threshold": 0.8,
      "detections": 100,  # instances an image
      "batch_size": 8,
      "every": 5000,
      "best_by": "PQ",
      "pictures": 3,
    }
  )
