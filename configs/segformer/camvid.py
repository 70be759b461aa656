r"""SegFormer from scratch on CamVid, trained as AFFormer is: to compare the two at equal cost.

Not a recipe of the authors: data, augmentation, optimizer and evaluation are those of
`configs/afformer/camvid.py`, and so is the number of images seen (2,400 steps of 8).
Measured here: not trained yet. Two CPU cores, some hours.

  effseg train --config=segformer/camvid:b0 --workdir=runs/camvid --config.data.root=data/camvid
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import semantic


def get_config(variant: str = "b0") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `b0` to `b5`.
  """
  return semantic.camvid(semantic.network(f"segformer_{variant}", drop_path=0.0))
