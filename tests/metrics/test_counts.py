"""Counting on devices: both forms agree, need little memory and leave a sharded batch in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.metrics.segmentation import confusion_counts
from effseg_jax.ops.backend import target_platform
from effseg_jax.training import sharding

PLATFORMS = ("cpu", "gpu", "tpu")


@functools.cache
def jitted(platform, num_classes, ignore_label, **options):
  """A function of its own for each platform, since jit does not know of that choice."""

  def count(prediction, label, weight):
    with target_platform(platform):
      return confusion_counts(prediction, label, num_classes, ignore_label, weight)

  return jax.jit(count, **options)


def make_case(num_classes, shape, ignore_label, seed=0):
  rng = np.random.default_rng(seed)
  prediction = rng.integers(0, num_classes, shape).astype(np.int32)
  label = rng.integers(0, num_classes, shape).astype(np.int32)
  label[rng.random(shape) < 0.2] = ignore_label
  return prediction, label, (np.arange(shape[0]) % 3 != 1).astype(np.float32)


def expected(prediction, label, weight, num_classes, ignore_label):
  counted = (label != ignore_label) & (weight > 0).reshape(-1, *[1] * (label.ndim - 1))
  pairs = label[counted].astype(np.int64) * num_classes + prediction[counted]
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
  ("num_classes", "shape", "ignore_label"),
  [
    (11, (3, 7, 13), 255),
    (171, (2, 83, 101), 255),  # more pixels than one strip of the TPU's form takes
    (256, (5, 9), 255),  # the ignored label is one of the class numbers
    (40, (16, 1), -1),
    (1, (2, 4, 4), 255),
  ],
)
def test_counts_equal_numpy(platform, num_classes, shape, ignore_label):
  case = make_case(num_classes, shape, ignore_label)
  found = jitted(platform, num_classes, ignore_label)(*case)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, expected(*case, num_classes, ignore_label))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_one_cell_can_hold_more_than_float32_counts(platform):
  """17 million pixels in one cell: sums that pass through float32 stop at 2^24."""
  shape = (1, 2**24 + 3)
  zeros = jax.ShapeDtypeStruct(shape, jnp.int32)
  count = jitted(platform, 2, 255)
  program = count.lower(zeros, zeros, jax.ShapeDtypeStruct((1,), jnp.float32)).compile()
  labels = np.zeros(shape, np.int32)
  assert int(program(labels, labels, np.ones(1, np.float32))[0, 0]) == 2**24 + 3


@pytest.mark.parametrize("platform", PLATFORMS)
def test_memory_does_not_grow_with_batch_and_squared_classes(platform):
  batch, num_classes = 256, 1000
  labels = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
  weights = jax.ShapeDtypeStruct((batch,), jnp.float32)
  program = jitted(platform, num_classes, -1).lower(labels, labels, weights).compile()
  one_matrix = 4 * num_classes**2
  assert program.memory_analysis().temp_size_in_bytes < 4 * one_matrix


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_sharded_batch_is_reduced_and_not_gathered(platform):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})
  cut, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  case = make_case(11, (8, 16, 24), 255, seed=1)
  count = jitted(platform, 11, 255, in_shardings=cut, out_shardings=everywhere)
  program = count.lower(*case).compile()
  assert "all-reduce" in program.as_text()
  assert "all-gather" not in program.as_text()
  found = program(*(jax.device_put(x, cut) for x in case))
  np.testing.assert_array_equal(found, expected(*case, 11, 255))
