"""Learning rate and decay of AFFormer-tiny on the embedded scenes: eight runs, nothing to fetch.

Measured here: not run in full.

  effseg sweep --sweep=afformer_lr
"""

from __future__ import annotations

from effseg_jax.configs import sweeps


def get_sweep() -> sweeps.Sweep:
  """Four learning rates, each with two decays."""
  return sweeps.Sweep(
    "afformer/synthetic:tiny",
    sweeps.product(
      {
        "optimizer.learning_rate": (5e-4, 1e-3, 2e-3, 4e-3),
        "optimizer.weight_decay": (0.01, 0.05),
      }
    ),
  )
