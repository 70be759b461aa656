r"""PRO-SCALE (Aich et al., ICLR 2025; arXiv 2404.14657), by Mask2Former's recipes.

The training code of PRO-SCALE was not released; its configuration names Mask2Former's recipe.
"""

from __future__ import annotations

import functools

from effseg_jax.configs import universal
from effseg_jax.configs.tables import FULL_SIZE, Row

_row = functools.partial(
  Row,
  model=universal.proscale,
  variant="swin_tiny,333",
  variants="`r50` or `swin_tiny`, and the layers of the three stages: `swin_tiny,333`, `r50,111`",
)

EXPERIMENTS = {
  "coco_panoptic": _row(
    universal.coco_panoptic,
    about=f"""PRO-SCALE on COCO panoptic (Aich et al., ICLR 2025; arXiv 2404.14657).

Published (3,3,3): R50 51.44 PQ, Swin-T 52.88 PQ. Its training code was not released; the recipe is
Mask2Former's, as its configuration says. Measured here: not trained in full (docs/results.md lists
what was).
{FULL_SIZE}
  effseg train --config=proscale/coco_panoptic:swin_tiny,333 --workdir=runs/proscale \\
    --config.data.root=data/coco --config.init_from=swin_tiny_patch4_window7_224.pth

On a laptop: --config.train.batch_size=1 --config.model.remat=True. Measured here with jax 0.11 on
one shared CPU core: 11 GB until the second step, compilation included, and 18 s a step; the
evaluation that follows was not run to its end.
""",
  ),
  "coco_instances": _row(
    universal.coco_instances,
    about=f"""PRO-SCALE on COCO instances, by Mask2Former's recipe.

Not published for this model. Measured here: not trained.
{FULL_SIZE}
  effseg train --config=proscale/coco_instances:swin_tiny,333 --workdir=runs/instances \\
    --config.data.root=data/coco --config.init_from=swin_tiny_patch4_window7_224.pth
""",
  ),
  "folder_instances": _row(
    universal.folder_instances,
    about=f"""PRO-SCALE on instances of your own (docs/your_data.md).

The folder is what effseg import writes: annotations/instances_{{train,val}}.json beside the folders
train and val. Adjust `num_steps` to the number of pictures. Measured here: not trained.
{FULL_SIZE}
  effseg import --from=yolo --input=export --output=my_objects
  effseg train --config=proscale/folder_instances:r50,111 --workdir=runs/objects \\
    --config.data.root=my_objects --config.init_from=R-50.pkl
""",
  ),
  "ade20k_semantic": _row(
    universal.ade20k_semantic,
    about=f"""PRO-SCALE on ADE20K, 150 classes, by Mask2Former's recipe.

Mask2Former itself, published: R50 47.2 mIoU, Swin-T 47.7. Measured here: not trained.
{FULL_SIZE}
  effseg train --config=proscale/ade20k_semantic:swin_tiny,333 --workdir=runs/ade20k \\
    --config.data.root=data/ADEChallengeData2016 \\
    --config.init_from=swin_tiny_patch4_window7_224.pth
""",
  ),
  "ade20k_panoptic": _row(
    universal.ade20k_panoptic,
    variant="r50,333",
    about=f"""PRO-SCALE on ADE20K panoptic, 100 + 50 classes, by Mask2Former's recipe.

Mask2Former itself, published: R50 39.7 PQ, 26.5 AP, 46.1 mIoU. Measured here: not trained.
{FULL_SIZE}
  effseg train --config=proscale/ade20k_panoptic:r50,333 --workdir=runs/ade20k \\
    --config.data.root=data/ADEChallengeData2016 --config.init_from=R-50.pkl
""",
  ),
  "cityscapes_panoptic": _row(
    universal.cityscapes_panoptic,
    about=f"""PRO-SCALE on Cityscapes panoptic, 8 + 11 classes, by Mask2Former's recipe.

Mask2Former itself, published: R50 62.1 PQ, 37.3 AP, 77.5 mIoU; Swin-T 63.9, 39.1, 80.5. Measured
here: not trained. AP is COCO's here, not that of Cityscapes' own tool.
{FULL_SIZE}
  effseg train --config=proscale/cityscapes_panoptic:swin_tiny,333 --workdir=runs/cityscapes \\
    --config.data.root=data/cityscapes --config.init_from=swin_tiny_patch4_window7_224.pth
""",
  ),
  "overfit": _row(
    universal.overfit,
    variant="swin_tiny,111",
    about="""PRO-SCALE overfits eight images of COCO: a check of everything from pixels to PQ.

The first eight training images, 49 segments of 23 classes, at 256 pixels; a model of 1.8 million
parameters (a narrow Swin Transformer, 64 features, 30 queries) from random weights.
Measured here (one CPU core, five minutes): 93.0 PQ on the same images, see docs/results.md.

  effseg train --config=proscale/overfit --workdir=runs/overfit --config.data.root=data/coco
""",
  ),
  "synthetic": _row(
    universal.synthetic,
    variant="r50,111",
    about="""PRO-SCALE on the embedded scenes: panoptic segmentation without a download.

A small model (`r50` is a ResNet-18 here; 64 features, 30 queries) from random weights.
Measured here: 59.9 PQ, 28.6 AP, 70.5 mIoU in 9 minutes on one CPU core (docs/results.md).

  effseg train --config=proscale/synthetic --workdir=runs/synthetic_panoptic
""",
  ),
}
