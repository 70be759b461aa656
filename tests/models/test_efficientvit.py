"""EfficientViT against the outputs of its authors' code."""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model, list_models, load_weights
from effseg_jax.models import flops
from effseg_jax.models.efficientvit import MultiScaleAttention, relu_linear_attention
from effseg_jax.models.layers import DropPath
from effseg_jax.ops.resize import resize_bicubic
from effseg_jax.weights.loading import export_weights
from tests.models import reference
from tests.models.reference import channels_first, channels_last
from tests.weights.official import tensor_of

FEATURES, LOGITS, FULL_SIZE, GRADIENTS = 2e-5, 1e-4, 2e-4, 5e-4  # relative to the largest value


def golden(part):
  prefix = f"{part}/"
  return {
    key.removeprefix(prefix): array
    for key, array in reference.read("efficientvit").items()
    if key.startswith(prefix)
  }


@functools.cache
def weights(part="tiny"):
  rows = reference.decoded(golden(part)["state_dict_json"])
  return {name: tensor_of(name, tuple(shape)) for name, shape in rows}


@functools.cache
def model(part="tiny", **more):
  fields = reference.decoded(golden(part)["fields_json"])
  return create_model("efficientvit_b0", **{**fields, **more})


@functools.cache
def variables():
  return load_weights(model(), weights())


@functools.cache
def jitted():
  @jax.jit
  def run(v, x):
    logits, seen = model().apply(v, x, train=False, capture_intermediates=True)
    return logits, seen["intermediates"]

  return run


@functools.cache
def outputs(rows, cols):
  """Logits and everything inside; of one image or, at 64x96, of two."""
  return jitted()(variables(), reference.images(rows, cols, batch=2 if rows == 64 else 1))


def inside(path, size=(64, 96)):
  node = outputs(*size)[1]
  for key in path.split("/"):
    node = node[key]
  return node["__call__"][0]


@pytest.mark.parametrize(
  ("name", "path"),
  [
    ("stage3.block0", "backbone/stage_3_block_0"),
    ("stage3.block1.qkv", "backbone/stage_3_block_1/attention/qkv"),
    ("stage3.block1.aggregated", "backbone/stage_3_block_1/attention/aggregate_mix"),
    ("stage3.block1.attention_projected", "backbone/stage_3_block_1/attention"),
    ("stage3.block1", "backbone/stage_3_block_1"),
    ("stage4.block1.attention_projected", "backbone/stage_4_block_1/attention"),
  ],
)
def test_inside(name, path):
  found = channels_first(inside(path))[:1]
  reference.assert_close(found, golden("tiny")[f"64x96/{name}"], FEATURES)


def test_residual_branches():
  stem = inside("backbone/stem") + inside("backbone/stem_block_0")
  expected = golden("tiny")
  reference.assert_close(
    channels_first(stem)[:1, :, ::2, ::2], expected["64x96/stem_block0"], FEATURES
  )
  first = inside("backbone/stage_1_block_0")  # halves the size: nothing is beside it
  reference.assert_close(channels_first(first)[:1], expected["64x96/stage1.block0"], FEATURES)
  context = inside("backbone/stage_3_block_0") + inside("backbone/stage_3_block_1/attention")
  reference.assert_close(
    channels_first(context)[:1], expected["64x96/stage3.block1.context"], FEATURES
  )


def test_inside_the_head():
  total = 0.0
  for index in range(3):
    level = resize_bicubic(inside(f"head/input_{index}")[:1], (8, 12))
    expected = golden("tiny")[f"64x96/head.input{index}"]
    reference.assert_close(channels_first(level), expected, FEATURES)
    total += level
  for index in range(2):
    total += inside(f"head/block_{index}")[:1]
  reference.assert_close(channels_first(total), golden("tiny")["64x96/head.middle"], FEATURES)


@pytest.mark.parametrize(("rows", "cols"), [(64, 96), (57, 89), (96, 160)])
def test_logits(rows, cols):
  """Grids of the attention with fewer positions than channels, and with more."""
  expected, logits = golden("tiny"), outputs(rows, cols)[0]
  reference.assert_close(channels_first(logits), expected[f"{rows}x{cols}/logits"], LOGITS)
  if f"{rows}x{cols}/argmax" in expected:
    full = channels_first(resize_bicubic(logits, (rows, cols)))
    part = full[:, :, ::3, ::3]
    reference.assert_close(part, expected[f"{rows}x{cols}/resized_sub"], LOGITS)
    assert (full.argmax(1) == expected[f"{rows}x{cols}/argmax"]).mean() >= 0.999


def test_features_alone():
  alone = model(features_only=True)
  own = load_weights(alone, weights(), partial="backbone")
  images = reference.images(57, 89)
  found = jax.jit(alone.apply)(own, images)
  assert [x.shape[1:3] for x in found] == [(15, 23), (8, 12), (4, 6), (2, 3)]
  for stage in (3, 4):
    expected = golden("tiny")[f"57x89/stage{stage}"]
    reference.assert_close(channels_first(found[stage - 1]), expected, FEATURES)
  shapes = jax.eval_shape(lambda x: alone.apply(own, x), jnp.zeros((1, 33, 47, 3)))
  assert [x.shape[1:3] for x in shapes] == [(9, 12), (5, 6), (3, 3), (2, 2)]  # not padded


@pytest.mark.parametrize("grid", ["5x6", "2x3"])
def test_attention_module(grid):
  expected = golden("ops")
  rows = reference.decoded(expected["lite_mla/state_dict_json"])
  named = {name.removeprefix("op."): tensor_of(name, tuple(shape)) for name, shape in rows}
  kernel = lambda name: {"kernel": named[f"{name}.weight"].transpose(2, 3, 1, 0)}  # noqa: E731
  norm = lambda *leaves: {ours: named[f"proj.norm.{theirs}"] for ours, theirs in leaves}  # noqa: E731
  own = {
    "params": {
      "qkv": kernel("qkv.conv"),
      "aggregate": kernel("aggreg.0.0"),
      "aggregate_mix": kernel("aggreg.0.1"),
      "project": {
        "conv": kernel("proj.conv"),
        "norm": norm(("scale", "weight"), ("bias", "bias")),
      },
    },
    "batch_stats": {"project": {"norm": norm(("mean", "running_mean"), ("var", "running_var"))}},
  }
  x = channels_last(expected[f"lite_mla/{grid}/input"])
  found = jax.jit(lambda v, x: MultiScaleAttention(8).apply(v, x, False))(own, x)
  reference.assert_close(channels_first(found), expected[f"lite_mla/{grid}/out"], FEATURES)


def test_queries_and_keys_without_a_positive_entry():
  expected = golden("ops")
  qkv = channels_last(expected["degenerate/qkv"])
  square = lambda x: jnp.mean(jnp.square(relu_linear_attention(x, 8)))  # noqa: E731
  found = relu_linear_attention(qkv, 8)
  reference.assert_close(channels_first(found), expected["degenerate/linear"], FEATURES)
  assert (np.abs(expected["degenerate/linear"]) == 0).any()
  slope = channels_first(jax.grad(square)(qkv))
  reference.assert_close(slope, expected["degenerate/grad_qkv"], GRADIENTS)


def test_attention_is_its_definition():
  rng = np.random.default_rng(0)
  qkv = rng.standard_normal((2, 3, 4, 2 * 3 * 5))
  found = relu_linear_attention(jnp.asarray(qkv, jnp.float32), 5)
  heads = qkv.reshape(2, 12, 2, 3, 5)
  query, key = np.maximum(heads[..., 0, :], 0), np.maximum(heads[..., 1, :], 0)
  similarity = np.einsum("bqnd,bknd->bnqk", query, key)
  mixed = np.einsum("bnqk,bknd->bqnd", similarity, heads[..., 2, :])
  mixed /= similarity.sum(-1).transpose(0, 2, 1)[..., None] + 1e-15
  np.testing.assert_allclose(found.reshape(mixed.shape), mixed, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["b0_cityscapes", "b1_ade20k"])
def test_full_size(part):
  name, dataset = part.split("_")
  fields = {"num_classes": 150, "head_expand": None} if dataset == "ade20k" else {}
  real = create_model(f"efficientvit_{name}", **fields)
  run = jax.jit(lambda v, x: real.apply(v, x, train=False))
  logits = channels_first(run(load_weights(real, weights(part)), reference.images(96, 160)))
  expected = golden(part)["logits"]
  step = logits.shape[1] // expected.shape[1]
  reference.assert_close(logits[:, :: 3 * 5 if step > 1 else 1], expected, FULL_SIZE)


def test_the_head_for_ade20k():
  other = model("tiny/ade")
  assert other.head_expand is None
  run = jax.jit(other.apply)
  logits = run(load_weights(other, weights("tiny/ade")), reference.images(64, 96))
  reference.assert_close(channels_first(logits), golden("tiny")["ade/logits"], LOGITS)


def test_epsilon_of_the_normalisations():
  expected = golden("tiny")
  small = dict(weights())
  for name, factor in reference.decoded(expected["epsilon/scaled_json"]):
    small[name] = small[name] * np.float32(factor)
  logits = jitted()(load_weights(model(), small), reference.images(64, 96))[0]
  reference.assert_close(channels_first(logits), expected["epsilon/logits"], GRADIENTS)


@functools.cache
def gradients():
  rest = {key: value for key, value in variables().items() if key != "params"}

  @jax.jit
  def run(params, images):
    def loss(params, images):
      return jnp.mean(jnp.square(model().apply({"params": params, **rest}, images)))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, images)

  loss, (of_params, of_images) = run(variables()["params"], reference.images(57, 89))
  as_weights = {**jax.tree.map(np.zeros_like, rest), "params": jax.device_get(of_params)}
  return float(loss), export_weights(model(), as_weights), of_images


def test_gradients():
  loss, named, of_images = gradients()
  expected = golden("tiny")
  np.testing.assert_allclose(loss, expected["grad/loss"], rtol=GRADIENTS)
  reference.assert_close(channels_first(of_images)[:, :, :, ::2], expected["grad/input"], GRADIENTS)
  names = reference.decoded(expected["grad/param_names_json"])
  norms = np.array([np.linalg.norm(named[name].astype(np.float64)) for name in names])
  reference.assert_close(norms, expected["grad/param_l2norms"], GRADIENTS)
  whole = [key.removeprefix("grad/") for key in expected if key.endswith("weight")]
  assert len(whole) == 4
  for name in whole:
    reference.assert_close(named[name], expected[f"grad/{name}"], GRADIENTS)


def test_training_statistics_are_pytorchs():
  logits, changed = jax.jit(lambda v, x: model().apply(v, x, train=True, mutable=["batch_stats"]))(
    variables(), reference.images(64, 64, seed=3, batch=2)
  )
  expected = golden("tiny")
  reference.assert_close(channels_first(logits), expected["trainbn/logits"], LOGITS)
  named = export_weights(model(), {**variables(), **jax.device_get(changed)})
  checked = [key for key in expected if key.startswith("trainbn/") and "running" in key]
  assert len(checked) == 6
  for key in checked:
    reference.assert_close(named[key.removeprefix("trainbn/")], expected[key], FEATURES)


@pytest.mark.parametrize(("variant", "fields", "size", "parameters", "gmacs"), [
  ("b0", {}, (1024, 2048), 706_691, 4.39),
  ("b1", {}, (1024, 2048), 4_803_443, 25.11),
  ("b1", {"num_classes": 150, "head_expand": None}, (512, 512), 4_791_414, 3.09),
  ("b2", {"num_classes": 150, "head_expand": None}, (512, 512), 15_293_382, 9.08),
])  # fmt: skip
def test_counts(variant, fields, size, parameters, gmacs):
  one = create_model(f"efficientvit_{variant}", **fields)
  assert flops.parameter_counts(one) == (parameters, parameters)
  assert flops.count(one, size).products / 1e9 == pytest.approx(gmacs, abs=6e-3)


@pytest.mark.parametrize(("size", "padded"), [
  ((64, 57), (64, 57)), ((40, 89), (64, 89)), ((33, 56), (64, 64)), ((1, 1), (32, 32)),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_padded(size, padded):
  images = reference.images(*size)
  net = create_model(
    "efficientvit_b0", widths=(2, 2, 4, 4, 4), depths=(0, 1, 1, 0, 0), attention_dim=4,
    head_features=4, head_depth=0, num_classes=2,
  )  # fmt: skip
  seen = []

  def note(call, args, kwargs, context):
    if context.module.name == "stem":
      seen.append(args[0].shape[1:3])
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    logits = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), images)[0])
  assert seen == [padded]
  assert logits.shape == (1, -(-size[0] // 8), -(-size[1] // 8), 2)
  own = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.3, np.float32),
    jax.eval_shape(net.init, jax.random.key(0), images),
  )
  more = [(0, 0), (0, padded[0] - size[0]), (0, padded[1] - size[1]), (0, 0)]
  found, whole = (jax.jit(net.apply)(own, x) for x in (images, jnp.pad(images, more)))
  np.testing.assert_allclose(found, whole[:, : found.shape[1], : found.shape[2]], atol=1e-5)


def test_saving_memory_computes_every_block_again():
  """The same parameters; what is differentiated holds each block, and the head's, as one."""
  images = jnp.zeros((1, 64, 64, 3))
  plain, saving = (create_model("efficientvit_b0", remat=remat) for remat in (False, True))
  shapes, own = (jax.eval_shape(net.init, jax.random.key(0), images) for net in (plain, saving))
  assert jax.tree.structure(shapes) == jax.tree.structure(own)

  def loss(variables, net):
    logits, _ = net.apply(variables, images, True, mutable=["batch_stats"])
    return jnp.mean(logits)

  counts = [
    len(re.findall(r"\bremat2?\[", str(jax.make_jaxpr(lambda v, net=net: loss(v, net))(own))))
    for net in (plain, saving)
  ]
  assert counts == [0, 1 + 2 + 2 + 3 + 3 + 1]


def test_bfloat16():
  half = model(dtype=jnp.bfloat16)
  images = reference.images(57, 89)
  logits, own = jax.eval_shape(half.init_with_output, jax.random.key(0), images)
  assert logits.dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(own))
  found = jax.jit(half.apply)(variables(), images)
  expected = golden("tiny")["57x89/logits"]
  assert np.abs(channels_first(found) - expected).mean() < 0.02 * np.abs(expected).max()


def test_drop_rates_grow_over_the_identity_branches():
  rates = []

  def note(call, args, kwargs, context):
    if isinstance(context.module, DropPath):
      rates.append(context.module.rate)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    net = create_model("efficientvit_b0", drop_path=0.6, features_only=True)
    jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  np.testing.assert_allclose(rates, 0.6 * np.arange(1, 12) / 11)  # 1 + 1 + 1 + 4 + 4


def test_names_and_mistakes():
  assert list_models("efficientvit*") == [f"efficientvit_b{i}" for i in range(4)]
  with pytest.raises(UserError, match="head_expand"):
    create_model("efficientvit_b1", head_expands=4)
  with pytest.raises(UserError, match="multiples of attention_dim, 48"):
    create_model("efficientvit_b1", attention_dim=48)
  with pytest.raises(UserError, match=r"expected .batch, rows, columns, 3"):
    jax.eval_shape(lambda x: model().apply(variables(), x), jnp.zeros((1, 64, 64, 4)))
