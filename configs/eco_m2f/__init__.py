r"""ECO-M2F (Yao et al., 2024; arXiv 2404.15244): training the exits (step A).

Its code was not released; the recipe is Mask2Former's with an exit drawn in each step. Afterwards
tools/train_gate.py measures the exits and trains the gate (steps B and C).
"""

from __future__ import annotations

import functools

from effseg_jax.configs import universal
from effseg_jax.configs.tables import Row

_row = functools.partial(Row, model=universal.eco_m2f)

EXPERIMENTS = {
  "coco_panoptic": _row(
    universal.coco_panoptic,
    variant="swin_tiny",
    variants="`r50` or `swin_tiny`",
    about="""ECO-M2F on COCO panoptic (Yao et al., 2024; arXiv 2404.15244): training the exits.

Published, Swin-T: beta 0.0005 52.06 PQ at 202.4 GFLOPs, beta 0.02 50.79 PQ at 181.6. Step A's code
was not released; the recipe is Mask2Former's with an exit drawn in each step. Measured here: not
trained. Hardware of the recipe: 8 V100, global batch 16. Afterwards tools/train_gate.py measures
the exits and trains the gate (steps B and C).
Start from Mask2Former's own weights, or from a backbone pretrained on ImageNet:
  --config.init_from=FILE

  effseg train --config=eco_m2f/coco_panoptic:swin_tiny --workdir=runs/eco \\
    --config.data.root=data/coco --config.init_from=swin_tiny_patch4_window7_224.pth
  python tools/train_gate.py --config=eco_m2f/coco_panoptic:swin_tiny --beta=0.0005 \\
    --config.data.root=data/coco --checkpoint=runs/eco --output=eco.safetensors
""",
  ),
  "synthetic": _row(
    universal.synthetic,
    variant="r50",
    variants="`r50` (in fact a ResNet-18) or `swin_tiny` (a tenth of it)",
    about="""ECO-M2F on the embedded scenes: training the exits (step A) without a download.

A small model (ResNet-18, 64 features, 30 queries) from random weights.
Measured here: 55.0 PQ after all layers, 54.2 after two (docs/results.md), in a quarter of an hour
on one CPU core, and two minutes for the gate.

  effseg train --config=eco_m2f/synthetic --workdir=runs/eco
  python tools/train_gate.py --config=eco_m2f/synthetic --checkpoint=runs/eco --beta=0.02 \\
    --output=eco.safetensors
""",
  ),
}
