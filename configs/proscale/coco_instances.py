"""PRO-SCALE on COCO instances, by Mask2Former's recipe.

Not published for this model. Measured here: not trained.
Hardware of the recipe: 8 V100, global batch 16, float16 but for the pixel decoder. On TPUs and GPUs
add --config.model.dtype=bfloat16; sampling, softmax and losses stay float32.
Start from a backbone pretrained on ImageNet (Swin-T or ResNet-50 in their official files):
  --config.init_from=FILE

  python train.py --config=configs/proscale/coco_instances.py:swin_tiny,333 \
    --workdir=runs/instances --config.data.root=data/coco \
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
  return universal.coco_instances(universal.proscale(variant))
