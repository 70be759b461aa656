"""Sheets of examples of every task."""

from __future__ import annotations

import numpy as np
import pytest

from effseg_jax import configs
from effseg_jax.cli import browse as browse_dataset


@pytest.mark.parametrize(
  ("name", "examples"),
  [("proscale/synthetic", 2048), ("avesformer/synthetic", 1024), ("afformer/synthetic", 2048)],
)
def test_augmented_examples_are_drawn(name, examples):
  config = configs.load(name)
  sheet, line = browse_dataset.browse(config, count=2, seed=1)
  assert sheet.dtype == np.uint8 and sheet.ndim == 3 and sheet.std() > 20
  assert f"2 of {examples:,} examples" in line
  other, _ = browse_dataset.browse(config, count=2, seed=2)
  assert other.shape != sheet.shape or (other != sheet).any()
