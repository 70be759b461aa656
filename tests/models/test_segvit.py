"""SegViT against the reference implementation: every stage, scores, any size, the shrunk model."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model
from effseg_jax.models.flops import count
from effseg_jax.ops.mask_scores import semantic_scores
from effseg_jax.ops.resize import resize_bilinear
from effseg_jax.weights import segvit, table
from effseg_jax.weights.loading import load_weights, variable_shapes
from tests.vit_models import (
  FEATURES,
  assert_close,
  channels_first,
  golden,
  images,
  loaded,
  scaled,
  tensors,
)

LOGITS, EPSILON = 1e-4, 5e-4
NAMES = {"segvit": "segvit_b16", "segvit_shrunk": "segvit_shrunk_l16"}

# With 150 classes (specification, section 1), and 10^9 products at image_size (section 10).
PARAMETERS = {
  "segvit_b16": 108_736_279,
  "segvit_l16": 344_305_303,
  "segvit_shrunk_l16": 344_598_679,
}


@functools.cache
def run(file):
  model, _ = loaded(NAMES[file], file)
  return jax.jit(
    lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"])
  )


@functools.cache
def found(file, size):
  rows, cols = map(int, size.split("x"))
  batch = 2 if size == "64x64" else 1
  outputs, inside = run(file)(loaded(NAMES[file], file)[1], images(0, batch, rows, cols))
  return outputs, inside["intermediates"]


@pytest.mark.parametrize(("file", "size"), [
  ("segvit", "64x64"), ("segvit", "96x96"), ("segvit", "80x48"), ("segvit", "70x90"),
  ("segvit_shrunk", "64x64"),
])  # fmt: skip
def test_official_predictions_and_scores(file, size):
  reference, (outputs, _) = golden(file), found(file, size)
  compared = 0
  predictions = [*outputs["aux"], outputs]
  for index, prediction in enumerate(predictions):
    for name in ("class_logits", "mask_logits"):
      if f"{size}/pred{index}/{name}" in reference:
        assert_close(prediction[name], reference[f"{size}/pred{index}/{name}"], LOGITS)
        compared += 1
  assert compared >= 2 and f"{size}/pred{len(predictions) - 1}/mask_logits" in reference
  masks = jnp.moveaxis(outputs["mask_logits"], 1, -1)
  masks = jnp.moveaxis(resize_bilinear(masks, tuple(map(int, size.split("x")))), -1, 1)
  step = 3 if size == "70x90" else 9
  scores = semantic_scores(outputs["class_logits"], masks)[:, :, ::step, ::step]
  assert_close(scores, reference[f"{size}/scores_sub"], LOGITS)


def test_inside_the_decoder():
  reference, inside = golden("segvit"), found("segvit", "64x64")[1]
  layer = inside["decoder"]["stage_1_layer_0"]
  value = lambda node: node["__call__"][0]  # noqa: E731
  expected = reference["64x64/lateral0"]
  assert_close(value(inside["project_norm_1"]), expected, FEATURES)
  for name, node in (("self_attn", "self_attention"), ("norm2", "norm2")):
    assert_close(value(layer[node]), reference[f"64x64/stage0.layer0.{name}"], FEATURES)
  for index in range(2):
    queries, similarity = value(inside["decoder"][f"stage_1_layer_{index}"])
    assert_close(queries, reference[f"64x64/stage0.layer{index}"], FEATURES)
    assert_close(similarity, reference[f"64x64/stage0.layer{index}.similarity"], LOGITS)


@pytest.mark.parametrize("file", NAMES)
def test_features_are_those_of_the_out_layers(file):
  reference = golden(file)
  outputs = found(file, "64x64")[1]["backbone"]["__call__"][0]
  for index, output in enumerate(outputs):
    assert_close(channels_first(output)[:, ::3], reference[f"64x64/out{index}"], FEATURES)
  model = create_model(NAMES[file], features_only=True, **golden(file)["fields"])
  variables = loaded(NAMES[file], file)[1]
  shapes = jax.eval_shape(model.apply, variables, images(0, 2, 64, 64))
  assert [x.shape for x in shapes] == [x.shape for x in outputs]


@pytest.mark.parametrize("file", NAMES)
def test_epsilons_are_the_official_ones(file):
  reference, model = golden(file), loaded(NAMES[file], file)[0]
  factors = dict.fromkeys(reference["epsilon/patterns"], float(reference["epsilon/factor"]))
  outputs, _ = run(file)(load_weights(model, scaled(file, factors)), images(0, 2, 64, 64))
  for name in ("class_logits", "mask_logits"):
    assert_close(outputs[name][:1], reference[f"epsilon/{name}"], EPSILON)


def test_the_real_b16():
  reference = golden("segvit_b16")
  model = create_model("segvit_b16", num_classes=19)
  shapes = variable_shapes(model)
  assert sum(map(math.prod, shapes.values())) == reference["b16/num_params"]
  rows = [
    [row.name, table.official_shape(shapes[row.path], row.layout)]
    for row in segvit.rows(model, shapes)
    if row.path
  ]
  outputs = jax.jit(model.apply)(load_weights(model, tensors(rows)), images(0, 1, 64, 64))
  for name in ("class_logits", "mask_logits"):
    assert_close(outputs[name], reference[f"b16/{name}"], EPSILON)
  assert_close(outputs["aux"][0]["mask_logits"], reference["b16/aux0_mask_logits"], EPSILON)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_published_ones(name):
  assert sum(map(math.prod, variable_shapes(create_model(name)).values())) == PARAMETERS[name]


def test_products_are_the_published_ones():  # 636.96 for L, 372.75 for its shrunk form
  assert round(count(create_model("segvit_b16"), (512, 512)).products / 1e9, 2) == 120.46


def test_dropout_and_stochastic_depth_are_random_in_training_alone():
  model, variables = loaded("segvit_b16", "segvit")
  x = images(0, 2, 64, 64)

  @jax.jit
  def train(seed):
    keys = jax.random.split(jax.random.key(seed))
    rngs = {"dropout": keys[0], "drop_path": keys[1]}
    return model.apply(variables, x, train=True, rngs=rngs)["class_logits"]

  a, b = train(0), train(1)
  assert np.isfinite(a).all() and np.abs(a - b).max() > 1e-2
  np.testing.assert_array_equal(a, train(0))


def test_bfloat16_is_close_and_returns_float32():
  model, variables = loaded("segvit_b16", "segvit")
  half = model.clone(dtype=jnp.bfloat16)
  outputs = jax.jit(half.apply)(variables, images(0, 2, 64, 64))
  assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
  expected = found("segvit", "64x64")[0]["class_logits"]
  error = np.abs(outputs["class_logits"] - expected).mean()
  assert 0 < error < 0.05 * np.abs(expected).mean()


@pytest.mark.parametrize(("file", "shape", "message"), [
  ("segvit", (1, 64, 64, 4), r"expected \(batch, rows, columns, 3\)"),
  ("segvit_shrunk", (1, 64, 96, 3), "the shrunk model takes image_size = 64x64 alone"),
])  # fmt: skip
def test_wrong_images_are_one_line(file, shape, message):
  model, variables = loaded(NAMES[file], file)
  with pytest.raises(UserError, match=message) as caught:
    jax.eval_shape(model.apply, variables, jnp.zeros(shape))
  assert "\n" not in str(caught.value)
