"""Sine codes against the official ones, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from effseg_jax.ops.position import sine_position

GOLDEN = Path(__file__).parents[1] / "golden"


def test_normalised_codes_are_the_official_ones():
  with np.load(GOLDEN / "pixel_decoder.npz") as golden:
    expected = golden["position"][0].transpose(1, 2, 0)
  np.testing.assert_allclose(sine_position(5, 9, 256), expected, atol=2e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_codes_by_hand(normalize):
  rows, cols, channels = 3, 4, 8
  found = sine_position(rows, cols, channels, normalize=normalize)
  assert found.shape == (rows, cols, channels)
  for i in range(rows):
    for j in range(cols):
      y, x = i + 1, j + 1
      if normalize:
        y, x = 2 * np.pi * y / (rows + 1e-6), 2 * np.pi * x / (cols + 1e-6)
      expected = [f(p / length) for p in (y, x) for length in (1, 100) for f in (np.sin, np.cos)]
      np.testing.assert_allclose(found[i, j], expected, atol=1e-6)
