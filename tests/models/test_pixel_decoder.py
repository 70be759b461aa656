"""Mask2Former's pixel decoder against official outputs, and what its parts promise."""

from __future__ import annotations

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from effseg_jax.models.pixel_decoder import (
  DeformableAttention,
  EncoderLayer,
  Mask2FormerPixelDecoder,
  reference_points,
)
from tests import official_weights, pixel_decoders
from tests.pixel_decoders import random_features

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"layers": 2, "features": 32, "heads": 4, "points": 2, "mlp_features": 16}
LAYER = "sem_seg_head.pixel_decoder.transformer.encoder.layers.0."


@functools.cache
def small(**fields):
  return Mask2FormerPixelDecoder(**{**SMALL, **fields})


def official_layer(module, names, *arguments):
  """Parameters of a part of the first encoder layer, from their official names."""
  tree = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))["params"]
  params = {}
  for path, leaf in flatten_dict(tree, sep="/").items():
    kind, _, parameter = path.rpartition("/")
    name = names + kind.replace("attention/", "self_attn.") + "."
    if parameter == "kernel":
      params[path] = official_weights.tensor(name + "weight", leaf.shape[::-1]).T
    else:
      params[path] = official_weights.tensor(
        name + ("weight" if parameter == "scale" else "bias"), leaf.shape
      )
  return {"params": unflatten_dict(params, sep="/")}


def test_an_encoder_layer_of_one_level():
  with np.load(GOLDEN / "pixel_decoder.npz") as file:
    golden = {key.removeprefix("layer/"): file[key] for key in file if "layer/" in key}
  sizes = (tuple(golden["hw"].tolist()),)
  np.testing.assert_allclose(reference_points(sizes), golden["reference_points"][0], atol=1e-7)
  layer = EncoderLayer(sizes)
  arguments = golden["src"], golden["pos"], golden["reference_points"]
  out = jax.jit(layer.apply)(official_layer(layer, LAYER, *arguments), *arguments)
  np.testing.assert_allclose(out, golden["out"], atol=2e-5, rtol=1e-4)


def test_official_attention(shared):
  golden = np.load(shared / "golden" / "mask2former" / "msdeform_module.npz")
  attention = DeformableAttention(tuple(tuple(size) for size in golden["spatial_shapes"].tolist()))
  arguments = golden["query"], golden["reference_points"], golden["input_flatten"]
  variables = official_layer(attention, str(golden["prefix"]), *arguments)
  run = jax.jit(functools.partial(attention.apply, capture_intermediates=True))
  out, state = run(variables, *arguments)
  inside = state["intermediates"]
  found = {
    "out": out,
    "sampling_offsets": inside["sampling_offsets"]["__call__"][0].swapaxes(1, 2),
    "attention_logits": inside["attention_weights"]["__call__"][0].swapaxes(1, 2),
  }
  for name, x in found.items():
    np.testing.assert_allclose(x, golden[name], atol=2e-5, rtol=1e-4, err_msg=name)


def test_official_outputs(shared):
  folder = shared / "golden" / "mask2former"
  features = pixel_decoders.features(np.load(folder / "pixdec_inputs_r50.npz"))
  decoder = Mask2FormerPixelDecoder()
  variables = pixel_decoders.official_variables(decoder, features)
  outputs = jax.jit(functools.partial(decoder.apply, train=False))(variables, features)
  pixel_decoders.assert_outputs(outputs, np.load(folder / "pixdec_m2f_r50_L6.npz"))


def test_heads_look_around_in_eight_directions_at_first():
  attention = DeformableAttention(((3, 4), (6, 8)))
  queries, points = jnp.ones((1, 12, 256)), jnp.zeros((12, 2, 2))
  init = jax.jit(attention.init)
  params = init(jax.random.key(0), queries, points, jnp.ones((1, 60, 256)))["params"]
  offsets = np.asarray(params["sampling_offsets"]["bias"]).reshape(8, 2, 4, 2)
  np.testing.assert_allclose(offsets[0, 1], [[1, 0], [2, 0], [3, 0], [4, 0]], atol=1e-6)
  np.testing.assert_allclose(offsets[3, 0], [[-1, 1], [-2, 2], [-3, 3], [-4, 4]], atol=1e-6)
  for name in ("sampling_offsets", "attention_weights"):
    assert not np.asarray(params[name]["kernel"]).any()


@pytest.fixture(scope="module")
def odd():
  """Features of an image whose sides no stride divides, variables, and float32 outputs."""
  features = random_features((70, 101), batch=2)
  variables = pixel_decoders.random_variables(small(), features)
  return (
    features,
    variables,
    jax.jit(functools.partial(small().apply, train=True))(variables, features),
  )


def test_odd_sizes(odd):
  mask_features, memories = odd[2]
  assert mask_features.shape == (2, 18, 26, 32)
  assert [x.shape for x in memories] == [(2, 3, 4, 32), (2, 5, 7, 32), (2, 9, 13, 32)]


def test_bfloat16_samples_in_float32(odd):
  features, variables, expected = odd
  decoder = small(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(functools.partial(decoder.init, train=False), jax.random.key(0), features)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
  found, state = jax.jit(
    functools.partial(
      decoder.apply,
      train=False,
      capture_intermediates=lambda module, _: (
        isinstance(module, nn.Module)
        and module.name in ("sampling_offsets", "attention_weights", "value_proj")
      ),
    )
  )(variables, features)
  inside = state["intermediates"]["layer_1"]["attention"]
  dtypes = {name: outputs["__call__"][0].dtype for name, outputs in inside.items()}
  assert dtypes == {
    "sampling_offsets": jnp.float32,
    "attention_weights": jnp.float32,
    "value_proj": jnp.bfloat16,
  }
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == jnp.bfloat16
    assert np.abs(a.astype(jnp.float32) - b).mean() < 0.02 * np.abs(b).mean() + 0.02


def test_remat_computes_each_layer_again(odd):
  features, variables, _ = odd

  def checkpoints(**fields):
    def loss(variables):
      return jnp.sum(small(**fields).apply(variables, features, train=True)[0])

    equations = jax.make_jaxpr(jax.grad(loss))(variables).eqns
    return sum(equation.primitive.name in ("checkpoint", "remat2") for equation in equations)

  assert checkpoints() == 0
  assert checkpoints(remat=True) == SMALL["layers"]
