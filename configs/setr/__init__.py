r"""SETR (Zheng et al., CVPR 2021; arXiv 2012.15840): MMSegmentation's recipes.

A variant is the decoder: `naive`, `pup` or `mla`.
"""

from __future__ import annotations

import functools

from ml_collections import ConfigDict

from effseg_jax.configs import semantic
from effseg_jax.configs.tables import Row
from effseg_jax.errors import require_one_of

DECODERS = ("naive", "pup", "mla")


def model(variant: str, image_size: int) -> ConfigDict:
  """The model `setr_<variant>_l16`.

  Raises:
    UserError: for another variant.
  """
  require_one_of("the variant", variant, DECODERS)
  return semantic.network(f"setr_{variant}_l16", image_size=image_size)


def _train(config: ConfigDict, learning_rates: dict[str, float], window: tuple[int, int]) -> None:
  """Sets SGD with ten times the rate for all heads, and sliding windows (side and stride)."""
  learning_rate = learning_rates[config.model.name.split("_")[1]]
  config.task.aux_weight = 0.4
  config.optimizer = ConfigDict(
    {
      "name": "sgd",
      "learning_rate": learning_rate,
      "momentum": 0.9,
      "weight_decay": 0.0,
      "clip_norm": 0.0,
      "lr_rules": (),
      "decay_rules": (),
      "freeze": (),
    }
  )
  config.schedule = ConfigDict(
    {
      "name": "poly",
      "power": 0.9,
      "end": 1e-4,  # of all groups
      "groups": ((r"^(head|auxiliary_\d)/", {"factor": 10.0}),),
      "warmup_steps": 0,
      "warmup_ratio": 1.0,
    }
  )
  side, stride = window
  config.eval.update({"mode": "slide", "crop": (side, side), "stride": (stride, stride)})
  config.eval.multiple = 1


def ade20k(fields: ConfigDict) -> ConfigDict:
  """ADE20K: 160,000 steps of 16 crops of 512x512."""
  config = semantic.ade20k(fields, 512)
  _train(config, {"naive": 0.01, "pup": 0.001, "mla": 0.001}, (512, 341))
  return config


def cityscapes(fields: ConfigDict) -> ConfigDict:
  """Cityscapes: 80,000 steps of 8 crops of 768x768."""
  if fields.name == "setr_naive_l16":
    fields.aux_convs = 1
  config = semantic.cityscapes(fields)
  config.data.augment.update({"scale": (2049, 1025), "crop": (768, 768)})
  config.train.num_steps = 80_000
  config.eval.scale = (2049, 1025)
  _train(config, {"naive": 0.01, "pup": 0.01, "mla": 0.002}, (768, 512))
  return config


_row = functools.partial(Row, variants="`naive`, `pup` or `mla`")

_ABOUT = """
Hardware of the recipe: float32, batch statistics over all GPUs; hours are not published. Start from
a ViT-L/16 of ImageNet-21k, fine-tuned at 384 (timm, or the `.npz` of its authors):
  --config.init_from=FILE
"""

EXPERIMENTS = {
  "ade20k": _row(
    ade20k,
    functools.partial(model, image_size=512),
    "pup",
    about=f"""SETR on ADE20K (Zheng et al., CVPR 2021): MMSegmentation's recipe.

Published by MMSegmentation, one scale / several and mirrored: naive 48.28 / 49.56 mIoU, PUP 48.24 /
49.99, MLA 47.54 / 49.37. Measured here: not trained.
{_ABOUT}
  effseg train --config=setr/ade20k:pup --workdir=runs/setr \\
    --config.data.root=data/ADEChallengeData2016 --config.init_from=jx_vit_large_p16_384.pth
""",
  ),
  "cityscapes": _row(
    cityscapes,
    functools.partial(model, image_size=768),
    "pup",
    about=f"""SETR on Cityscapes (Zheng et al., CVPR 2021): MMSegmentation's recipe.

Published by MMSegmentation, one scale / several and mirrored: naive 78.10 / 80.22 mIoU, PUP 79.21 /
81.02, MLA 77.00 / 79.59. Measured here: not trained.
{_ABOUT}
  effseg train --config=setr/cityscapes:pup --workdir=runs/setr \\
    --config.data.root=data/cityscapes --config.init_from=jx_vit_large_p16_384.pth
""",
  ),
}
