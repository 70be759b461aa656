"""A semantic model of two convolutions, and pictures for it."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from effseg_jax.weights.bundle import Bundle

CLASSES = ("wall", "leaf", "sky")
PALETTE = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
EVALUATION = {
  "scale": (128, 96),
  "multiple": 32,
  "mode": "whole",
  "crop": (64, 64),
  "stride": (42, 42),
  "scales": (1.0,),
  "flip": False,
}


class Net(nn.Module):
  """Two convolutions, the second as wide as a window: its result depends on what it sees."""

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.relu(nn.Conv(8, (8, 8), strides=8)(images))
    x = x + x.mean(axis=(1, 2), keepdims=True)
    return 5.0 * nn.Conv(len(CLASSES), (3, 3))(x)


def make_bundle(**inference):
  net = Net()
  variables = net.init(jax.random.PRNGKey(0), np.zeros((1, 64, 64, 3), np.float32))
  task = {"name": "semantic", "classes": list(CLASSES), "palette": [list(c) for c in PALETTE]}
  card = {"model": {"name": "net", "fields": {}}, "task": task}
  card["inference"] = {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in (EVALUATION | inference).items()
  }
  return Bundle(net, variables, card)


def picture(rows, cols, seed=0):
  """Uneven light and noise, so that every class occurs."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
  smooth = np.asarray(Image.fromarray(coarse).resize((cols, rows), Image.Resampling.BICUBIC))
  return np.clip(smooth + rng.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)
