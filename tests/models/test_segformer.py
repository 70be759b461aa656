"""SegFormer against the outputs of transformers and MMSegmentation."""

from __future__ import annotations

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model, list_models, load_weights
from effseg_jax.models import flops
from effseg_jax.models.layers import DropPath
from effseg_jax.models.segformer import fuse_levels, fuse_levels_reference
from effseg_jax.ops.cross_entropy import upsampled_cross_entropy
from effseg_jax.weights.loading import export_weights, variable_shapes
from tests.models import reference
from tests.models.reference import channels_first, channels_last, tokens
from tests.weights.official import tensor_of

FEATURES, LOGITS, GRADIENTS, EPSILONS = 2e-5, 1e-4, 2e-4, 5e-4  # relative to the largest value


def golden(part):
  prefix = f"{part}/"
  return {
    key.removeprefix(prefix): array
    for key, array in reference.read("segformer").items()
    if key.startswith(prefix)
  }


@functools.cache
def weights(part):
  """Names and tensors that the reference outputs of a part were made with."""
  rows = reference.decoded(golden(part)["state_dict_json"])
  return {row[0]: tensor_of(row[0], tuple(row[1])) for row in rows}


def fields(part):
  return reference.decoded(golden(part)["fields_json"])


@functools.cache
def model(part="tiny", **more):
  return create_model("segformer_b0", **{**fields(part), **more})


@functools.cache
def variables(part="tiny"):
  return load_weights(model(part), weights(part))


@functools.cache
def jitted(part="tiny"):
  @jax.jit
  def run(v, x):
    logits, seen = model(part).apply(v, x, train=False, capture_intermediates=True)
    return logits, seen["intermediates"]

  return run


@functools.cache
def outputs(rows, cols, part="tiny"):
  """Logits and everything inside; of one image or, at 64x96, of two."""
  batch = 2 if (part, rows) == ("tiny", 64) else 1
  return jitted(part)(variables(part), reference.images(rows, cols, batch=batch))


def inside(path, part="tiny"):
  node = outputs(64, 96, part)[1]
  for key in path.split("/"):
    node = node[key]
  return node["__call__"][0][:1]


@pytest.mark.parametrize(
  ("name", "path", "layout"),
  [
    ("stage0.patch_conv", "backbone/embed_0", channels_first),
    ("stage0.block0.reduced_conv", "backbone/stage_0_block_0/attention/reduce", channels_first),
    ("stage2.patch_conv", "backbone/embed_2", channels_first),
    ("stage2.patch_embed", "backbone/embed_norm_2", tokens),
    ("stage2.block0.norm1", "backbone/stage_2_block_0/norm1", tokens),
    ("stage2.block0.query", "backbone/stage_2_block_0/attention/query", tokens),
    ("stage2.block0.reduced_conv", "backbone/stage_2_block_0/attention/reduce", channels_first),
    ("stage2.block0.reduced", "backbone/stage_2_block_0/attention/norm", tokens),
    ("stage2.block0.attention", "backbone/stage_2_block_0/attention", tokens),
    ("stage2.block0.norm2", "backbone/stage_2_block_0/norm2", tokens),
    ("stage2.block0.dense1", "backbone/stage_2_block_0/fc1", tokens),
    ("stage2.block0.dwconv", "backbone/stage_2_block_0/depthwise", tokens),
    ("stage2.block0.mlp", "backbone/stage_2_block_0/fc2", tokens),
    ("stage2.block0.out", "backbone/stage_2_block_0", tokens),
    ("stage3.block0.attention", "backbone/stage_3_block_0/attention", tokens),
    ("stage3.block0.out", "backbone/stage_3_block_0", tokens),
    ("head.batch_norm", "head/norm", channels_first),
  ],
)
def test_inside(name, path, layout):
  reference.assert_close(layout(inside(path)), golden("tiny")[f"64x96/{name}"], FEATURES)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_keys_and_values(stage):
  found = np.split(tokens(inside(f"backbone/stage_{stage}_block_0/attention/key_value")), 2, -1)
  for name, part in zip(("key", "value"), found, strict=True):
    reference.assert_close(part, golden("tiny")[f"64x96/stage{stage}.block0.{name}"], FEATURES)


@pytest.mark.parametrize(("part", "rows", "cols"), [
  ("tiny", 64, 96), ("tiny", 61, 83), ("mmseg", 64, 96), ("mmseg", 61, 83),
])  # fmt: skip
def test_logits(part, rows, cols):
  logits, seen = outputs(rows, cols, part)
  expected = golden(part)
  reference.assert_close(channels_first(logits), expected[f"{rows}x{cols}/logits"], LOGITS)
  for stage in range(4):
    if f"{rows}x{cols}/stage{stage}" in expected:
      found = channels_first(seen["backbone"][f"norm_{stage}"]["__call__"][0])
      reference.assert_close(found, expected[f"{rows}x{cols}/stage{stage}"], FEATURES)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_of_the_head_of_mmsegmentation(level):
  found = jax.nn.relu(inside(f"head/level_{level}", "mmseg"))
  expected = golden("mmseg")[f"64x96/head.conv{level}"]
  reference.assert_close(channels_first(found), expected, FEATURES)


def test_features_alone():
  alone = model(features_only=True)
  own = load_weights(alone, weights("tiny"), partial="backbone")
  found = jax.jit(alone.apply)(own, reference.images(64, 96, batch=2))
  assert [x.shape[1:3] for x in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
  for stage in (2, 3):
    expected = golden("tiny")[f"64x96/stage{stage}"]
    reference.assert_close(channels_first(found[stage]), expected, FEATURES)


def test_image_head():
  rows = reference.decoded(golden("tiny")["image_head/state_dict_json"])
  named = {row[0]: tensor_of(row[0], tuple(row[1])) for row in rows}
  classifier = model(head="image", num_classes=11)
  images = reference.images(64, 96, batch=2)
  logits = jax.jit(classifier.apply)(load_weights(classifier, named), images)
  reference.assert_close(logits, golden("tiny")["image_head/logits"], LOGITS)
  assert list(export_weights(classifier, load_weights(classifier, named))) == list(named)


@pytest.mark.parametrize(("norm", "embed_norm"), [("1e-6", "1e-5"), ("1e-6", "1e-6")])
def test_epsilons(norm, embed_norm):
  expected = golden("epsilon")
  patterns = reference.decoded(expected["patterns_json"])
  small = {
    name: tensor * expected["factor"] if any(re.search(p, name) for p in patterns) else tensor
    for name, tensor in weights("tiny").items()
  }
  other = model(norm_epsilon=float(norm), embed_norm_epsilon=float(embed_norm))
  logits = jax.jit(other.apply)(load_weights(other, small), reference.images(64, 96))
  key = f"eps{norm}_{embed_norm}/logits"
  reference.assert_close(channels_first(logits), expected[key], EPSILONS)
  others = [k for k in expected if k.endswith("/logits") and k != key]
  differences = [np.abs(expected[k] - expected[key]).max() for k in others]
  assert min(differences) > 20 * EPSILONS * np.abs(expected[key]).max()


def test_the_real_b0():
  expected, real = golden("b0"), create_model("segformer_b0")
  own = load_weights(real, weights("b0"))
  run = jax.jit(lambda v, x: real.apply(v, x, train=False))
  odd = channels_first(run(own, reference.images(70, 94)))
  reference.assert_close(odd[:, ::5], expected["70x94/logits"], LOGITS)
  assert (odd.argmax(1) == expected["70x94/argmax"]).mean() >= 0.999


def test_b1():
  larger = create_model("segformer_b1", num_classes=19)
  run = jax.jit(lambda v, x: larger.apply(v, x, train=False))
  logits = run(load_weights(larger, weights("b1")), reference.images(64, 64))
  reference.assert_close(channels_first(logits), golden("b1")["logits"], LOGITS)


@functools.cache
def gradients():
  rest = {key: value for key, value in variables().items() if key != "params"}

  @jax.jit
  def run(params, images):
    def loss(params, images):
      return jnp.mean(jnp.square(model().apply({"params": params, **rest}, images)))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, images)

  loss, (of_params, of_images) = run(variables()["params"], reference.images(61, 83))
  as_weights = {**jax.tree.map(np.zeros_like, rest), "params": jax.device_get(of_params)}
  return float(loss), export_weights(model(), as_weights), of_images


def test_gradients():
  loss, named, of_images = gradients()
  expected = golden("tiny")
  np.testing.assert_allclose(loss, expected["grad/loss"], rtol=GRADIENTS)
  reference.assert_close(channels_first(of_images), expected["grad/input"], GRADIENTS)
  names = reference.decoded(expected["grad/param_names_json"])
  norms = np.array([np.linalg.norm(named[name].astype(np.float64)) for name in names])
  reference.assert_close(norms, expected["grad/param_l2norms"], GRADIENTS)
  whole = [key.removeprefix("grad/") for key in expected if key.endswith("weight")]
  assert len(whole) == 3
  for name in whole:
    reference.assert_close(named[name], expected[f"grad/{name}"], GRADIENTS)


@pytest.mark.parametrize("size", ["64x96", "61x83"])
def test_both_means_of_the_loss(size):
  expected = golden("tiny")
  labels = expected[f"{size}/ce/labels"].astype(np.int32)
  nll, _, counted = upsampled_cross_entropy(channels_last(expected[f"{size}/logits"]), labels)
  np.testing.assert_allclose(
    nll.sum() / counted.sum(), expected[f"{size}/ce/mean_valid"], rtol=1e-5
  )
  np.testing.assert_allclose(nll.sum() / labels.size, expected[f"{size}/ce/mean_all"], rtol=1e-5)


@pytest.mark.parametrize(("part", "statistics"), [
  ("tiny", {"decode_head.batch_norm.": ""}),
  ("mmseg", {f"decode_head.{n}.bn.": f"decode_head.{n}.bn." for n in ("convs.3", "fusion_conv")}),
])  # fmt: skip
def test_training_statistics_are_pytorchs(part, statistics):
  trained = model(part, dropout=0.0, drop_path=0.0)
  images = reference.images(64, 64, seed=3, batch=2)
  logits, changed = jax.jit(lambda v, x: trained.apply(v, x, train=True, mutable=["batch_stats"]))(
    variables(part), images
  )
  expected = golden(part)
  reference.assert_close(channels_first(logits), expected["trainbn/logits"], LOGITS)
  named = export_weights(trained, {**variables(part), **jax.device_get(changed)})
  for name, key in statistics.items():
    for leaf in ("running_mean", "running_var"):
      reference.assert_close(named[name + leaf], expected[f"trainbn/{key}{leaf}"], FEATURES)


@pytest.mark.parametrize(("variant", "parameters", "gmacs"), [
  ("b0", 3_752_694, 8.39), ("b1", 13_715_798, 15.88), ("b2", 27_461_974, 62.34),
])  # fmt: skip
def test_counts_at_512(variant, parameters, gmacs):
  one = create_model(f"segformer_{variant}")
  assert flops.parameter_counts(one) == (parameters, parameters)
  cost = flops.count(one, (512, 512))
  assert cost.products == cost.published
  assert cost.products / 1e9 == pytest.approx(gmacs, abs=6e-3)


@pytest.mark.parametrize(("variant", "parameters"), [
  ("b3", 47_337_814), ("b4", 64_108_374), ("b5", 84_708_694),
])  # fmt: skip
def test_deeper_variants_have_more_of_the_same_blocks(variant, parameters):
  """Their sizes follow from those of b2, which is quicker to trace."""
  b2, deeper = create_model("segformer_b2"), create_model(f"segformer_{variant}")
  same = ("widths", "heads", "reductions", "mlp_ratio", "decoder_features", "num_classes", "head")
  assert all(getattr(b2, field) == getattr(deeper, field) for field in same)
  shapes = variable_shapes(b2)
  count = lambda part: sum(  # noqa: E731
    math.prod(shape) for path, shape in shapes.items() if re.match(f"params/{part}", path)
  )
  more = [
    (n - m) * count(f"backbone/stage_{stage}_block_1/")
    for stage, (n, m) in enumerate(zip(deeper.depths, b2.depths, strict=True))
  ]
  assert count("") + sum(more) == parameters


def test_counts_at_the_size_of_cityscapes_and_of_the_other_head():
  cost = flops.count(create_model("segformer_b0", num_classes=19), (1024, 2048))
  assert cost.products / 1e9 == pytest.approx(120.96, abs=6e-3)
  other = create_model("segformer_b0", head="mmseg")
  assert flops.parameter_counts(other)[0] == 3_753_718
  assert flops.count(other, (512, 512)).products / 1e9 == pytest.approx(8.39, abs=6e-3)


def test_the_order_of_linear_maps_is_free():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  levels = [draw(2, 11, 8, 5), draw(2, 6, 4, 3), draw(2, 3, 2, 4)]
  layers = [(draw(level.shape[-1], 6), draw(6)) for level in levels]
  mixing = draw(3, 6, 7)
  slope = draw(2, 11, 8, 7)

  @jax.jit
  def run(levels, layers, mixing):
    both = []
    for function in (fuse_levels, fuse_levels_reference):
      fused, pull = jax.vjp(function, levels, layers, mixing)
      both.append(jax.tree.leaves((fused, pull(slope))))
    return both

  for found, expected in zip(*run(levels, layers, mixing), strict=True):
    reference.assert_close(found, np.asarray(expected), 1e-5)


def test_saving_memory_computes_every_block_again():
  """The same parameters; what is differentiated holds each block as one."""
  images = jnp.zeros((1, 64, 64, 3))
  plain, saving = (create_model("segformer_b0", remat=remat) for remat in (False, True))
  shapes, own = (jax.eval_shape(net.init, jax.random.key(0), images) for net in (plain, saving))
  assert jax.tree.structure(shapes) == jax.tree.structure(own)
  rngs = {"dropout": jax.random.key(1), "drop_path": jax.random.key(2)}

  def loss(variables, net):
    logits, _ = net.apply(variables, images, True, rngs=rngs, mutable=["batch_stats"])
    return jnp.mean(logits)

  counts = [
    len(re.findall(r"\bremat2?\[", str(jax.make_jaxpr(lambda v, net=net: loss(v, net))(own))))
    for net in (plain, saving)
  ]
  assert counts == [0, 8]


@pytest.mark.parametrize("head", ["official", "mmseg", "image"])
def test_bfloat16(head):
  half = model(head=head, dtype=jnp.bfloat16)
  images = jnp.zeros((2, 33, 47, 3))
  logits, own = jax.eval_shape(half.init_with_output, jax.random.key(0), images)
  assert (logits.dtype, logits.shape[-1]) == (jnp.float32, 7)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(own))
  if head == "official":
    found = jax.jit(half.apply)(variables(), reference.images(61, 83))
    expected = golden("tiny")["61x83/logits"]
    assert np.abs(channels_first(found) - expected).mean() < 0.02 * np.abs(expected).max()


def test_rates_of_stochastic_depth_are_those_of_the_recipe():
  rates = []

  def note(call, args, kwargs, context):
    if isinstance(context.module, DropPath):
      rates.append(context.module.rate)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(create_model("segformer_b0").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  np.testing.assert_allclose(rates, np.repeat(np.linspace(0, 0.1, 8), 2), rtol=1e-6)


def test_names():
  assert list_models("segformer*") == [f"segformer_b{i}" for i in range(6)]


@pytest.mark.parametrize(
  ("given", "hint"),
  [({"decoder_feature": 3}, "decoder_features"), ({"head": "mmsegm"}, "Did you mean 'mmseg'")],
)
def test_wrong_fields_are_named(given, hint):
  with pytest.raises(UserError, match=hint):
    create_model("segformer_b0", **given)


@pytest.mark.parametrize(("shape", "hint"), [
  ((1, 28, 64, 3), "28x64; 29x29 is the least"), ((1, 64, 64, 4), "64, 4.*expected"),
  ((64, 64, 3), "expected .batch"),
])  # fmt: skip
def test_wrong_images_are_refused(shape, hint):
  with pytest.raises(UserError, match=hint):
    jax.eval_shape(lambda x: model().apply(variables(), x), jnp.zeros(shape))
  assert jax.eval_shape(
    lambda x: model().apply(variables(), x), jnp.zeros((1, 29, 29, 3))
  ).shape == (1, 8, 8, 7)
