"""SegFormer's recipes; what they share."""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults, semantic


def model(variant: str) -> ConfigDict:
  """The model `segformer_<variant>`, `b0` to `b5`, with the recipe's stochastic depth."""
  return semantic.network(f"segformer_{variant}", drop_path=0.1)


def optimize(config: ConfigDict) -> ConfigDict:
  """Sets the recipe's optimizer: ten times the rate for the head, no decay of the encoder's norms.

  The head's batch normalisation has both, as only one of the official rules applies to it.
  """
  config.optimizer = defaults.adamw(learning_rate=6e-5, weight_decay=0.01)
  config.optimizer.lr_rules = ((r"^head/", 10.0),)
  config.optimizer.decay_rules = ((r"^backbone/.*norm", 0.0),)
  config.schedule = defaults.poly(warmup_steps=1500)
  return config
