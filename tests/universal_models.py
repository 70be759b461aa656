"""Universal models for tests: small ones, and the official ones with weights made from names."""

from __future__ import annotations

from typing import Any

import numpy as np

from effseg_jax import create_model, load_weights
from effseg_jax.models.mask2former import Mask2Former
from effseg_jax.weights import mask2former, table
from effseg_jax.weights.loading import variable_shapes
from tests import official_weights

# Fields that make any of the models small, and those of its backbone and its pixel decoder. With
# fewer than 64 channels the CPU compiler writes the matrix products out: it takes thrice as long.
SMALL = {
  "num_classes": 5,
  "num_queries": 7,
  "features": 64,
  "heads": 4,
  "encoder_mlp_features": 64,
  "decoder_mlp_features": 64,
  "decoder_layers": 3,
}
SMALL_BACKBONE = {
  "r50": {"depth": 18},
  "swin_tiny": {
    "backbone_features": 8,
    "backbone_depths": (1, 1, 2, 1),
    "backbone_heads": (1, 2, 2, 4),
    "window": 4,
  },
}
SMALL_ENCODER = {
  "mask2former": {"encoder_layers": 1},
  "proscale": {"proscale_layers": (1, 1, 1)},
  "eco_m2f": {"encoder_layers": 3},
}


def small_model(name: str, **fields: Any) -> Mask2Former:
  """A model of the catalogue with few layers and channels."""
  encoder = next(kind for kind in SMALL_ENCODER if name.startswith(f"{kind}_"))
  backbone = name.removeprefix(f"{encoder}_")
  return create_model(
    name, **{**SMALL, **SMALL_BACKBONE[backbone], **SMALL_ENCODER[encoder], **fields}
  )


def official_shapes(model: Mask2Former) -> dict[str, tuple[int, ...]]:
  """Official name -> shape in PyTorch's layout, in the official order, without buffers."""
  shapes = variable_shapes(model)
  return {
    row.name: table.official_shape(shapes[row.path], row.layout)
    for row in mask2former.rows(model, shapes)
    if row.path
  }


def official_tensors(model: Mask2Former) -> dict[str, np.ndarray]:
  """Official name -> tensor, as the reference outputs were made with."""
  return official_weights.tensors(official_shapes(model))


def official_variables(model: Mask2Former) -> dict[str, Any]:
  """The same as a model's variables."""
  return load_weights(model, official_tensors(model))


def nhwc(x: np.ndarray) -> np.ndarray:
  """(B, C, H, W) -> (B, H, W, C)."""
  return np.ascontiguousarray(np.transpose(x, (0, 2, 3, 1)))
