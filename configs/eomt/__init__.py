r"""EoMT (Kerssies et al., CVPR 2025; arXiv 2503.19108): the official recipes.

A variant is `s`, `b` or `l`; `l,1280` sees images of another size than the recipe's first one.
"""

from __future__ import annotations

import functools

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, universal
from effseg_jax.configs.tables import Row
from effseg_jax.errors import UserError, suggestion

# Blocks that see the queries.
_BLOCKS = {"s": 3, "b": 3, "l": 4}


def model(variant: str, image_size: int, num_queries: int) -> ConfigDict:
  """The model `eomt_vit_<variant>`; what follows a comma is the image size.

  Args:
    variant: `s`, `b` or `l`, or `l,1280`.
    image_size: where the variant names none.
    num_queries: Q.

  Raises:
    UserError: for another variant.
  """
  size, _, side = variant.partition(",")
  if size not in _BLOCKS or (side and not side.isdigit()):
    raise UserError(
      f"there is no variant {variant!r}; expected s, b or l, or with an image size such as l,1280."
      f"{suggestion(size, _BLOCKS)}"
    )
  return ConfigDict(
    {
      "name": f"eomt_vit_{size}",
      "dtype": "float32",
      "remat": False,
      "image_size": int(side or image_size),
      "num_queries": num_queries,
    }
  )


def _train(
  config: ConfigDict, *, num_steps: int, scale: tuple[float, float], photometric: bool
) -> None:
  """Sets what the recipes share: annealing, augmentation, learning rates."""
  fields, side = config.model, config.model.image_size
  config.train.num_steps = num_steps
  config.task.update(
    {
      "black_padding": True,
      "mask_blocks": fields.get("query_blocks", _BLOCKS[fields.name[-1]]),
      "annealing_steps": config.train.get_ref("num_steps"),
    }
  )
  config.data.augment = ConfigDict(
    {
      "kind": "eomt",
      "crop": (side, side),
      "scale": scale,
      "flip": 0.5,
      "max_segments": 100,
      "layers": 1,
      "keep_empty": False,
      "photometric": photometric,
      "pad_as_picture": True,
    }
  )
  config.optimizer = defaults.adamw(learning_rate=1e-4, weight_decay=0.05)  # of all parameters
  config.optimizer.clip_norm = 0.01  # of the gradient of all parameters together
  config.optimizer.layer_decay = 0.8
  config.schedule = ConfigDict(
    {
      "name": "delayed_poly",
      "power": 0.9,
      "end": 0.0,
      "delay": 0,
      "ramp": 500,
      "groups": (("^backbone/", {"delay": 500, "ramp": 1000}),),
      "warmup_steps": 0,
      "warmup_ratio": 1.0,
    }
  )


def _fitted(config: ConfigDict) -> ConfigDict:
  """Evaluates pictures that are fitted into the image and padded with black."""
  config.eval.fit = (config.model.image_size,) * 2
  return config


def _windows(config: ConfigDict) -> ConfigDict:
  """Evaluates class maps in square windows along a picture's long side."""
  config.eval.window_side = config.model.image_size
  config.eval.panoptic = config.eval.instance = False
  config.eval.best_by = "mIoU"
  return config


def _coco_steps(fields: ConfigDict) -> int:
  """12 epochs for L, 24 for S and B, as the released models were trained."""
  return 88_692 * (1 if fields.name.endswith("_l") else 2)


def coco_panoptic(fields: ConfigDict) -> ConfigDict:
  """COCO panoptic with large-scale jitter."""
  config = universal.coco_panoptic(fields)
  _train(config, num_steps=_coco_steps(fields), scale=(0.1, 2.0), photometric=False)
  return _fitted(config)


def coco_instances(fields: ConfigDict) -> ConfigDict:
  """COCO's instances, which overlap."""
  config = universal.coco_instances(fields)
  _train(config, num_steps=_coco_steps(fields), scale=(0.1, 2.0), photometric=False)
  config.data.augment.layers = 4
  return _fitted(config)


def ade20k_panoptic(fields: ConfigDict) -> ConfigDict:
  """ADE20K with 100 classes of things and 50 of stuff: 31 epochs."""
  config = universal.ade20k_panoptic(fields)
  _train(config, num_steps=39_120, scale=(0.1, 2.0), photometric=True)
  return _fitted(config)


def ade20k_semantic(fields: ConfigDict) -> ConfigDict:
  """ADE20K's 150 classes, a mask each: 31 epochs."""
  config = universal.ade20k_semantic(fields)
  _train(config, num_steps=39_120, scale=(0.5, 2.0), photometric=True)
  return _windows(config)


def cityscapes_semantic(fields: ConfigDict) -> ConfigDict:
  """Cityscapes' 19 classes, a mask each: 107 epochs."""
  config = universal.ade20k_semantic(fields)
  config.data.name, config.data.root = "cityscapes", "data/cityscapes"
  config.data.train_split, config.eval.split = "train", "val"
  config.data.options = ConfigDict({"labels": "auto"})  # or "ids", "train_ids"
  _train(config, num_steps=19_902, scale=(0.5, 2.0), photometric=True)
  return _windows(config)


def synthetic(fields: ConfigDict) -> ConfigDict:
  """The embedded scenes, with a small model from random weights: no data to fetch."""
  config = universal.synthetic(fields)
  config.model = model("s", image_size=128, num_queries=30)
  config.model.update(
    {
      "embed_dim": 96,
      "depth": 6,
      "num_heads": 3,
      "query_blocks": 2,
      "patch_size": 8,
      "layer_scale_init": 1.0,  # branches that begin at 1e-5 learn nothing in a short training
    }
  )
  _train(config, num_steps=1200, scale=(0.8, 1.25), photometric=False)
  config.data.augment.max_segments = 16
  config.optimizer.update({"learning_rate": 1e-3, "clip_norm": 1.0, "layer_decay": 1.0})
  config.schedule.update({"ramp": 30, "groups": ()})  # nothing is pretrained
  return _fitted(config)


_row = functools.partial(Row, variants="`s`, `b` or `l`, and perhaps an image size: `l,1280`")
_640 = functools.partial(model, image_size=640, num_queries=200)
_512 = functools.partial(model, image_size=512, num_queries=100)
_1024 = functools.partial(model, image_size=1024, num_queries=100)

_FULL_SIZE = """
Hardware of the recipe: global batch 16, float16; 12 epochs of COCO with L at 640 take 6 hours on 4
H100, 26 GB each. On TPUs and GPUs add --config.model.dtype=bfloat16; softmax, losses and statistics
stay float32.
Start from DINOv2 with registers (facebookresearch/dinov2 or timm): --config.init_from=FILE. From
ImageNet-1k alone EoMT is weak (44 PQ where DINOv2 gives 56).
"""

EXPERIMENTS = {
  "synthetic": Row(
    synthetic,
    functools.partial(model, image_size=128, num_queries=30),
    "s",
    "none",
    about="""EoMT on the embedded scenes: panoptic segmentation with no data to fetch.

A small model (6 blocks of 96 channels, patches of 8x8, 30 queries) from random weights; without
pretraining EoMT is weak, see docs/universal.md. Measured here: not trained to its end.

  effseg train --config=eomt/synthetic --workdir=runs/eomt_synthetic
""",
  ),
  "coco_panoptic": _row(
    coco_panoptic,
    _640,
    "l",
    about=f"""EoMT on COCO panoptic (Kerssies et al., CVPR 2025): the official recipe.

Published: S 46.7 PQ and B 51.6 (24 epochs), L 56.0 (12 epochs), L at 1280 58.3. Measured here: not
trained.
{_FULL_SIZE}
  effseg train --config=eomt/coco_panoptic:l --workdir=runs/eomt --config.data.root=data/coco \\
    --config.init_from=dinov2_vitl14_reg4_pretrain.pth
""",
  ),
  "coco_instances": _row(
    coco_instances,
    _640,
    "l",
    about=f"""EoMT on COCO instances (Kerssies et al., CVPR 2025): the official recipe.

Published: L 45.2 AP, at 1280 48.8. Measured here: not trained.
{_FULL_SIZE}
  effseg train --config=eomt/coco_instances:l --workdir=runs/eomt --config.data.root=data/coco \\
    --config.init_from=dinov2_vitl14_reg4_pretrain.pth
""",
  ),
  "ade20k_panoptic": _row(
    ade20k_panoptic,
    _640,
    "l",
    about=f"""EoMT on ADE20K panoptic (Kerssies et al., CVPR 2025): the official recipe.

Published: L 50.6 PQ, at 1280 51.7, both from the model of COCO panoptic without its class head.
Measured here: not trained.
{_FULL_SIZE}
  effseg train --config=eomt/ade20k_panoptic:l --workdir=runs/eomt \\
    --config.data.root=data/ADEChallengeData2016 --config.init_from=coco_panoptic_eomt_large_640.bin
""",
  ),
  "ade20k_semantic": _row(
    ade20k_semantic,
    _512,
    "l",
    about=f"""EoMT on ADE20K, 150 classes (Kerssies et al., CVPR 2025): the official recipe.

Published: L 58.4 mIoU. Measured here: not trained.
{_FULL_SIZE}
  effseg train --config=eomt/ade20k_semantic:l --workdir=runs/eomt \\
    --config.data.root=data/ADEChallengeData2016 \\
    --config.init_from=dinov2_vitl14_reg4_pretrain.pth
""",
  ),
  "cityscapes_semantic": _row(
    cityscapes_semantic,
    _1024,
    "l",
    about=f"""EoMT on Cityscapes, 19 classes (Kerssies et al., CVPR 2025): the official recipe.

Published: L 84.2 mIoU. Measured here: not trained.
{_FULL_SIZE}
  effseg train --config=eomt/cityscapes_semantic:l --workdir=runs/eomt \\
    --config.data.root=data/cityscapes --config.init_from=dinov2_vitl14_reg4_pretrain.pth
""",
  ),
}
