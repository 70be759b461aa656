"""PRO-SCALE on eight images of COCO, known by heart: everything from the pixels to PQ in one check.

The first eight training images, 49 segments of 23 classes, at 256 pixels; a model of 1.8 million
parameters (a narrow Swin Transformer, 64 features, 30 queries) from random weights.
Measured here (one CPU core, five minutes): 93.0 PQ on the same images, see docs/results.md.

  python train.py --config=configs/proscale/overfit.py --workdir=runs/overfit \
    --config.data.root=data/coco
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import universal


def get_config(variant: str = "swin_tiny,111") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50` or `swin_tiny`, and the layers of the three stages: `swin_tiny,111`, `r50,333`.
  """
  return universal.overfit(universal.proscale(variant))
