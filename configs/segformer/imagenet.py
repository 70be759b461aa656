r"""Pretraining SegFormer's encoder on ImageNet-1k, with the paper's image head.

The settings are DeiT's public recipe, as in `configs/afformer/imagenet.py`; how the authors' own
differ is not known here. Published top-1, from memory and not checked again: 70.5 / 78.7 / 81.6 /
83.1 / 83.6 / 83.8 for b0 to b5.
Measured here: not trained (the data set is not at hand).
Hardware of the recipe: global batch 1024, 300 epochs at 224x224, float32.

  effseg train --config=segformer/imagenet:b0 --workdir=runs/imagenet \
    --config.data.root=data/imagenet
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import segformer
from effseg_jax.configs.afformer import imagenet


def get_config(variant: str = "b0") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `b0` to `b5`.
  """
  config = imagenet.get_config()
  config.model = segformer.model(variant)
  config.model.head = "image"
  return config
