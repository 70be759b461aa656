r"""Mask2Former (Cheng et al., CVPR 2022; arXiv 2112.01527): the official recipes."""

from __future__ import annotations

import functools

from effseg_jax.configs import universal
from effseg_jax.configs.tables import FULL_SIZE, Row

_row = functools.partial(
  Row, model=universal.mask2former, variant="r50", variants="`r50` or `swin_tiny`"
)

EXPERIMENTS = {
  "coco_panoptic": _row(
    universal.coco_panoptic,
    about=f"""Mask2Former on COCO panoptic (Cheng et al., CVPR 2022; arXiv 2112.01527).

The official recipe. Published: R50 51.9 PQ, 41.7 AP, 61.7 mIoU; Swin-T 53.2, 43.3, 63.2. Measured
here: not trained.
{FULL_SIZE}
  effseg train --config=mask2former/coco_panoptic:r50 --workdir=runs/mask2former \\
    --config.data.root=data/coco --config.init_from=R-50.pkl
""",
  ),
  "coco_instances": _row(
    universal.coco_instances,
    about=f"""Mask2Former on COCO instances (Cheng et al., CVPR 2022): the official recipe.

Measured here: not trained.
{FULL_SIZE}
  effseg train --config=mask2former/coco_instances:r50 --workdir=runs/instances \\
    --config.data.root=data/coco --config.init_from=R-50.pkl
""",
  ),
  "ade20k_semantic": _row(
    universal.ade20k_semantic,
    about=f"""Mask2Former on ADE20K, 150 classes (Cheng et al., CVPR 2022): the official recipe.

Published, one scale: R50 47.2 mIoU, Swin-T 47.7. Measured here: not trained.
{FULL_SIZE}
  effseg train --config=mask2former/ade20k_semantic:r50 --workdir=runs/ade20k \\
    --config.data.root=data/ADEChallengeData2016 --config.init_from=R-50.pkl
""",
  ),
  "ade20k_panoptic": _row(
    universal.ade20k_panoptic,
    about=f"""Mask2Former on ADE20K panoptic, 100 + 50 classes (Cheng et al., CVPR 2022).

The official recipe. Published: R50 39.7 PQ, 26.5 AP, 46.1 mIoU. Measured here: not trained.
{FULL_SIZE}
  effseg train --config=mask2former/ade20k_panoptic:r50 --workdir=runs/ade20k \\
    --config.data.root=data/ADEChallengeData2016 --config.init_from=R-50.pkl
""",
  ),
  "cityscapes_panoptic": _row(
    universal.cityscapes_panoptic,
    about=f"""Mask2Former on Cityscapes panoptic (Cheng et al., CVPR 2022): the official recipe.

Published: R50 62.1 PQ, 37.3 AP, 77.5 mIoU; Swin-T 63.9, 39.1, 80.5. Measured here: not trained. AP
is COCO's here, not that of Cityscapes' own tool.
{FULL_SIZE}
  effseg train --config=mask2former/cityscapes_panoptic:r50 --workdir=runs/cityscapes \\
    --config.data.root=data/cityscapes --config.init_from=R-50.pkl
""",
  ),
}
