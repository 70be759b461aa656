"""PRO-SCALE on Cityscapes panoptic, 8 + 11 classes, by Mask2Former's recipe.

Mask2Former itself, published: R50 62.1 PQ, 37.3 AP, 77.5 mIoU; Swin-T 63.9, 39.1, 80.5. Measured
here: not trained. AP is COCO's here, not that of Cityscapes' own tool.
Hardware of the recipe: 8 V100, global batch 16, float16 but for the pixel decoder. On TPUs and GPUs
add --config.model.dtype=bfloat16; sampling, softmax and losses stay float32.
Start from a backbone pretrained on ImageNet (Swin-T or ResNet-50 in their official files):
  --config.init_from=FILE

  python train.py --config=configs/proscale/cityscapes_panoptic.py:swin_tiny,333 \
    --workdir=runs/cityscapes --config.data.root=data/cityscapes \
    --config.init_from=swin_tiny_patch4_window7_224.pth
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import universal


def get_config(variant: str = "swin_tiny,333") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50` or `swin_tiny`, and the layers of the three stages: `swin_tiny,333`, `r50,111`.
  """
  return universal.cityscapes_panoptic(universal.proscale(variant))
