"""ECO-M2F: reference outputs, exits per image, layers that are skipped, targets of the gate."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError
from effseg_jax.models.eco import EcoPixelDecoder, best_exits, gate_loss
from effseg_jax.models.pixel_decoder import LevelInputs
from effseg_jax.ops.backend import target_platform
from effseg_jax.weights.pixel_decoder import rows
from tests import official_weights, pixel_decoders
from tests.pixel_decoders import random_features

SMALL = {"layers": 3, "features": 32, "heads": 2, "points": 1, "mlp_features": 16}


@pytest.fixture(scope="module")
def references(shared):
  """Opens a reference output by name; these are not to be copied, so they may be absent."""
  folder = shared / "golden" / "proscale"
  if not folder.is_dir():
    pytest.skip("needs the reference outputs that are not to be copied")
  return lambda name: np.load(folder / f"{name}.npz")


@functools.cache
def compiled(decoder):
  """(variables, features) -> outputs, intermediates; the form for accelerators compiles sooner."""

  @jax.jit
  def run(variables, features):
    with target_platform("gpu"):
      return decoder.apply(variables, features, train=False, mutable=["intermediates"])

  return run


@pytest.mark.parametrize("number", [2, 3, 5])
def test_reference_outputs(references, number):
  golden = references(f"eco_pixdec_swint_exit{number}")
  features = pixel_decoders.features(golden)
  decoder = EcoPixelDecoder()
  variables = pixel_decoders.official_variables(decoder, features)
  outputs, state = compiled(decoder)(variables, features)
  found = state["intermediates"]
  assert int(found["exits"][0][0]) == int(golden["i_exit"]) == number
  np.testing.assert_allclose(found["gate_logits"][0], golden["gates"], atol=2e-5, rtol=1e-4)
  pixel_decoders.assert_outputs(outputs, golden)


def test_reference_outputs_of_the_gate(references):
  golden = references("eco_gate")
  name = "sem_seg_head.pixel_decoder.transformer.encoder.gt.head."
  weight = official_weights.tensor(f"{name}weight", (5, 256))
  logits = golden["x"].mean(1) @ weight.T + official_weights.tensor(f"{name}bias", (5,))
  np.testing.assert_allclose(logits, golden["gates"], atol=2e-5, rtol=1e-4)
  np.testing.assert_array_equal(golden["per_image_argmax"] + 2, golden["per_image_layers"])


def test_official_names(shared):
  path = shared / "specs" / "state_dict_shapes" / "eco_pixdec_shapes.json"
  listed = json.loads(path.read_text())
  channels = [listed[f"sem_seg_head.pixel_decoder.input_proj.{i}.0.weight"][1] for i in (2, 1, 0)]
  adapter = listed["sem_seg_head.pixel_decoder.adapter_1.weight"][1]
  features = random_features((64, 64), (adapter, *channels))
  decoder = EcoPixelDecoder()
  assert [row.name for row in rows(decoder)] == list(listed)
  made = pixel_decoders.official_variables(decoder, features)
  assert sum(x.size for x in jax.tree.leaves(made)) == sum(map(np.prod, listed.values()))


@pytest.fixture(scope="module")
def two():
  """Two images, and variables whose gate sends them through 3 and 2 layers."""
  features = random_features((64, 96), batch=2)
  variables = pixel_decoders.random_variables(EcoPixelDecoder(**SMALL), features)
  params = variables["params"]
  maps, _ = LevelInputs(32).apply({"params": params["inputs"]}, features)
  means = np.asarray(maps[0].mean((1, 2)))
  kernel = np.linalg.lstsq(means, np.asarray([[0, 1], [1, 0]], np.float32), rcond=None)[0]
  gate = {"kernel": kernel, "bias": np.zeros(2, np.float32)}
  return features, {"params": {**params, "gate": gate}}


def image(features, index):
  return {name: x[index : index + 1] for name, x in features.items()}


def assert_same(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_every_image_takes_its_own_exit(two):
  features, variables = two
  outputs, state = compiled(EcoPixelDecoder(**SMALL))(variables, features)
  np.testing.assert_array_equal(state["intermediates"]["exits"][0], [3, 2])
  for index, depth in enumerate((3, 2)):
    own = jax.tree.map(lambda x, i=index: x[i : i + 1], outputs)
    one = image(features, index)
    alone, _ = compiled(EcoPixelDecoder(**SMALL))(variables, one)
    fixed, _ = compiled(EcoPixelDecoder(**SMALL, fixed_exit=depth))(variables, one)
    assert_same(own, fixed)
    assert_same(alone, fixed)


def test_a_layer_that_no_image_needs_is_not_computed(two):
  """It is a branch of a conditional; outside of these, two layers are left."""
  features, variables = two
  one = image(features, 0)

  def text(decoder):
    return compiled(decoder).lower(variables, one).compile().as_text()

  assert text(EcoPixelDecoder(**SMALL)).count(" conditional(") == SMALL["layers"] - 2
  assert " conditional(" not in text(EcoPixelDecoder(**SMALL, fixed_exit=2))


def test_gradients_reach_the_layers_before_a_fixed_exit(two):
  features, variables = two

  @jax.jit
  def gradient(params):
    decoder = EcoPixelDecoder(**SMALL, fixed_exit=2)

    def loss(params):
      return jnp.sum(jnp.square(decoder.apply({"params": params}, features, train=True)[0]))

    with target_platform("gpu"):
      return jax.grad(loss)(params)

  slopes = gradient(variables["params"])
  reached = {name for name, tree in slopes.items() if any(x.any() for x in jax.tree.leaves(tree))}
  assert reached == {"inputs", "layer_0", "layer_1", "output"}


@pytest.mark.parametrize(("weights", "depth"), [((1.0, 0.0), 2), ((0.0, 1.0), 3)])
def test_training_draws_an_exit(two, weights, depth):
  features, variables = two
  own = {"dropout": jax.random.key(0)}

  @jax.jit
  def run(variables):
    decoder = EcoPixelDecoder(**SMALL, exit_weights=weights)
    with target_platform("gpu"):
      return decoder.apply(variables, features, train=True, mutable=["intermediates"], rngs=own)

  outputs, state = run(variables)
  assert_same(outputs, compiled(EcoPixelDecoder(**SMALL, fixed_exit=depth))(variables, features)[0])
  assert state["intermediates"]["exits"][0].tolist() == [depth, depth]


def test_exits_are_drawn_as_often_as_they_weigh(two):
  features, variables = two
  decoder = EcoPixelDecoder(**SMALL, exit_weights=(1.0, 3.0))

  def drawn(key):
    with target_platform("gpu"):
      state = decoder.apply(
        variables, features, train=True, mutable=["intermediates"], rngs={"dropout": key}
      )[1]
    return state["intermediates"]["exits"][0][0]

  found = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), 200))
  assert 0.65 < float(jnp.mean(found == 3)) < 0.85  # 0.75, and three standard deviations


def test_exit_weights_must_fit(two):
  features, variables = two
  with pytest.raises(UserError, match="exit_weights has 3 numbers; expected one for each of the 2"):
    EcoPixelDecoder(**SMALL, exit_weights=(1.0, 1.0, 1.0)).apply(variables, features, train=False)


@pytest.mark.parametrize("number", [1, 4])
def test_a_fixed_exit_must_exist(two, number):
  features, variables = two
  with pytest.raises(UserError, match=rf"fixed_exit is {number}; expected 2 to 3"):
    EcoPixelDecoder(**SMALL, fixed_exit=number).apply(variables, features, train=False)


def test_best_exits_weigh_quality_against_cost():
  quality = jnp.asarray([[0.50, 0.52, 0.53, 0.53, 0.53], [0.3, 0.3, 0.3, 0.3, 0.9]])
  np.testing.assert_array_equal(best_exits(quality, 0.0), [2, 4])
  np.testing.assert_array_equal(best_exits(quality, 0.0005), [2, 4])
  np.testing.assert_array_equal(best_exits(quality, 0.015), [1, 4])
  np.testing.assert_array_equal(best_exits(quality, 0.2), [0, 0])
  assert best_exits(quality, 0.1).dtype == jnp.int32


def test_the_gate_learns_the_best_exits():
  rng = np.random.default_rng(0)
  quality = jnp.asarray(rng.uniform(size=(6, 5)), jnp.float32)
  logits = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
  losses = gate_loss(logits, quality, 0.05)
  targets = np.argmax(np.asarray(quality) - 0.05 * np.arange(5), axis=-1)
  logits64 = np.asarray(logits, np.float64)
  expected = np.log(np.exp(logits64).sum(-1)) - logits64[np.arange(6), targets]
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  slopes = jax.grad(lambda x: jnp.sum(gate_loss(x, quality, 0.05)))(logits)
  np.testing.assert_array_equal(np.argmin(slopes, axis=-1), targets)
