"""PRO-SCALE's pixel decoder against reference outputs, and the token schedule it promises."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError
from effseg_jax.models.pixel_decoder import MaskFeatures
from effseg_jax.models.proscale import ProScalePixelDecoder, TokenRecalibration
from effseg_jax.ops.backend import target_platform
from tests import official_weights, pixel_decoders
from tests.pixel_decoders import nhwc, random_features

PREFIX = "sem_seg_head.pixel_decoder."
SMALL = {"features": 64, "heads": 4, "points": 1, "mlp_features": 128, "trc_gate": "none"}


@pytest.fixture(scope="module")
def references(shared):
  """Opens a reference output by name; these are not to be copied, so they may be absent."""
  folder = shared / "golden" / "proscale"
  if not folder.is_dir():
    pytest.skip("needs the reference outputs that are not to be copied")
  return lambda name: np.load(folder / f"{name}.npz")


@pytest.mark.parametrize(("name", "fields"), [
  ("333_convT_t0.1", {"trc_gate": "conv"}),
  ("333_none_t0.1", {"trc_gate": "none"}),
  ("111_convF_t0.1", {"layers": (1, 1, 1)}),
  ("111_convT_t0.1", {"layers": (1, 1, 1), "trc_gate": "conv"}),
  ("111_none_t0.1", {"layers": (1, 1, 1), "trc_gate": "none"}),
  ("333_convF_t0.1_outconv", {"light_pixel_embedding": False}),
  ("333_convF_t1.0", {"trc_temperature": 1.0}),
  ("333_convT_t1.0", {"trc_temperature": 1.0, "trc_gate": "conv"}),
  ("333_convF_t1.0_residual", {"trc_temperature": 1.0, "residual": True}),
  ("333_convF_t1.0_FIXED", {"trc_temperature": 1.0, "trc_layout": "correct"}),
])  # fmt: skip
def test_reference_outputs(references, shared, name, fields):
  """Op by op: the variants have nearly all operations in common, and no program."""
  path = shared / "golden" / "mask2former" / "pixdec_inputs_r50.npz"
  features = pixel_decoders.features(np.load(path))
  decoder = ProScalePixelDecoder(**fields)
  variables = pixel_decoders.official_variables(decoder, features)
  with target_platform("gpu"):
    outputs = decoder.apply(variables, features, train=False)
  pixel_decoders.assert_outputs(outputs, references(f"pixdec_proscale_r50_{name}"))


@pytest.mark.parametrize(("name", "platform"), [("r50", "cpu"), ("swint", "gpu")])
def test_reference_outputs_of_the_released_form(references, shared, name, platform):
  """Compiled, with the deformable attention of both platforms."""
  golden = references(f"pixdec_proscale_{name}_333_convF_t0.1")
  if name == "swint":
    features = pixel_decoders.features(golden, "in_")
  else:
    path = shared / "golden" / "mask2former" / "pixdec_inputs_r50.npz"
    features = pixel_decoders.features(np.load(path))
  decoder = ProScalePixelDecoder()
  variables = pixel_decoders.official_variables(decoder, features)
  with target_platform(platform):
    outputs = jax.jit(functools.partial(decoder.apply, train=False))(variables, features)
  pixel_decoders.assert_outputs(outputs, golden)


@pytest.mark.parametrize("layout", ["released", "correct"])
@pytest.mark.parametrize(("gate", "file"), [("linear", "trc_convF"), ("conv", "trc_convT")])
def test_reference_outputs_of_recalibration(references, gate, file, layout):
  golden = references(file)
  name = f"{PREFIX}transformer.encoder.token_excite.ops."
  weight = official_weights.tensor(f"{name}weight", (1, 256) + (1, 1) * (gate == "conv"))
  shape = (256, 1) if gate == "linear" else (1, 1, 256, 1)
  params = {
    "kernel": weight.reshape(shape),
    "bias": official_weights.tensor(f"{name}bias", (1,)),
  }
  out = TokenRecalibration(gate, layout, 1.0).apply(
    {"params": params},
    golden["cur"].reshape(2, *golden["cur_shape"], 256),
    golden["prev"].reshape(2, *golden["prev_shape"], 256),
  )
  expected = golden["out" if layout == "released" else "out_fixed"]
  np.testing.assert_allclose(out, expected, atol=2e-5, rtol=1e-4)


def test_reference_outputs_of_light_pixel_embedding(references):
  """The sum is the memory alone where the adapter's norm gives zero."""
  golden = references("lpe")
  x = nhwc(golden["x"])
  zeros, identity = np.zeros(256, np.float32), np.eye(256, dtype=np.float32)[None, None]
  params = {
    "adapter": {
      "conv": {"kernel": np.zeros((1, 1, 3, 256), np.float32)},
      "norm": {"scale": zeros, "bias": zeros},
    },
    "norm": {
      "scale": official_weights.tensor(f"{PREFIX}layer_1.norm.weight", (256,)),
      "bias": official_weights.tensor(f"{PREFIX}layer_1.norm.bias", (256,)),
    },
    "project": {"kernel": identity, "bias": zeros},
  }
  out = MaskFeatures(light=True).apply({"params": params}, jnp.ones((1, 6, 5, 3)), x)
  np.testing.assert_allclose(out, nhwc(golden["out"]), atol=2e-5, rtol=1e-4)


@functools.cache
def flops(layers, **fields):
  """Floating-point operations of the compiled program, for an image of 256x128."""
  decoder = ProScalePixelDecoder(layers=layers, **{**SMALL, **fields})
  features = random_features((256, 128))
  variables = jax.eval_shape(lambda x: decoder.init(jax.random.key(0), x, train=False), features)
  run = jax.jit(functools.partial(decoder.apply, train=False))
  return run.lower(variables, features).compile().cost_analysis()["flops"]


def test_a_stage_computes_on_the_tokens_it_holds():
  """A layer's share of the compiled program is its stage's number of tokens."""
  base = flops((0, 0, 0))
  tokens = np.asarray([32, 32 + 128, 32 + 128 + 512])
  layers = np.asarray([flops(tuple(row)) - base for row in np.eye(3, dtype=int).tolist()])
  # Products of the four projections and of the feed-forward layer; the rest are samples and norms.
  levels, channels = np.arange(1, 4), SMALL["features"]
  attention = 3 * SMALL["heads"] * SMALL["points"] * levels
  products = 2 * channels * (2 * channels + attention + 2 * SMALL["mlp_features"]) * tokens
  assert (layers > products).all()
  np.testing.assert_allclose(layers, products, rtol=0.15)
  # Layers add up, and a stage's layers do not depend on the other stages.
  together = flops((2, 1, 1)) - base
  np.testing.assert_allclose(together, layers[0] * 2 + layers[1:].sum(), rtol=0.03)


def test_light_pixel_embedding_saves_the_convolution():
  saved = flops((0, 0, 0), light_pixel_embedding=False) - flops((0, 0, 0))
  np.testing.assert_allclose(saved, 2 * 9 * 64 * 64 * (64 * 32), rtol=0.1)


def test_stages_without_layers_take_the_next_level_in():
  """Without layers the memories are the projected features, the coarse ones recalibrated."""
  features = random_features((64, 96))
  decoder = ProScalePixelDecoder(**{**SMALL, "layers": (0, 0, 0), "trc_gate": "linear"})
  (_, memories), state = jax.jit(
    functools.partial(decoder.init_with_output, train=False, capture_intermediates=True)
  )(jax.random.key(0), features)
  maps = state["intermediates"]["inputs"]["__call__"][0][0]
  np.testing.assert_array_equal(memories[2], maps[2])
  for memory, level in zip(memories[:2], maps[:2], strict=True):
    ratio = np.asarray(memory / level)
    assert ((ratio > 0.4) & (ratio < 0.6)).all()  # gates of temperature 0.1


@pytest.mark.parametrize(("layers", "names"), [((0, 1, 2), 3), ((1, 0, 0), 1), ((0, 2, 0), 2)])
def test_any_stage_may_be_empty(layers, names):
  decoder = ProScalePixelDecoder(**{**SMALL, "layers": layers, "residual": True})
  features = random_features((64, 96))
  shapes = pixel_decoders.shapes(decoder, features)
  assert {path.split("/")[0] for path in shapes if path.startswith("layer")} == {
    f"layer_{index}" for index in range(names)
  }
  levels = [level for level, depth in enumerate(layers, start=1) for _ in range(depth)]
  for index, level in enumerate(levels):
    bias = shapes[f"layer_{index}/attention/sampling_offsets/bias"]
    assert bias == (4 * 2 * level,)


@pytest.mark.parametrize(
  ("fields", "hint"),
  [
    ({"trc_gate": "line"}, "'linear'"),
    ({"trc_layout": "corect"}, "'correct'"),
    ({"layers": (1, 1)}, "three numbers"),
    ({"layers": (1, -1, 1)}, "three numbers"),
  ],
)
def test_wrong_fields_are_named(fields, hint):
  with pytest.raises(UserError, match=hint):
    ProScalePixelDecoder(**fields)
