"""AVESFormer on AVSBench-semantic (AVSS): 71 classes, clips of five or ten frames.

Published: M_J 31.2 (arXiv 2408.01708); AVSegFormer-R50 24.9, TPAVI-R50 20.2. Measured here: not
trained on the real benchmark, which is behind a request form.

Cross-entropy over the supervised frames. Training clips are resized by their short side and their
centre is cut out; clips of evaluation are stretched to the size, as in the reference.

  effseg train --config=avesformer/avss:r50 --workdir=runs/avss --config.data.root=DIR
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import audio_visual


def get_config(variant: str = "r50") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `r50`, `r18`, `pvt_v2_b2`, `lite` or `r50_avsegformer`.
  """
  epochs = 150 if variant == "lite" else 30  # lite trains on one frame of a clip at a time
  config = audio_visual.avsbench("avss", variant, epochs=epochs, clips=8498, mask_loss="dice")
  if config.data.augment.fit == "stretch":
    config.data.augment.fit = "centre"
  return config
