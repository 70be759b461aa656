"""Official weights made from names and shapes, as the reference outputs' were."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np

_UNIT = ("query_feat.weight", "query_embed.weight", "level_embed", "level_embed.weight")
_PREDICTOR = "sem_seg_head.predictor.transformer_"


def tensor(name: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray:
  """The float32 tensor that belongs to a full official name.

  Args:
    name: as in the official state dict, `sem_seg_head.` and all.
    shape: in PyTorch's layout.
    salt: appended to the name before it is hashed.
  """
  generator = np.random.Generator(np.random.PCG64(zlib.crc32((name + salt).encode())))
  z = generator.standard_normal(shape).astype(np.float32)
  if name.endswith("running_var"):
    return np.abs(np.float32(0.1) * z) + np.float32(1)
  if name.endswith("running_mean"):
    return np.float32(0.1) * z
  if name.endswith("sampling_offsets.bias"):
    return np.float32(1.5) * z
  if name.endswith(_UNIT) or "queries_" in name:
    return z
  if len(shape) >= 2:
    return z * np.float32(_gain(name, shape) / math.sqrt(math.prod(shape[1:])))
  if name.endswith("pixel_decoder.layer_1.norm.bias"):
    return np.float32(0.1) * z - np.float32(0.7)
  return np.float32(1) + np.float32(0.1) * z if name.endswith("weight") else np.float32(0.1) * z


def _gain(name: str, shape: tuple[int, ...]) -> float:
  """Factor on top of `1 / sqrt(fan in)`."""
  backbone = name.startswith("backbone.") and len(shape) == 4
  if backbone and name.endswith((".conv1.weight", ".conv2.weight")):
    return math.sqrt(2)
  if name.startswith(_PREDICTOR):
    gains = {"in_proj_weight": 2, "out_proj.weight": 0.2, "linear2.weight": 0.25}
    return next((gain for end, gain in gains.items() if name.endswith(end)), 1)
  return 1


def tensors(shapes: Mapping[str, tuple[int, ...]], salt: str = "") -> dict[str, np.ndarray]:
  """Official name -> tensor."""
  return {name: tensor(name, tuple(shape), salt) for name, shape in shapes.items()}
