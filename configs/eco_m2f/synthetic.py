"""ECO-M2F on the embedded scenes: training the exits (step A) with no data to fetch.

A small model (ResNet-18, 64 features, 30 queries) from random weights.

Measured here: 55.0 PQ after all layers, 54.2 after two (docs/results.md), in a quarter of an hour
on one CPU core, and two minutes for the gate.

  python train.py --config=configs/eco_m2f/synthetic.py --workdir=runs/eco
  python tools/train_gate.py --config=configs/eco_m2f/synthetic.py --checkpoint=runs/eco \
    --beta=0.02 --output=eco.safetensors
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import universal


def get_config(variant: str = "r50") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50` (in fact a ResNet-18) or `swin_tiny` (a tenth of it).
  """
  return universal.synthetic(universal.eco_m2f(variant))
