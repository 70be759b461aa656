"""Selecting the smallest values, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops import backend
from effseg_jax.ops.select import smallest, smallest_by_sort


@pytest.mark.parametrize("count", [1, 7, 40])
def test_equals_sorting(count):
  rng = np.random.default_rng(0)
  values = np.abs(rng.standard_normal((2, 3, 40))).astype(np.float32)
  values[0] = np.round(values[0])  # many are equal, and some are 0
  values[1, 0] = 3e38
  expected = np.sort(smallest_by_sort(jnp.asarray(values), count), axis=-1)
  np.testing.assert_array_equal(jax.jit(smallest, static_argnums=1)(values, count), expected)
  with backend.target_platform("tpu"):
    np.testing.assert_array_equal(np.sort(smallest(values, count), axis=-1), expected)
