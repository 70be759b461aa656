"""The mesh and the placement rules."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from effseg_jax.errors import UserError
from effseg_jax.training import sharding


def test_minus_one_takes_the_devices_that_are_left():
  mesh = sharding.make_mesh({"data": -1, "fsdp": 2, "model": 1})
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 1}


@pytest.mark.parametrize("axes", [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1)])
def test_a_mesh_that_does_not_fit_says_so(axes):
  with pytest.raises(UserError, match="mesh data="):
    sharding.make_mesh(dict(zip(sharding.AXES, axes, strict=True)))


def test_rules_place_parameters_and_their_moments_alike():
  mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "model": 2})
  leaf = jax.ShapeDtypeStruct((64, 96), jnp.float32)
  tree = {
    "params": {"mlp": leaf, "odd": leaf},
    "mu": {"mlp": leaf},
    "small": leaf.update(shape=(8,)),
  }
  rules = (("mlp", (None, "model")), ("odd", "replicate"), (".*", "fsdp"))
  specs = jax.tree.map(lambda s: s.spec, sharding.tree_shardings(tree, rules, mesh))
  assert specs["params"]["mlp"] == specs["mu"]["mlp"] == P(None, "model")
  assert specs["params"]["odd"] == P() == specs["small"]
  assert sharding.tree_shardings({"w": leaf}, rules, mesh)["w"].spec == P(None, "fsdp")


@pytest.mark.parametrize("placement", ["fspd", ("model",), (None, "data", None)])
def test_an_impossible_placement_names_the_parameter(placement):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 1, "model": 1})
  leaf = jax.ShapeDtypeStruct((6, 6), jnp.float32)
  with pytest.raises(UserError, match=r"mesh\.rules.*head/kernel"):
    sharding.tree_shardings({"head": {"kernel": leaf}}, (("head", placement),), mesh)


def test_a_batch_size_that_cannot_be_cut_says_what_is_needed():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})
  sharding.check_batch_size(8, mesh, "train.batch_size")
  with pytest.raises(UserError, match=r"train\.batch_size is 6; expected a multiple of 4"):
    sharding.check_batch_size(6, mesh, "train.batch_size")
  sharding.check_batch_size(8, mesh, "train.batch_size", accumulate=2)
  with pytest.raises(UserError, match=r"multiple of 16: .* devices times train\.accumulate=4"):
    sharding.check_batch_size(8, mesh, "train.batch_size", accumulate=4)
