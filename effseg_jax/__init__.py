"""Efficient segmentation transformers in JAX: AFFormer, PRO-SCALE on Mask2Former, AVESFormer.

The public face is `list_models`, `create_model` and `load_weights`. Importing this package imports
neither jax nor flax; the first call does.
"""

from __future__ import annotations

from effseg_jax.errors import UserError
from effseg_jax.models import create_model, list_models
from effseg_jax.weights import load_weights

__all__ = ["UserError", "create_model", "list_models", "load_weights"]
__version__ = "0.2.0"
