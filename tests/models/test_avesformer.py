"""AVESFormer: the paper's counts, what each part is told, and what it does with it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from effseg_jax import UserError, create_model
from effseg_jax.input_pipeline.audio import log_mel
from effseg_jax.models import elf_decoder
from effseg_jax.models.avesformer import embed
from effseg_jax.models.backbones import vggish
from effseg_jax.models.elf_decoder import Attention, ELFDecoder, PromptQueryGenerator
from effseg_jax.ops.log_mel import log_mel as device_log_mel
from effseg_jax.weights.loading import variable_shapes

SMALL = {
  "backbone": "small",
  "audio": "small",
  "width": 32,
  "heads": 4,
  "prompts": 3,
  "prompt_layers": 1,
  "prompt_hidden": 32,
  "depths": (1, 1, 1, 1),
  "widths": (32, 32, 64, 64),
  "hidden": 32,
  "head_widths": (16, 8),
}


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FEATURES = [normal(i, 1, 16 >> i, 16 >> i, 8) for i in range(4)]


FRAMES, LOG_MEL = normal(0, 1, 2, 64, 64, 3), normal(1, 1, 2, 96, 64)


@functools.cache
def variables():
  """Of the small model; fields of the call's kind do not change them."""
  return jax.jit(create_model("avesformer_lite", **SMALL).init)(jax.random.key(0), FRAMES, LOG_MEL)


@functools.cache
def apply(**fields):
  return jax.jit(create_model("avesformer_lite", **{**SMALL, **fields}).apply)


def sizes(name, **fields):
  """Parameters in millions, by part."""
  found = {}
  for path, shape in variable_shapes(create_model(name, **fields)).items():
    collection, part = path.split("/")[:2]
    if collection == "params":
      found[part] = found.get(part, 0) + int(np.prod(shape))
  return found


def test_the_default_is_the_reconstructed_paper():
  found = sizes("avesformer_r50")
  total = sum(found.values())
  assert total == 119_501_696
  assert found["audio"] == 72_141_184
  assert round(100 * found["audio"] / total, 1) == 60.4
  assert round(100 * (1 - total / 151.1e6), 1) == 20.9  # fewer than AVSegFormer's
  millions = {part: round(size / 1e6, 2) for part, size in found.items()}
  assert millions == {
    "backbone": 23.51,
    "audio": 72.14,
    "project_sound": 0.03,
    "generator": 4.76,
    "decoder": 18.72,
    "head": 0.33,
  }


def test_the_light_variant_is_light():
  assert sum(sizes("avesformer_lite").values()) < 20e6


@pytest.mark.parametrize(
  ("name", "fields", "total"),
  [
    ("avesformer_r18", {}, 106_432_896),
    ("avesformer_pvt_v2_b2", {}, 120_122_624),
    ("avesformer_r50", {"queries": "audio"}, 119_501_696 - 4_764_160),
    ("avesformer_r50", {"num_classes": 71}, 119_501_696 + 70 * 32),
  ],
)
def test_other_variants(name, fields, total):
  assert sum(sizes(name, **fields).values()) == total


@pytest.mark.parametrize(
  ("fields", "size"),
  [
    ({}, (64, 64)),
    ({"num_classes": 71, "head_stride": 1}, (50, 70)),
    ({"head_stride": 2, "backbone": "pvt_v2_b0", "dtype": jnp.bfloat16}, (32, 47)),
    ({"backbone": "resnet18", "prompt_mode": "add", "remat": True}, (33, 64)),
    ({"stage_types": ("attn", "conv", "attn", "conv"), "queries": "audio"}, (32, 32)),
  ],
)
def test_shapes_and_types(fields, size):
  model = create_model("avesformer_lite", **{**SMALL, **fields})
  frames = jnp.zeros((1, 3, *size, 3))
  patches = jnp.zeros((1, 3, 96, 64))
  trained, evaluated = (
    jax.eval_shape(
      lambda key, train=train: model.init_with_output(
        {"params": key, "dropout": key, "drop_path": key}, frames, patches, train
      ),
      jax.random.key(0),
    )
    for train in (True, False)
  )
  logits = (1, 3, *size, model.num_classes)
  assert evaluated[0].shape == trained[0]["logits"].shape == logits
  assert evaluated[0].dtype == trained[0]["logits"].dtype == jnp.float32
  grid = tuple(-(-length // 4) for length in size)
  assert trained[0]["mask_feature"].shape == (1, 3, *grid, model.widths[0])
  assert {leaf.dtype for leaf in jax.tree.leaves(trained[1])} == {jnp.dtype("float32")}


def test_every_frame_by_itself():
  whole = apply()(variables(), FRAMES, LOG_MEL)
  assert whole.shape == (1, 2, 64, 64, 1)
  frame = apply()(variables(), FRAMES[:, 1:], LOG_MEL[:, 1:])
  np.testing.assert_allclose(frame[0, 0], whole[0, 1], atol=1e-4)


def test_it_hears_and_sees():
  logits = apply()(variables(), FRAMES, LOG_MEL)
  assert np.abs(logits - apply()(variables(), FRAMES, LOG_MEL[:, ::-1])).max() > 1e-4
  assert np.abs(logits - apply()(variables(), FRAMES[:, ::-1], LOG_MEL)).max() > 1e-4


@pytest.mark.parametrize("sense", ["sound", "picture"])
def test_blind(sense):
  run = apply(blind_to=sense)
  logits = run(variables(), FRAMES, LOG_MEL)
  frames, patches = (FRAMES, -LOG_MEL) if sense == "sound" else (FRAMES[:, :, ::-1] + 1, LOG_MEL)
  np.testing.assert_array_equal(logits, run(variables(), frames, patches))
  frames, patches = (-FRAMES, LOG_MEL) if sense == "sound" else (FRAMES, -LOG_MEL)
  assert np.abs(logits - run(variables(), frames, patches)).max() > 1e-5


def test_narrow_types_compute_the_same():
  narrow = apply(dtype=jnp.bfloat16)(variables(), FRAMES, LOG_MEL)
  logits = apply()(variables(), FRAMES, LOG_MEL)
  assert narrow.dtype == jnp.float32
  assert np.abs(narrow - logits).mean() < 0.1 * np.abs(logits - logits.mean()).mean()


def test_waveform_to_mask_in_one_call():
  waveform = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 32_000)).astype(np.float32)
  model = create_model("avesformer_lite", **SMALL)
  one = jax.jit(lambda v, frames, sound: model.apply(v, frames, device_log_mel(sound)))
  patches = log_mel(waveform[0])[None]
  np.testing.assert_allclose(
    one(variables(), FRAMES, waveform), apply()(variables(), FRAMES, patches), atol=1e-3
  )


def test_vggish_is_frozen_and_can_be_computed_before(monkeypatch):
  monkeypatch.setattr(vggish, "_HIDDEN", 8)  # the first layer alone has 50 million weights
  model = create_model("avesformer_lite", **{**SMALL, "audio": "vggish"})
  patches = LOG_MEL.reshape(-1, 96, 64)
  hearing = jax.jit(vggish.VGGish().init)(jax.random.key(0), patches)["params"]
  others = {
    kind: {part: tree for part, tree in trees.items() if part != "audio"}
    for kind, trees in variables().items()
  }

  def run(hearing, log_mel, train=False):
    state = {**others, "params": {**others["params"], "audio": hearing}}
    rngs = {"dropout": jax.random.key(1)}
    return model.apply(state, FRAMES, log_mel, train, mutable=["batch_stats"], rngs=rngs)

  loss = lambda hearing: jnp.sum(run(hearing, LOG_MEL, True)[0]["logits"])  # noqa: E731
  assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(hearing)))

  embeddings = jax.jit(lambda p, x: embed(model, {"params": {"audio": p}}, x))(hearing, LOG_MEL)
  assert embeddings.shape == (1, 2, 128)
  whole, cached = (jax.jit(run)(hearing, sound) for sound in (LOG_MEL, embeddings))
  np.testing.assert_allclose(whole[0], cached[0], atol=1e-5)
  assert set(whole[1]["batch_stats"]) == {"backbone"}  # nothing of the audio is statistics
  shapes = [jax.eval_shape(model.init, jax.random.key(0), FRAMES, x) for x in (LOG_MEL, embeddings)]
  assert shapes[0] == shapes[1]  # whatever a model was trained with, it can hear


def gradients_and_statistics(**fields):
  """Of a training step of the small model."""
  model = create_model("avesformer_lite", **{**SMALL, **fields})
  own = variables()

  @jax.jit
  def run(params):
    def loss(params):
      state = {"params": params, "batch_stats": own["batch_stats"]}
      rngs = {"dropout": jax.random.key(1)}
      outputs, new = model.apply(state, FRAMES, LOG_MEL, True, mutable=["batch_stats"], rngs=rngs)
      return jnp.sum(jnp.square(outputs["logits"])), new["batch_stats"]

    return jax.grad(loss, has_aux=True)(params)

  return run(own["params"])


def test_all_is_trained():
  gradients, statistics = gradients_and_statistics()
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    # Keys without a position of their own shift all logits of a query alike: the softmax forgets.
    if "['key']['bias']" not in jax.tree_util.keystr(path):
      assert jnp.any(leaf), jax.tree_util.keystr(path)
  old = variables()["batch_stats"]["backbone"]["stem_0"]["norm"]["mean"]
  assert jnp.all(statistics["backbone"]["stem_0"]["norm"]["mean"] != old)


def test_a_frozen_backbone_stays_as_it_was():
  gradients, statistics = gradients_and_statistics(freeze_backbone=True)
  assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradients["backbone"]))
  assert any(jnp.any(leaf) for leaf in jax.tree.leaves(gradients["decoder"]))
  old = variables()["batch_stats"]["backbone"]
  jax.tree.map(np.testing.assert_array_equal, statistics["backbone"], old)


# Attention dissipation (specification, section 4).


def cross_attention(tokens):
  """Weights and outputs of an attention of 6 positions to some tokens."""
  module = Attention(heads=2)
  queries = normal(3, 1, 6, 8)

  @jax.jit
  def attend(tokens):
    own = module.init(jax.random.key(0), queries, tokens, tokens)
    return module.apply(own, queries, tokens, tokens, mutable=["intermediates"])

  output, state = attend(tokens)
  return np.asarray(state["intermediates"]["weights"][0]), np.asarray(output)


def test_one_token_of_sound_says_the_same_everywhere():
  weights, output = cross_attention(normal(4, 1, 1, 8))
  np.testing.assert_array_equal(weights, np.ones((1, 2, 6, 1)))
  np.testing.assert_allclose(output, np.broadcast_to(output[:, :1], output.shape), atol=1e-6)


@pytest.mark.parametrize("mode", ["concat", "add"])
def test_prompt_queries_say_something_else_to_each_position(mode):
  generator = PromptQueryGenerator(5, mode, layers=1, heads=2, hidden=16)
  sound = normal(5, 1, 1, 8)
  listen = jax.jit(lambda x: generator.init_with_output(jax.random.key(0), x, False)[0])
  tokens = listen(sound)
  assert tokens.shape == (1, 6 if mode == "concat" else 5, 8)
  weights, output = cross_attention(tokens)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  assert weights.max() < 0.999
  assert np.ptp(output, axis=1).min() > 1e-3
  assert np.abs(listen(2 * sound) - tokens).max(-1).min() > 1e-4  # every token has heard the sound


def test_the_decoder_without_prompts_dissipates():
  module = ELFDecoder(("conv", "conv", "attn", "attn"), (1, 1, 1, 1), (32,) * 4, 2, 16)

  @jax.jit
  def decode(sound):
    seen = []

    def keep(call, args, kwargs, context):
      output = call(*args, **kwargs)
      if context.module.name == "cross_attention" and context.method_name == "__call__":
        seen.append(output)
      return output

    with nn.intercept_methods(keep):
      module.init_with_output(jax.random.key(0), FEATURES, sound, False)
    return seen

  for tokens, flat in ((1, True), (3, False)):
    outputs = decode(normal(1, 1, tokens, 8))
    assert len(outputs) == 2
    for output in outputs:
      assert (np.ptp(output, axis=1).max() < 1e-5) == flat


# Parts.


def test_attention_is_its_formula_and_parts_are_the_whole(monkeypatch):
  query, key, value = normal(0, 2, 3, 7, 4), normal(1, 2, 3, 5, 4), normal(2, 2, 3, 5, 4)
  weights = softmax(np.einsum("bhnd,bhmd->bhnm", query, key) / 2, axis=-1)
  expected = np.einsum("bhnm,bhmd->bhnd", weights, value)
  found = jax.jit(elf_decoder.attend)(query, key, value)
  np.testing.assert_allclose(found[0], expected, atol=1e-5)
  np.testing.assert_allclose(found[1], weights, atol=1e-6)

  monkeypatch.setattr(elf_decoder, "_MOST_QUERIES", 3)  # 7 tokens in 3 parts, 2 of them padding
  cotangent = normal(3, 2, 3, 7, 4)

  @jax.jit
  def both(*arrays):
    whole, pull = jax.vjp(lambda *x: elf_decoder.attend(*x)[0], *arrays)
    parts, pull_parts = jax.vjp(elf_decoder.attend_in_parts, *arrays)
    return (whole, pull(cotangent)), (parts, pull_parts(cotangent))

  whole, parts = both(query, key, value)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


@functools.cache
def decoder(types, remat=False, train=False):
  module = ELFDecoder(types, (1, 1, 1, 1), (32, 32, 64, 32), 2, 16, 0.5, remat)
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  return jax.jit(lambda queries: module.init_with_output(rngs, FEATURES, queries, train))


def decode(types, queries, **options):
  return decoder(types, **options)(queries)


def test_only_attention_hears():
  types = ("conv", "conv", "conv", "conv")
  np.testing.assert_array_equal(
    decode(types, normal(1, 1, 3, 8))[0], decode(types, normal(2, 1, 3, 8))[0]
  )
  types = ("conv", "conv", "conv", "attn")
  found, own = decode(types, normal(1, 1, 3, 8))
  assert found.shape == (1, 16, 16, 32)
  # Widths differ between strides 8 and 16, and 16 and 32: there and only there something narrows.
  assert {name for name in own["params"] if name.startswith("narrow")} == {"narrow_1", "narrow_2"}
  assert np.abs(found - decode(types, normal(2, 1, 3, 8))[0]).max() > 1e-4


def test_dropout_is_of_training_and_remat_changes_nothing():
  types, queries = ("conv", "attn", "conv", "attn"), normal(1, 1, 3, 8)
  plain = decode(types, queries)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    plain,
    decode(types, queries, remat=True),
  )
  assert np.abs(plain[0] - decode(types, queries, train=True)[0]).max() > 1e-3


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"backbone": "resnet101"}, "backbone is 'resnet101'.*resnet50"),
    ({"queries": "prompt"}, "Did you mean 'prompts'"),
    ({"stage_types": ("conv", "atn", "attn", "attn")}, "Did you mean 'attn'"),
    ({"depths": (1, 1, 1)}, "one for each of 4 stages"),
    ({"widths": (32, 64, 80, 64)}, "multiples of 32"),
    ({"blind_to": "audio"}, "blind_to is 'audio'; expected one of nothing, sound, picture"),
    ({"prompt": 3}, "Did you mean 'prompts'"),
  ],
)
def test_fields_that_do_not_exist(fields, message):
  with pytest.raises(UserError, match=message):
    create_model("avesformer_r50", **fields)


@pytest.mark.parametrize(
  ("frames", "log_mel", "message"),
  [
    ((1, 2, 64, 64, 3), (1, 3, 96, 64), r"log_mel is \(1, 3, 96, 64\); expected \(1, 2, 96, 64\)"),
    ((1, 2, 64, 64, 3), (1, 2, 256), "embeddings"),
    ((2, 64, 64, 3), (2, 96, 64), r"frames are \(2, 64, 64, 3\)"),
    ((1, 2, 31, 64, 3), (1, 2, 96, 64), "32x32 at least"),
  ],
)
def test_inputs_of_other_shapes(frames, log_mel, message):
  model = create_model("avesformer_lite", **SMALL)
  with pytest.raises(UserError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(frames), jnp.zeros(log_mel))
