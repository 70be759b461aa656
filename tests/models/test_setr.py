"""SETR against mmsegmentation: logits, losses, gradients, statistics of all three decoders."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model
from effseg_jax.models.flops import count
from effseg_jax.ops.resize import resize_bilinear
from effseg_jax.weights.loading import export_weights, load_weights, variable_shapes
from tests.vit_models import (
  FEATURES,
  GRADIENTS,
  LOGITS,
  assert_close,
  channels_first,
  golden,
  images,
  loaded,
  scaled,
)

KINDS = ("naive", "pup", "mla")
SIZES = {"64x64": 2, "70x90": 1}

# At image_size 512 with 150 classes, with auxiliary heads and without (section 5).
PUBLISHED = {
  "naive": (305_558_616, 304_450_710),
  "pup": (317_291_096, 308_318_870),
  "mla": (309_570_286, 309_416_086),
}


def setr(kind):
  return loaded(f"setr_{kind}_l16", f"setr_{kind}")


def losses(outputs, labels):
  """The cross-entropies over all pixels, the auxiliary ones times 0.4."""
  terms = []
  for index, logits in enumerate((outputs["logits"], *outputs["aux"])):
    log_likelihood = jax.nn.log_softmax(resize_bilinear(logits, labels.shape[1:]))
    counted = labels != 255
    target = jnp.where(counted, labels, 0).astype(jnp.int32)[..., None]
    nll = -jnp.take_along_axis(log_likelihood, target, -1)[..., 0]
    terms.append(jnp.sum(nll * counted) / labels.size * (0.4 if index else 1.0))
  return jnp.stack(terms)


@functools.cache
def run(kind):
  """Compiled: (variables, images) -> outputs with auxiliary heads, and everything inside."""
  model, _ = setr(kind)
  return jax.jit(
    lambda v, x: model.apply(
      v, x, with_aux=True, capture_intermediates=True, mutable=["intermediates"]
    )
  )


@functools.cache
def found(kind, size):
  rows, cols = map(int, size.split("x"))
  outputs, inside = run(kind)(setr(kind)[1], images(0, SIZES[size], rows, cols))
  return outputs, inside["intermediates"]


def trimmed(x):
  """Reference maps of more than 16 columns hold every third pixel."""
  return x[..., ::3, ::3] if x.shape[-1] > 16 else x


@pytest.mark.parametrize(("kind", "size"), [
  ("naive", "64x64"), ("mla", "64x64"), ("pup", "70x90"), ("mla", "70x90"),
])  # fmt: skip
def test_official_logits_and_losses(kind, size):
  reference = golden(f"setr_{kind}")
  outputs, _ = found(kind, size)
  rows, cols = map(int, size.split("x"))
  whole = 16 if kind == "pup" else 4
  assert outputs["logits"].shape == (SIZES[size], *(-(-n // 16) * whole for n in (rows, cols)), 7)
  logits = channels_first(outputs["logits"])
  assert_close(trimmed(logits[:1]), reference[f"{size}/logits"], LOGITS)
  step = 1 if kind == "mla" else 2
  for index, aux in enumerate(outputs["aux"]):
    aux = channels_first(aux)[:1, :, ::step, ::step]
    assert_close(trimmed(aux), reference[f"{size}/aux{index}"], LOGITS)
  resized = resize_bilinear(outputs["logits"], (rows, cols))
  expected = reference[f"{size}/resized_sub"]
  assert_close(channels_first(resized)[:1, :, ::3, ::3], expected, LOGITS)
  labels = reference[f"{size}/ce/labels"]
  terms = losses(jax.tree.map(lambda x: x[: len(labels)], outputs), labels)
  assert_close(terms, reference[f"{size}/ce/losses"], LOGITS)
  if f"{size}/logits_b1" in reference:
    assert_close(trimmed(logits[1:, :, ::2, ::2]), reference[f"{size}/logits_b1"], LOGITS)


@pytest.mark.parametrize("kind", ["naive", "mla"])
def test_official_gradients(kind):
  reference, (model, variables) = golden(f"setr_{kind}"), setr(kind)
  labels = reference["70x90/ce/labels"]

  def total(variables, x):
    return jnp.sum(losses(model.apply(variables, x, with_aux=True), labels))

  value, (own, by_image) = jax.jit(jax.value_and_grad(total, (0, 1)))(
    variables, images(0, 1, 70, 90)
  )
  np.testing.assert_allclose(value, reference["grad/loss"], rtol=2e-5)
  assert_close(channels_first(by_image)[:, :, ::2, ::2], reference["grad/input"], GRADIENTS)
  gradients = export_weights(model, own)
  norms = np.array([np.linalg.norm(gradients[name]) for name in reference["grad/param_names"]])
  assert_close(norms, reference["grad/param_l2norms"], GRADIENTS)
  for key in reference:
    if key.startswith(("grad/backbone", "grad/decode")):
      step = 1 if key.endswith("pos_embed") else 4
      assert_close(gradients[key.removeprefix("grad/")][::step], reference[key], GRADIENTS)


def test_inside_the_vit_and_the_necks():
  inside = {kind: found(kind, "64x64")[1] for kind in ("naive", "mla")}
  reference = golden("setr_naive")

  def value(tree, path):
    for key in path.split("/"):
      tree = tree[key]
    return np.asarray(tree["__call__"][0])[:1]

  block = {"ln1": "norm1", "attention": "attention", "ln2": "norm2"}
  for name, path in block.items():
    assert_close(
      value(inside["naive"], f"backbone/block_0/{path}"),
      reference[f"64x64/block0.{name}"],
      FEATURES,
    )
  assert_close(value(inside["naive"], "backbone/block_0"), reference["64x64/block0.out"], FEATURES)
  outputs = inside["naive"]["backbone"]["__call__"][0]
  assert_close(channels_first(outputs[3])[:1], reference["64x64/out3"], FEATURES)
  reference = golden("setr_mla")
  for index in range(4):
    # Projections count from the earliest output, what follows them from the deepest.
    for name, path in (("proj", "project"), ("out", "extract")):
      found_map = channels_first(value(inside["mla"], f"neck/{path}_{index}"))[:, ::3]
      assert_close(found_map, reference[f"64x64/neck.{name}{index}"], FEATURES)


@pytest.mark.parametrize("kind", ["naive", "mla"])
def test_epsilons_are_the_official_ones(kind):
  reference, model = golden(f"setr_{kind}"), setr(kind)[0]
  factors = dict.fromkeys(reference["epsilon/patterns"], float(reference["epsilon/factor"]))
  variables = load_weights(model, scaled(f"setr_{kind}", factors))
  outputs, _ = run(kind)(variables, images(0, 2, 64, 64))
  assert_close(channels_first(outputs["logits"])[:1], reference["epsilon/logits"], 5e-4)


def test_a_training_step_moves_the_statistics_as_officially():
  reference, (model, variables) = golden("setr_mla"), setr("mla")
  apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
  outputs, updates = apply(variables, images(3, 2, 64, 64))
  logits = channels_first(outputs["logits"])[..., ::4, ::4]
  assert_close(logits, reference["trainbn/logits"], LOGITS)
  exported = export_weights(model, {**variables, **updates})
  statistics = [key for key in reference if key.startswith("trainbn/") and "running" in key]
  assert len(statistics) >= 10
  for key in statistics:
    assert_close(exported[key.removeprefix("trainbn/")], reference[key], FEATURES)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_the_published_ones(kind):
  shapes = variable_shapes(create_model(f"setr_{kind}_l16"))
  trained = {p: math.prod(shape) for p, shape in shapes.items() if p.startswith("params/")}
  without = sum(n for path, n in trained.items() if "auxiliary_" not in path)
  assert (sum(trained.values()), without) == PUBLISHED[kind]


def test_products_are_the_published_ones():  # 362.88 for naive, 425.20 for PUP
  assert round(count(create_model("setr_mla_l16"), (512, 512)).products / 1e9, 2) == 368.14


def test_auxiliary_heads_are_read_in_training_or_when_wanted():
  model, variables = setr("mla")
  x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shape = functools.partial(jax.eval_shape, model.apply, variables, x)
  assert shape().shape == (1, 16, 16, 7)
  without = model.clone(auxiliary=False)
  assert not any("auxiliary" in path for path in variable_shapes(without))
  with pytest.raises(UserError, match="created with auxiliary=False"):
    jax.eval_shape(functools.partial(without.apply, with_aux=True), variables, x)
  with pytest.raises(UserError, match=r"expected \(batch, rows, columns, 3\)"):
    jax.eval_shape(model.apply, variables, jnp.zeros((1, 64, 64, 1)))


def test_bfloat16_is_close_and_returns_float32():
  model, variables = setr("naive")
  half = model.clone(dtype=jnp.bfloat16)
  logits = jax.jit(half.apply)(variables, images(0, 2, 64, 64))
  assert logits.dtype == jnp.float32
  expected = found("naive", "64x64")[0]["logits"]
  error = np.abs(logits - expected).mean()
  assert 0 < error < 0.05 * np.abs(expected).mean()
