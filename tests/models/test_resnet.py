"""ResNet: sizes, counts, and a normalisation that never moves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError
from effseg_jax.models.backbones.resnet import FrozenBatchNorm, ResNet

# Of PyTorch's model zoo, without the classifier.
PARAMETERS = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032}


def shapes_of(model, size=(64, 64)):
  return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *size, 3))), jax.random.key(0))


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameter_counts(depth):
  trained = sum(x.size for x in jax.tree.leaves(shapes_of(ResNet(depth, "bn"))["params"]))
  assert trained == PARAMETERS[depth]
  frozen = shapes_of(ResNet(depth))
  convolutions = jax.tree.leaves(frozen["params"])
  assert all(x.ndim == 4 for x in convolutions)  # what is frozen is no parameter
  vectors = sum(x.size for x in jax.tree.leaves(frozen["batch_stats"]))
  assert sum(x.size for x in convolutions) + vectors // 2 == PARAMETERS[depth]


@pytest.mark.parametrize(("depth", "widths"), [
  (18, (64, 128, 256, 512)), (50, (256, 512, 1024, 2048)),
])  # fmt: skip
def test_sizes_of_the_features_are_rounded_up(depth, widths):
  model = ResNet(depth)
  outputs = jax.eval_shape(
    lambda key, x: model.init_with_output(key, x)[0], jax.random.key(0), jnp.zeros((2, 70, 101, 3))
  )
  grids = ((18, 26), (9, 13), (5, 7), (3, 4))
  assert {name: x.shape for name, x in outputs.items()} == {
    f"res{i + 2}": (2, *grid, width)
    for i, (grid, width) in enumerate(zip(grids, widths, strict=True))
  }


def test_frozen_normalisation_is_the_formula_and_never_moves():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 5, 4)).astype(np.float32)
  stats = {k: np.abs(rng.standard_normal(4)).astype(np.float32) for k in ("scale", "mean", "var")}
  variables = {"batch_stats": {**stats, "bias": np.arange(4, dtype=np.float32)}}
  outputs, updates = FrozenBatchNorm().apply(variables, x, True, mutable=["batch_stats"])
  expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * stats["scale"] + np.arange(4)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, updates, variables)


def test_training_changes_statistics_of_bn_alone():
  x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
  for norm, moves in (("frozen_bn", False), ("bn", True)):
    model = ResNet(18, norm)
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes_of(model))
    updates = jax.jit(lambda v, m=model: m.apply(v, x, train=True, mutable=["batch_stats"])[1])(
      variables
    )
    same = jax.tree.map(np.array_equal, variables["batch_stats"], updates["batch_stats"])
    assert set(jax.tree.leaves(same)) == {not moves}


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_bfloat16_keeps_parameters_and_statistics(norm):
  model = ResNet(50, norm, dtype=jnp.bfloat16)
  variables = shapes_of(model)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  outputs = jax.eval_shape(model.apply, variables, jnp.zeros((1, 64, 64, 3)))
  assert {x.dtype for x in outputs.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(("fields", "hint"), [({"depth": 51}, "18, 34, 50"), (
  {"norm": "frozenbn"}, "Did you mean 'frozen_bn'")])  # fmt: skip
def test_wrong_fields_are_named(fields, hint):
  with pytest.raises(UserError, match=hint):
    shapes_of(ResNet(**fields))
