"""AVESFormer on AVSBench's single-source subset (S4): 3,452 / 740 / 740 clips, 23 categories.

Published: M_J 79.9 (arXiv 2408.01708); AVSegFormer-R50 76.5, TPAVI-R50 72.8. Measured here: not
trained on the real benchmark, which is behind a request form; docs/results.md has semi-synthetic
clips in its layout.

Only the first frame of a training clip has a mask. `r50` starts from ImageNet's ResNet-50 and
VGGish's official weights, `lite` from nothing or from EfficientNet-Lite0 (docs/results.md);
`r50_avsegformer` is AVSegFormer's recipe.

  effseg train --config=avesformer/s4:r50 --workdir=runs/s4 --config.data.root=DIR
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import audio_visual


def get_config(variant: str = "r50") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50`, `r18`, `pvt_v2_b2`, `lite` or `r50_avsegformer`.
  """
  loss = "bce_dice" if variant == "lite" else "dice"
  config = audio_visual.avsbench("s4", variant, epochs=30, clips=3452, mask_loss=loss)
  if variant.endswith("avsegformer"):
    config.data.augment.size = config.eval.size = (512, 512)
  return config
