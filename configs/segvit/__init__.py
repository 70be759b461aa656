r"""SegViT (Zhang et al., NeurIPS 2022; arXiv 2210.05844): the official recipes.

A variant is `b16`, `l16` or `shrunk_l16`.
"""

from __future__ import annotations

import functools

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, semantic
from effseg_jax.configs.tables import Row
from effseg_jax.errors import require_one_of

MODELS = ("b16", "l16", "shrunk_l16")

# Longer than any picture: the short side alone says how large pictures are.
_NO_LIMIT = 100_000


def model(variant: str, image_size: int) -> ConfigDict:
  """The model `segvit_<variant>`; B is described at 512 alone.

  Raises:
    UserError: for another variant.
  """
  require_one_of("the variant", variant, MODELS)
  size = 512 if variant == "b16" else image_size
  return semantic.network(f"segvit_{variant}", image_size=size)


def _train(config: ConfigDict, *, weight_decay: float, power: float) -> None:
  """Sets the task, its optimizer, and sliding windows."""
  side = config.model.image_size
  config.task = ConfigDict({"name": "class_masks"})
  if config.model.name != "segvit_b16":
    config.task.mean = config.task.std = (127.5, 127.5, 127.5)  # as the ViT was pretrained
  config.optimizer = defaults.adamw(learning_rate=2e-5, weight_decay=weight_decay)
  config.optimizer.clip_norm = 35.0
  config.optimizer.lr_rules = ((r"^(?!backbone/)", 10.0),)
  # The decoder's own are decayed: of two official rules that fit, "head" comes before "norm".
  config.optimizer.decay_rules = ((r"^backbone/.*norm", 0.0),)
  config.schedule = defaults.poly(warmup_steps=1500, power=power)
  stride = {640: 608, 512: 341}[side]
  config.eval.update({"mode": "slide", "crop": (side, side), "stride": (stride, stride)})
  config.eval.multiple = 1


def ade20k(fields: ConfigDict) -> ConfigDict:
  """ADE20K: 160,000 steps of crops of 640x640, or 512x512 for B."""
  config = semantic.ade20k(fields, fields.image_size)
  _train(config, weight_decay=0.01, power=1.0)
  return config


def coco_stuff(fields: ConfigDict) -> ConfigDict:
  """COCO-Stuff-10k: 80,000 steps of crops of 512x512."""
  config = semantic.coco_stuff(fields, large=False)
  _train(config, weight_decay=0.02, power=2.0)
  config.eval.scale = (_NO_LIMIT, 512)
  return config


_row = functools.partial(Row, variants="`b16`, `l16` or `shrunk_l16`")

_ABOUT = """
Hardware of the recipe: two images a GPU, their number is not stated (16 here); hours are not
published. Start from the ViT of AugReg (ImageNet-21k, then 1k at 384), the `.npz` of its authors:
  --config.init_from=FILE
The released weights are for non-commercial use. "Shrunk++" of the second paper was never published.
"""

EXPERIMENTS = {
  "ade20k": _row(
    ade20k,
    functools.partial(model, image_size=640),
    "l16",
    about=f"""SegViT on ADE20K (Zhang et al., NeurIPS 2022): the official recipe.

Published, one scale / several and mirrored: B 51.3 / 53.0 mIoU, L 54.6 / 55.2, shrunk L 53.9 /
55.1. Measured here: not trained. Of the recipe of B only the image size and drop path are known.
{_ABOUT}
  effseg train --config=segvit/ade20k:l16 --workdir=runs/segvit \\
    --config.data.root=data/ADEChallengeData2016 --config.init_from=ViT-L_16.npz
""",
  ),
  "coco_stuff": _row(
    coco_stuff,
    functools.partial(model, image_size=512),
    "l16",
    about=f"""SegViT on COCO-Stuff-10k (Zhang et al., NeurIPS 2022): the official recipe.

Published, one scale / several and mirrored: L 49.9 / 50.3 mIoU, shrunk L 49.1 / 49.4. Measured
here: not trained.
{_ABOUT}
  effseg train --config=segvit/coco_stuff:l16 --workdir=runs/segvit \\
    --config.data.root=data/coco_stuff10k --config.init_from=ViT-L_16.npz
""",
  ),
}
