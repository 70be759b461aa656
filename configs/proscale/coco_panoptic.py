"""PRO-SCALE on COCO panoptic (Aich et al., ICLR 2025; arXiv 2404.14657).

Published (3,3,3): R50 51.44 PQ, Swin-T 52.88 PQ. Its training code was not released; the recipe is
Mask2Former's, as its configuration says. Measured here: not trained in full (docs/results.md has
what was).
Hardware of the recipe: 8 V100, global batch 16, float16 but for the pixel decoder. On TPUs and GPUs
add --config.model.dtype=bfloat16; sampling, softmax and losses stay float32.
Start from a backbone pretrained on ImageNet (Swin-T or ResNet-50 in their official files):
  --config.init_from=FILE

  python train.py --config=configs/proscale/coco_panoptic.py:swin_tiny,333 --workdir=runs/proscale \
    --config.data.root=data/coco --config.init_from=swin_tiny_patch4_window7_224.pth

To try it on a laptop: --config.train.batch_size=1 --config.model.remat=True. Measured here with jax
0.11 on a CPU core that was shared: 11 GB until the second step, compiling included, and 18 s a
step; the evaluation that follows was not run to its end.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import universal


def get_config(variant: str = "swin_tiny,333") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50` or `swin_tiny`, and the layers of the three stages: `swin_tiny,333`, `r50,111`.
  """
  return universal.coco_panoptic(universal.proscale(variant))
