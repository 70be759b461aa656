"""Weights in and out: official files, our own, and the names that connect them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def load_weights(
  model: Any, source: Any, partial: str | None = None, *, resize: bool = False
) -> Mapping[str, Any]:
  """Reads a model's weights; see `effseg_jax.weights.loading.load_weights`."""
  from effseg_jax import platform
  from effseg_jax.weights import loading

  platform.tune_host_malloc()
  return loading.load_weights(model, source, partial, resize=resize)
