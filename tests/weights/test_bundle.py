"""Bundles: what is saved is what is loaded, and a bad file is explained."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from effseg_jax.errors import UserError
from effseg_jax.models import create_model
from effseg_jax.weights.bundle import load_bundle, read_bundle, save_bundle

FIELDS = {"num_classes": 3, "widths": [8, 16, 16, 16], "depths": [0, 1, 1, 1]}
CARD = {
  "model": {"name": "afformer_tiny", "fields": FIELDS},
  "task": {"name": "semantic", "classes": ["sky", "Straße", "tree"]},
  "licence": "CC0",
}


@pytest.fixture(scope="module")
def variables():
  model = create_model("afformer_tiny", **FIELDS)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), dict(shapes))


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.safetensors"


def _flat(tree):
  return flatten_dict(dict(tree), sep="/")


def test_float32_comes_back_bit_for_bit(variables, path):
  save_bundle(path, variables, CARD)
  bundle = load_bundle(path)
  assert bundle.card == CARD
  assert bundle.model.num_classes == 3
  loaded = _flat(bundle.variables)
  for name, array in _flat(variables).items():
    assert loaded[name].dtype == np.float32
    np.testing.assert_array_equal(loaded[name], array)


def test_half_is_half_the_size_and_three_digits(variables, path, tmp_path):
  whole = tmp_path / "whole.safetensors"
  save_bundle(whole, variables, CARD)
  save_bundle(path, variables, CARD, half=True)
  arrays, _ = read_bundle(path)
  stored = sum(array.nbytes for array in arrays.values())
  assert 2 * stored == sum(array.nbytes for array in read_bundle(whole)[0].values())
  loaded = _flat(load_bundle(path).variables)
  for name, array in _flat(variables).items():
    assert loaded[name].dtype == np.float32
    np.testing.assert_allclose(loaded[name], array, rtol=1e-3, atol=1e-6)


def test_what_half_cannot_hold_is_refused(path):
  with pytest.raises(UserError, match="params/scale is not finite as float16"):
    save_bundle(path, {"params": {"scale": np.array([1e6], np.float32)}}, CARD, half=True)
  assert not path.exists()


def test_arrays_of_the_device_are_taken(path):
  save_bundle(path, {"params": {"scale": jnp.arange(3.0)}}, CARD)
  np.testing.assert_array_equal(read_bundle(path)[0]["params/scale"], [0, 1, 2])


def test_a_missing_file(path):
  with pytest.raises(UserError, match="is missing; expected a bundle"):
    load_bundle(path)


@pytest.mark.parametrize("kept", [0, 5, 2000])
def test_a_damaged_file(variables, path, kept):
  save_bundle(path, variables, CARD)
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(UserError, match="is damaged or no"):
    load_bundle(path)


def test_a_file_without_a_card(path):
  save_file({"weight": np.zeros(3, np.float32)}, str(path))
  with pytest.raises(UserError, match="has no card"):
    load_bundle(path)


@pytest.mark.parametrize(
  "card", ["{", "[]", "{}", json.dumps({"model": {"name": "afformer_tiny"}})]
)
def test_a_broken_card(path, card):
  save_file({"weight": np.zeros(3, np.float32)}, str(path), metadata={"card": card})
  with pytest.raises(UserError, match="card"):
    load_bundle(path)


def test_an_unknown_model(variables, path):
  save_bundle(path, variables, {**CARD, "model": {"name": "afformer_tiney", "fields": {}}})
  with pytest.raises(UserError, match="Did you mean 'afformer_tiny'"):
    load_bundle(path)


def test_arrays_of_another_model(variables, path):
  fields = {**FIELDS, "num_classes": 5}
  save_bundle(path, variables, {**CARD, "model": {"name": "afformer_tiny", "fields": fields}})
  with pytest.raises(UserError, match="params/head/classify/kernel"):
    load_bundle(path)
  save_bundle(path, {"params": variables["params"]}, CARD)
  with pytest.raises(UserError, match="batch_stats/backbone"):
    load_bundle(path)
