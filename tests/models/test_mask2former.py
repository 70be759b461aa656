"""Universal models against outputs of the official ones, and what their parts promise."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model, list_models
from effseg_jax.models.backbones.resnet import ResNet
from effseg_jax.models.backbones.swin import Swin
from effseg_jax.models.mask2former import DecoderLayer, outside_mask, resize_at_centres
from effseg_jax.ops.resize import resize_bilinear
from effseg_jax.weights.loading import variable_shapes
from tests.universal_models import SMALL, nhwc, official_variables, small_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

# With 133 classes, without statistics (specification, section 9; results, section 3).
PARAMETERS = {
  ("mask2former_r50", None): 43_983_878,
  ("mask2former_swin_tiny", None): 47_435_264,
  ("proscale_r50", (3, 3, 3)): 45_368_839,
  ("proscale_r50", (2, 2, 2)): 43_246_279,
  ("proscale_r50", (1, 1, 1)): 41_123_719,
  ("proscale_swin_tiny", (3, 3, 3)): 48_820_225,
}


def assert_close(found, expected):
  """Within the tolerance that goes with the reference outputs."""
  np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)


def stacked(outputs, key):
  """All predictions of a batch of one, first to last."""
  return np.stack([prediction[key][0] for prediction in (*outputs["aux"], outputs)])


def forward(model):
  """(variables, images) -> outputs and the backbone's features, compiled."""

  def run(variables, images):
    outputs, state = model.apply(
      variables,
      images,
      capture_intermediates=lambda module, _: isinstance(module, (ResNet, Swin)),
    )
    return outputs, state["intermediates"]["backbone"]["__call__"][0]

  return jax.jit(run)


@pytest.mark.parametrize("name", ["mask2former_r50", "mask2former_swin_tiny"])
def test_official_outputs(name):
  model, golden = create_model(name), np.load(GOLDEN / f"{name}.npz")
  variables, run = official_variables(model), forward(model)
  outputs, _ = run(variables, nhwc(golden["x"]))
  assert_close(stacked(outputs, "class_logits")[:, ::10, ::8], golden["class_logits"])
  assert_close(stacked(outputs, "mask_logits")[:, ::10, ::2, ::3], golden["mask_logits"])
  _, features = run(variables, nhwc(golden["features_x"]))
  for key, found in features.items():
    step = 2 if key in ("res2", "res3") else 1
    assert_close(found[:, ::step, ::step, ::16], nhwc(golden[key]))


@pytest.mark.parametrize(("name", "file"), [
  ("proscale_r50", "model_proscale_r50_333"), ("proscale_swin_tiny", "model_proscale_swint_333"),
])  # fmt: skip
def test_reference_outputs_of_proscale(shared, name, file):
  path = shared / "golden" / "proscale" / f"{file}.npz"
  if not path.is_file():
    pytest.skip("needs the reference outputs that are not to be copied")
  model, golden = create_model(name), np.load(path)
  outputs = jax.jit(model.apply)(official_variables(model), nhwc(golden["x"]))
  assert_close(stacked(outputs, "class_logits"), golden["all_logits"])
  assert_close(stacked(outputs, "mask_logits"), golden["all_masks"])


@functools.cache
def decoder_for_goldens():
  """The decoder of 20 queries and 19 classes, its variables, and itself compiled."""
  model = create_model("mask2former_r50", num_classes=19, num_queries=20, depth=18)
  variables = {"params": official_variables(model)["params"]["decoder"]}
  return variables, jax.jit(model.decoder.apply)


@pytest.mark.parametrize("file", ["decoder", "decoder_fullymasked"])
def test_decoder_attends_inside_masks_and_everywhere_for_empty_ones(shared, file):
  golden = np.load(shared / "golden" / "mask2former" / f"{file}.npz")
  assert golden["fully_masked_rows"].any() == (file == "decoder_fullymasked")
  variables, run = decoder_for_goldens()
  memories = [nhwc(golden[f"x{level}"]) for level in range(3)]
  predictions = run(variables, nhwc(golden["mask_features"]), memories)
  assert_close(np.stack([p["class_logits"] for p in predictions]), golden["all_logits"])
  assert_close(np.stack([p["mask_logits"] for p in predictions]), golden["all_masks"])


def test_sublayers_of_a_decoder_layer(shared):
  golden = np.load(shared / "golden" / "mask2former" / "decoder_layer0.npz")
  variables = {"params": decoder_for_goldens()[0]["params"]["layer_0"]}
  tokens = lambda key: golden[key].transpose(1, 0, 2)  # noqa: E731
  _, state = jax.jit(functools.partial(DecoderLayer().apply, capture_intermediates=True))(
    variables,
    tokens("tgt"),
    tokens("query_pos")[0],
    tokens("memory") + tokens("pos"),
    tokens("memory"),
    golden["attn_mask_true_is_blocked"],
  )
  for norm, after in (("cross", "cross"), ("self", "self"), ("mlp", "ffn")):
    found = state["intermediates"][f"{norm}_norm"]["__call__"][0]
    np.testing.assert_allclose(found, tokens(f"after_{after}"), atol=2e-5, rtol=1e-4)


def test_half_a_probability_is_inside_and_empty_masks_look_everywhere():
  embedding = jnp.asarray([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
  features = jnp.asarray([[[-1.0, -1.0], [0.0, -2.0], [3.0, -1e-3]]])
  blocked = outside_mask(embedding, features)
  np.testing.assert_array_equal(
    blocked[0], [[True, False, False], [False, False, False], [False, False, False]]
  )


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_resizing_at_centres_is_bilinear(factor):
  x = np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)
  size = (16 // factor, 24 // factor)
  np.testing.assert_allclose(resize_at_centres(x, size), resize_bilinear(x, size), atol=1e-6)
  for other in ((16, 24), (5, 24 // factor)):
    with pytest.raises(ValueError, match="even multiple"):
      resize_at_centres(x, other)


def images(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@functools.cache
def small(name, **fields):
  """A small model, its variables, and itself compiled."""
  model = small_model(name, **fields)
  return model, official_variables(model), jax.jit(model.apply)


def test_odd_sizes_are_padded_and_cropped():
  _, variables, run = small("proscale_r50")
  x = images(2, 70, 101, 3)
  found = run(variables, x)
  padded = run(variables, np.pad(x, ((0, 0), (0, 26), (0, 27), (0, 0))))
  assert set(found) == {"class_logits", "mask_logits", "aux"}
  assert len(found["aux"]) == SMALL["decoder_layers"]
  for prediction, whole in zip((found, *found["aux"]), (padded, *padded["aux"]), strict=True):
    assert prediction["class_logits"].shape == (2, 7, 6)
    assert prediction["mask_logits"].shape == (2, 7, 18, 26)
    np.testing.assert_allclose(prediction["class_logits"], whole["class_logits"], atol=1e-4)
    np.testing.assert_allclose(
      prediction["mask_logits"], whole["mask_logits"][:, :, :18, :26], atol=1e-3
    )


def test_bfloat16_is_close_and_returns_float32():
  _, variables, run = small("proscale_r50")
  half = small_model("proscale_r50", dtype=jnp.bfloat16)
  x = images(2, 96, 128, 3)
  expected, found = run(variables, x), jax.jit(half.apply)(variables, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  # The first prediction: later ones look at what a rounded mask lets them see.
  for key, value in expected["aux"][0].items():
    error = np.abs(found["aux"][0][key] - value).mean()
    assert 0 < error < 0.08 * value.std(), key


def gradient_of(model, variables):
  """The gradient with respect to the parameters as a function of them, and updated statistics."""
  x = images(1, 64, 64, 3)

  def loss(params):
    outputs, updates = model.apply(
      {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
    )
    return sum(jnp.mean(jnp.square(leaf)) for leaf in jax.tree.leaves(outputs)), updates

  return jax.grad(loss, has_aux=True)


def test_every_parameter_is_trained_and_no_frozen_statistic_moves():
  model, variables, _ = small("proscale_r50")
  gradient, updates = jax.jit(gradient_of(model, variables))(variables["params"])
  jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
  untouched = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    if not np.any(leaf)
  ]
  assert untouched == []


def test_memory_is_saved_in_every_layer():
  _, variables, _ = small("proscale_r50")
  model = small_model("proscale_r50", remat=True)
  program = str(jax.make_jaxpr(gradient_of(model, variables))(variables["params"]))
  blocks, encoder, decoder = 8, 3, 3
  assert program.count("policy=None") >= blocks + encoder + decoder
  plain = str(jax.make_jaxpr(gradient_of(small("proscale_r50")[0], variables))(variables["params"]))
  assert plain.count("policy=None") == 0


def test_masks_that_nobody_asks_for_cost_nothing():
  decoder = small("mask2former_swin_tiny")[0].decoder
  features = jnp.zeros((1, 64, 64, 64))
  memories = [jnp.zeros((1, size, size, 64)) for size in (8, 16, 32)]
  variables = jax.eval_shape(decoder.init, jax.random.key(0), features, memories)

  def flops(choose):
    run = jax.jit(lambda v: choose(decoder.apply(v, features, memories)))
    return run.lower(variables).compile().cost_analysis()["flops"]

  saved = flops(lambda predictions: predictions) - flops(lambda predictions: predictions[-1])
  masks = 2 * 7 * 64 * 64 * 64
  assert saved >= SMALL["decoder_layers"] * masks


@pytest.mark.parametrize(("name", "layers"), PARAMETERS)
def test_parameter_counts_are_the_published_ones(name, layers):
  model = create_model(name, **({"proscale_layers": layers} if layers else {}))
  assert model.num_classes == 133
  sizes = {"params": 0, "batch_stats": 0}
  for path, shape in variable_shapes(model).items():
    sizes[path.partition("/")[0]] += math.prod(shape)
  frozen = 106_240 if name.endswith("r50") else 0
  assert sizes == {"params": PARAMETERS[name, layers], "batch_stats": frozen}


def test_fields_are_those_of_the_variant():
  kinds = ("mask2former", "proscale", "eco_m2f")
  assert {f"{kind}_{backbone}" for kind in kinds for backbone in ("r50", "swin_tiny")} <= set(
    list_models()
  )
  model = create_model("proscale_r50", proscale_layers=[1, 2, 3], trc_gate="none")
  assert model.pixel_decoder.layers == (1, 2, 3)
  assert hash(model) == hash(
    create_model("proscale_r50", proscale_layers=(1, 2, 3), trc_gate="none")
  )
  for name, field, hint in (
    ("mask2former_r50", "proscale_layers", "has no field 'proscale_layers'"),
    ("proscale_swin_tiny", "norm", "has no field 'norm'"),
    ("proscale_r50", "num_querys", "Did you mean 'num_queries'"),
    ("eco_m2f_r50", "fixed_exits", "Did you mean 'fixed_exit'"),
  ):
    with pytest.raises(UserError, match=hint):
      create_model(name, **{field: 1})


@pytest.mark.parametrize("shape", [(1, 64, 64, 4), (64, 64, 3)])
def test_wrong_images_are_refused(shape):
  model, variables, _ = small("proscale_r50")
  with pytest.raises(UserError, match="expected \\(batch, rows, columns, 3\\)"):
    jax.eval_shape(model.apply, variables, jnp.zeros(shape))
