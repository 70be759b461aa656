"""AFFormer against the official implementation's outputs, and the forms it does not have."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from effseg_jax import UserError, create_model, list_models
from effseg_jax.models.afformer import (
  Form,
  FrequencyFilters,
  Head,
  Stage,
  frequency_similarity,
  pooled_low_pass,
)
from effseg_jax.ops.backend import target_platform
from effseg_jax.ops.cross_entropy import upsampled_cross_entropy
from effseg_jax.ops.resize import resize_bilinear
from effseg_jax.weights.loading import export_weights, load_weights
from tests.weights import official

GOLDEN = Path(__file__).parents[1] / "golden"
FEATURES, LOGITS, GRADIENTS = 2e-5, 1e-4, 1e-4  # relative, absolute, relative


@functools.cache
def golden(size):
  with np.load(GOLDEN / f"afformer_{size}.npz") as file:
    return dict(file)


@functools.cache
def variables(size):
  return load_weights(model(size), official.weights(size))


@functools.cache
def model(size, **fields):
  return create_model(f"afformer_{size}", **fields)


def apply(size, images):
  return jitted(size)(variables(size), images)


@functools.cache
def jitted(size, **fields):
  return jax.jit(lambda v, x: model(size, **fields).apply(v, x, train=False))


def images_like_reference(rows, cols, seed=0, batch=1):
  x = np.random.Generator(np.random.PCG64(seed)).standard_normal((batch, 3, rows, cols))
  return jnp.asarray(x.astype(np.float32).transpose(0, 2, 3, 1))


def channels_first(x):
  return np.asarray(x).transpose(0, 3, 1, 2)


def tokens(x):
  return np.asarray(x).reshape(x.shape[0], -1, x.shape[-1])


def heads(x):
  return tokens(x).reshape(x.shape[0], -1, 8, x.shape[-1] // 8).transpose(0, 2, 1, 3)


def assert_feature(ours, reference):
  assert ours.shape == reference.shape
  assert np.abs(ours - reference).max() <= FEATURES * np.abs(reference).max()


@functools.cache
def captured():
  """Everything inside the tiny model on the 64x64 image."""

  @jax.jit
  def run(v, x):
    return model("tiny").apply(v, x, train=False, capture_intermediates=True)[1]["intermediates"]

  return run(variables("tiny"), images_like_reference(64, 64))


def inside(path):
  node = captured()
  for key in path.split("/"):
    node = node[key]
  return node["__call__"][0]


@pytest.mark.parametrize(
  ("name", "path", "layout"),
  [
    ("stem", "backbone/stem_1", channels_first),
    ("stage0.out", "backbone/stage_0", channels_first),
    ("stage1.out", "backbone/stage_1", channels_first),
    ("stage2.out", "backbone/stage_2", channels_first),
    ("stage3.out", "backbone/stage_3", channels_first),
    ("stage2.patch_embed.0", "backbone/stage_2/cluster_0", channels_first),
    ("stage2.patch_embed.1", "backbone/stage_2/cluster_1", channels_first),
    ("stage2.restore", "backbone/stage_2/descriptor", channels_first),
    ("stage2.layer0.norm1", "backbone/stage_2/block_0/norm1", tokens),
    ("stage2.layer0.aff.qkv", "backbone/stage_2/block_0/filter/qkv", tokens),
    ("stage2.layer0.aff.highpass0", "backbone/stage_2/filters/highpass_3", channels_first),
    ("stage2.layer0.aff.highpass1", "backbone/stage_2/filters/highpass_5", channels_first),
    ("stage2.layer0.aff.highpass2", "backbone/stage_2/filters/highpass_7", channels_first),
    ("stage2.layer0.aff.dyn", "backbone/stage_2/filters", heads),
    ("stage2.layer0.aff", "backbone/stage_2/block_0/filter", tokens),
    ("stage2.layer0.norm2", "backbone/stage_2/block_0/norm2", tokens),
    ("stage2.layer0.mlp.fc1", "backbone/stage_2/block_0/mlp/fc1", tokens),
    ("stage2.layer0.mlp", "backbone/stage_2/block_0/mlp", tokens),
    ("stage2.layer0.out", "backbone/stage_2/block_0", tokens),
    ("stage2.encoder", "backbone/stage_2/block_3", channels_first),
    ("stage3.encoder", "backbone/stage_3/block_1", channels_first),
  ],
)
def test_inside(name, path, layout):
  assert_feature(layout(inside(path)), golden("tiny")[f"64x64/{name}"])


def test_position_encoding_is_a_residual():
  position = inside("backbone/stage_2/cluster_1") + inside("backbone/stage_2/position")
  assert_feature(tokens(position), golden("tiny")["64x64/stage2.layer0.cpe"])


@pytest.mark.parametrize("stage", [2, 3])
def test_low_pass(stage):
  values = jnp.split(inside(f"backbone/stage_{stage}/block_0/filter/qkv"), 3, axis=-1)[2]
  low = jax.nn.relu(pooled_low_pass(values))
  assert_feature(channels_first(low), golden("tiny")[f"64x64/stage{stage}.layer0.aff.lowpass"])


@pytest.mark.parametrize("spectral", [False, True])
def test_frequency_similarity(spectral):
  qkv = jnp.split(inside("backbone/stage_2/block_0/filter/qkv"), 3, axis=-1)
  scaled = heads(frequency_similarity(*qkv, spectral=spectral))
  unscaled = scaled * np.sqrt(scaled.shape[-1])
  assert_feature(unscaled, golden("tiny")["64x64/stage2.layer0.aff.fsk_unscaled"])


def test_head_squeeze():
  squeezed = jax.nn.relu(inside("head/norm"))
  assert_feature(channels_first(squeezed), golden("tiny")["64x64/head.squeeze"])


@pytest.mark.parametrize(
  ("size", "rows", "cols"),
  [
    ("tiny", 64, 64),
    ("tiny", 128, 96),
    ("tiny", 70, 94),
    ("small", 70, 94),
    ("base", 70, 94),
    ("base", 128, 96),
  ],
)
def test_logits(size, rows, cols):
  logits = apply(size, images_like_reference(rows, cols))
  reference = golden(size)[f"{rows}x{cols}/logits"]
  assert channels_first(logits).shape == reference.shape
  assert np.abs(channels_first(logits) - reference).max() <= LOGITS
  if f"{rows}x{cols}/argmax" in golden(size):
    full = np.asarray(resize_bilinear(logits, (rows, cols)).argmax(-1))
    assert (full == golden(size)[f"{rows}x{cols}/argmax"]).mean() >= 0.999


def test_features_of_the_four_stages():
  features = jitted("small", features_only=True)(
    {key: {"backbone": variables("small")[key]["backbone"]} for key in ("params", "batch_stats")},
    images_like_reference(64, 64),
  )
  assert [x.shape[1] for x in features] == [16, 8, 8, 8]
  for stage, feature in enumerate(features):
    assert_feature(channels_first(feature), golden("small")[f"64x64/stage{stage}.out"])


def test_statistics_at_512():
  logits = np.asarray(apply("tiny", images_like_reference(512, 512)))
  mean, std, largest = golden("tiny")["512x512/stats_mean_std_absmax"][4]
  found = logits.mean(), logits.std(), np.abs(logits).max()
  np.testing.assert_allclose(found, (mean, std, largest), atol=LOGITS)
  part = channels_first(logits)[:, ::10, ::4, ::4]
  assert np.abs(part - golden("tiny")["512x512/logits_sub"]).max() <= LOGITS


@pytest.mark.parametrize("size", official.SIZES)
def test_head_on_small_features(size):
  """Catches a wrong epsilon of the group norm, which larger features hide."""
  z = np.random.Generator(np.random.PCG64(5)).standard_normal((1, 216, 8, 8)).astype(np.float32)
  features = jnp.asarray((z * np.float32(1e-3)).transpose(0, 2, 3, 1))
  logits = Head(150).apply({"params": variables(size)["params"]["head"]}, features, False)
  assert np.abs(channels_first(logits) - golden(size)["head_smallvar/logits"]).max() <= LOGITS


@functools.cache
def gradients():
  collections = variables("tiny")
  rest = {key: value for key, value in collections.items() if key != "params"}

  @jax.jit
  def run(params, images):
    def loss(params):
      return jnp.mean(jnp.square(model("tiny").apply({"params": params, **rest}, images)))

    return jax.value_and_grad(loss)(params)

  loss, grads = run(collections["params"], images_like_reference(64, 64))
  as_weights = {**jax.tree.map(np.zeros_like, dict(rest)), "params": jax.device_get(grads)}
  return float(loss), export_weights(model("tiny"), as_weights)


def test_gradients():
  loss, named = gradients()
  reference = golden("tiny")
  np.testing.assert_allclose(loss, reference["grad/loss"], rtol=GRADIENTS)
  names = json.loads(reference["grad/param_names_utf8"].tobytes())
  norms = [np.linalg.norm(named[name].astype(np.float64)) for name in names]
  np.testing.assert_allclose(norms, reference["grad/param_l2norms"], rtol=GRADIENTS, atol=1e-7)
  for key in reference:
    if key.startswith("grad/first16/"):
      entries = named[key.removeprefix("grad/first16/")].ravel()[:16]
      scale = np.abs(reference[key]).max()
      np.testing.assert_allclose(entries, reference[key], rtol=GRADIENTS, atol=GRADIENTS * scale)


def test_official_loss():
  reference = golden("tiny")
  draw = np.random.Generator(np.random.PCG64(1))
  labels = draw.integers(0, 150, (1, 64, 64))
  labels[np.random.Generator(np.random.PCG64(2)).random((1, 64, 64)) < 0.2] = 255
  logits = jnp.asarray(reference["64x64/logits"].transpose(0, 2, 3, 1))

  def loss(logits):
    nll, right, counted = upsampled_cross_entropy(logits, jnp.asarray(labels))
    return jnp.sum(nll) / labels.size, (right, counted)

  (value, (right, counted)), slope = jax.value_and_grad(loss, has_aux=True)(logits)
  np.testing.assert_allclose(value, reference["ce/loss"], rtol=1e-6)
  np.testing.assert_allclose(1 - int(counted[0]) / labels.size, reference["ce/ignored_fraction"])
  np.testing.assert_allclose(np.linalg.norm(slope), reference["ce/dlogits_l2"], rtol=GRADIENTS)
  first = channels_first(slope).ravel()[:16]
  np.testing.assert_allclose(first, reference["ce/dlogits_first16"], rtol=1e-3, atol=1e-9)
  assert 0 <= int(right[0]) <= int(counted[0])


def test_training_statistics_are_pytorchs():
  trained = model("tiny", dropout=0.0)
  logits, changed = jax.jit(lambda v, x: trained.apply(v, x, train=True, mutable=["batch_stats"]))(
    variables("tiny"), images_like_reference(64, 64, seed=3, batch=2)
  )
  reference = golden("tiny")
  assert_feature(channels_first(logits), reference["trainbn/logits"])
  named = export_weights(trained, {**variables("tiny"), **jax.device_get(changed)})
  checked = [key for key in reference if key.startswith("trainbn/") and "running" in key]
  assert len(checked) == 6
  for key in checked:
    assert_feature(named[key.removeprefix("trainbn/")], reference[key])


@pytest.mark.parametrize(
  ("size", "live"), [("tiny", 2_127_306), ("small", 2_323_106), ("base", 2_937_906)]
)
def test_parameter_counts(size, live):
  shapes = jax.eval_shape(
    lambda: model(size).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
  )
  count = {key: sum(leaf.size for leaf in jax.tree.leaves(shapes[key])) for key in shapes}
  assert count["params"] == live
  assert count["params"] + count["unused"] == live + 66_048


def test_fft_is_the_same_model():
  images = images_like_reference(70, 94)
  logits = jitted("tiny", filter_mode="fft")(variables("tiny"), images)
  assert np.abs(channels_first(logits) - golden("tiny")["70x94/logits"]).max() <= LOGITS


def test_formulations_for_the_tpu_are_the_same_model():
  small = model("tiny", widths=(8, 16, 32, 32), depths=(0, 1, 1, 1))
  images = images_like_reference(48, 32)
  shapes, outputs = [], []
  for platform in ("cpu", "tpu"):
    with target_platform(platform):
      found = jax.eval_shape(lambda: small.init(jax.random.key(0), images, train=False))
      shapes.append(jax.tree.map(jnp.shape, found))
      rng = np.random.default_rng(0)
      made = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape), found)
      apply_small = functools.partial(small.apply, train=False)
      outputs.append(jax.jit(apply_small)(made, images))
  assert shapes[0] == shapes[1]
  np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4)
  assert np.ptp(outputs[0]) > 1e-3


@pytest.mark.parametrize("grid", [(7, 13), (2, 3), (16, 12)])
def test_spatial_and_spectral_filters_agree(grid):
  """Odd and prime grids, and kernels larger than the grid: value and gradient."""
  rng = np.random.default_rng(0)
  query, values, slope = (
    jnp.asarray(rng.standard_normal((2, *grid, 24)), jnp.float32) for _ in range(3)
  )
  params = jax.jit(FrequencyFilters().init)(jax.random.key(1), query, values)
  found = {}
  for mode in ("spatial", "fft", "auto"):
    filters = FrequencyFilters(Form(filter_mode=mode))

    @jax.jit
    def run(*primals, filters=filters):
      out, vjp = jax.vjp(filters.apply, *primals)
      return jax.tree.leaves((out, vjp(slope)))

    found[mode] = run(params, query, values)
  for mode in ("fft", "auto"):
    for a, b in zip(found[mode], found["spatial"], strict=True):
      assert np.abs(a - b).max() <= 1e-5 * max(1.0, np.abs(b).max())


@pytest.mark.parametrize(
  "form",
  [
    Form(filter_mode="fft_circular", lowpass_relu=False),
    Form(filter_mode="fft_ideal", share_filters=False),
    Form(filter_mode="vanilla", restore="joint"),
    Form(cluster="window_softmax"),
  ],
  ids=lambda form: f"{form.filter_mode}-{form.cluster}",
)
def test_other_forms_differ_and_can_be_trained(form):
  pixels = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 13, 16)), jnp.float32)
  official_stage, stage = (Stage(8, (1, 2), (0.0, 0.0), each) for each in (Form(), form))
  weights = jax.jit(functools.partial(stage.init, train=False))(jax.random.key(0), pixels)
  rest = {"batch_stats": weights["batch_stats"]}

  @jax.jit
  def run(params):
    def first_channel(params):
      out = stage.apply({"params": params, **rest}, pixels, train=False)
      return jnp.sum(out[..., 0]), out

    return jax.value_and_grad(first_channel, has_aux=True)(params)

  (_, out), slopes = run(weights["params"])
  assert out.shape == (1, 9, 13, 8)
  for name, slope in flatten_dict(slopes, sep="/").items():
    assert np.isfinite(slope).all()
    if "highpass" in name or "vanilla" in name or "score/kernel" in name:
      assert np.abs(slope).max() > 0, name
  shapes = jax.tree.structure(weights["params"])
  theirs = jax.eval_shape(lambda: official_stage.init(jax.random.key(0), pixels, train=False))
  if shapes == jax.tree.structure(theirs["params"]):  # same parameters, another function
    apply = jax.jit(functools.partial(official_stage.apply, train=False))
    assert np.abs(apply(weights, pixels) - out).max() > 1e-3


@pytest.mark.parametrize(
  ("fields", "shape"),
  [
    ({"head": "linear", "in_channels": 4}, (2, 5, 6, 7)),
    ({"head": "image"}, (2, 7)),
    ({"dtype": jnp.bfloat16, "remat": True, "drop_path": 0.1}, (2, 5, 6, 7)),
  ],
  ids=["linear", "image", "bfloat16"],
)
def test_heads_and_dtypes(fields, shape):
  other = create_model("afformer_tiny", num_classes=7, **fields)
  images = jnp.zeros((2, 33, 47, other.in_channels))
  variables, logits = jax.eval_shape(
    lambda key: (
      other.init(key, images),
      other.init_with_output({"params": key, "dropout": key, "drop_path": key}, images, train=True)[
        0
      ],
    ),
    jax.random.key(0),
  )
  assert logits.shape == shape
  assert logits.dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables["params"]))


def test_spectral_models_are_named():
  assert list_models("afformer*_fft") == [
    "afformer_base_fft",
    "afformer_small_fft",
    "afformer_tiny_fft",
  ]
  assert create_model("afformer_tiny_fft").filter_mode == "fft_ideal"


@pytest.mark.parametrize(
  ("fields", "hint"),
  [
    ({"num_clases": 3}, "num_classes"),
    ({"filter_mode": "fft_ideel"}, "fft_ideal"),
    ({"head": "offical"}, "official"),
    ({"cluster": "kmeans"}, "window_softmax"),
  ],
)
def test_wrong_fields_are_named(fields, hint):
  with pytest.raises(UserError, match=hint):
    create_model("afformer_tiny", **fields)


@pytest.mark.parametrize(("shape", "hint"), [((1, 31, 64, 3), "32x32"), ((1, 64, 64, 4), "64, 4")])
def test_wrong_images_are_refused(shape, hint):
  with pytest.raises(UserError, match=hint):
    jax.eval_shape(lambda x: model("tiny").apply(variables("tiny"), x), jnp.zeros(shape))
