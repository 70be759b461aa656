"""CamVid by leaving one sequence out: train on two sequences of `train`, evaluate on the third.

Settings are chosen by the mean of the three folds, never by val or test. One folder for each
setting, and a table of all of them:

  effseg sweep --sweep=camvid_folds --workdir=runs/folds/plain \
    --config.data.root=data/camvid
  effseg sweep --sweep=camvid_folds --workdir=runs/folds/classmix \
    --config.data.root=data/camvid --config.data.augment.mix=classmix
  effseg folds runs/folds/plain runs/folds/classmix
"""

from __future__ import annotations

from effseg_jax.configs import sweeps

SEQUENCES = ("0001TP", "0006R0", "0016E5")


def get_sweep() -> sweeps.Sweep:
  """A fold for each sequence, which is the one evaluated on."""
  return sweeps.Sweep(
    "afformer/camvid:tiny",
    [
      {
        "data.options.sequences": ",".join(name for name in SEQUENCES if name != left_out),
        "eval.split": "rest",
      }
      for left_out in SEQUENCES
    ],
  )
