"""EfficientViT's recipes; what they share.

The authors never released how they trained segmentation: AdamW, cosine decay, a backbone pretrained
on ImageNet and a head from scratch are all that the paper says. Everything else is AFFormer's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from effseg_jax.configs import defaults


def optimize(config: ConfigDict, learning_rate: float) -> ConfigDict:
  """Sets AdamW with cosine decay, and no weight decay of norms and biases, as on ImageNet.

  Args:
    config: of `configs.semantic`.
    learning_rate: the highest.
  """
  config.optimizer = defaults.adamw(learning_rate=learning_rate, weight_decay=0.01)
  config.optimizer.decay_rules = ((r"(bias|scale)$", 0.0),)
  config.schedule = ConfigDict(
    {"name": "cosine", "end": 0.0, "warmup_steps": 1500, "warmup_ratio": 1e-6}
  )
  config.eval.interpolation = "bicubic"  # of images and logits, as the authors evaluate
  return config
