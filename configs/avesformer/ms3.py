"""AVESFormer on AVSBench's multi-source subset (MS3): 296 / 64 / 64 clips.

Published: M_J 57.9 (arXiv 2408.01708); AVSegFormer-R50 49.5, TPAVI-R50 47.9. Measured here: not
trained on the real benchmark, which is behind a request form; docs/results.md has semi-synthetic
clips in its layout.

Every frame has a mask. Others start from their S4 model: `--config.init_from=runs/s4`.

  effseg train --config=avesformer/ms3:r50 --workdir=runs/ms3 --config.data.root=DIR
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import audio_visual


def get_config(variant: str = "r50") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50`, `r18`, `pvt_v2_b2`, `lite` or `r50_avsegformer`.
  """
  lite = variant == "lite"  # which trains on one frame of a clip at a time
  config = audio_visual.avsbench(
    "ms3",
    variant,
    epochs=300 if lite else 60,
    clips=296,
    mask_loss="bce_dice" if lite else "dice",
  )
  if variant.endswith("avsegformer"):
    config.data.augment.size = config.eval.size = (512, 512)
  return config
