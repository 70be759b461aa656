"""A random search on CamVid: sixteen draws of learning rate, decay and scale jitter.

Measured here: not run.

  effseg sweep --sweep=afformer_random --config.data.root=data/camvid
"""

from __future__ import annotations

from effseg_jax.configs import sweeps


def get_sweep() -> sweeps.Sweep:
  """A quarter of the recipe's length each."""
  draws = {
    "optimizer.learning_rate": sweeps.log_uniform(3e-4, 6e-3),
    "optimizer.weight_decay": sweeps.log_uniform(5e-3, 1e-1),
    "data.augment.ratio": sweeps.one_of(((0.5, 2.0), (0.75, 2.25), (1.0, 1.5))),
  }
  shorter = [{"train.num_steps": 600, "schedule.warmup_steps": 50}]
  return sweeps.Sweep("afformer/camvid:tiny", sweeps.combined(shorter, sweeps.drawn(16, draws)))
