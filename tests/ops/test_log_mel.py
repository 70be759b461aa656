"""The front-end on the device equals the one in NumPy float64."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.input_pipeline import audio
from effseg_jax.ops import log_mel as ops

GOLDEN = Path(__file__).parents[1] / "golden" / "vggish.npz"

log_mel = jax.jit(ops.log_mel)


def test_constants():
  np.testing.assert_allclose(ops.mel_matrix(), audio.mel_matrix(), atol=1e-12)
  np.testing.assert_allclose(ops.hann_window(), audio.window(), atol=1e-14)


def test_reference_patches():
  with np.load(GOLDEN) as golden:
    found = log_mel(golden["waveform"].astype(np.float32) / 2**15)
    np.testing.assert_allclose(found, golden["log_mel"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [0, 399, 15_599, 15_600, 30_959, 31_111])
def test_every_length(samples):
  rng = np.random.default_rng(samples)
  # Loud, quiet and silent: the logarithm must hold in all of them.
  waves = rng.uniform(-1, 1, (3, samples)) * np.array([[1.0], [1e-4], [0.0]])
  found = log_mel(waves.astype(np.float32))
  expected = np.stack([audio.log_mel(wave.astype(np.float32)) for wave in waves])
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_any_leading_axes_and_narrow_inputs():
  wave = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 1, 15_600)).astype(np.float32)
  found = log_mel(jnp.asarray(wave, jnp.bfloat16))
  assert found.shape == (2, 1, 1, 96, 64)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[1, 0], log_mel(jnp.asarray(wave[1, 0], jnp.bfloat16)), atol=1e-5)
