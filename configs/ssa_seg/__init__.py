"""SSA-Seg's classifier on AFFormer; what its recipes share."""

from __future__ import annotations

from ml_collections import ConfigDict


def with_classifier(config: ConfigDict) -> ConfigDict:
  """An experiment of AFFormer with the adaptive classifier and its losses."""
  config.model.head = "ssa"
  config.task.name = "semantic_ssa"
  return config
