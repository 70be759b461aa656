"""Weights that do not fit are refused with every difference; weights that fit give the outputs."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.weights.bundle import save_bundle

from . import official
from .torch_files import save, save_legacy

ALIAS = "backbone.mhca_stages.2.mhca_blks.0.MHCA_layers.1.factoratt_crpe.crpe.conv_list.2.weight"
CANONICAL = "backbone.mhca_stages.2.mhca_blks.0.crpe.conv_list.2.weight"
CARD = {"model": {"name": "afformer_tiny", "fields": {"num_classes": 150}}, "task": {}}


@pytest.fixture(scope="module")
def model():
  return create_model("afformer_tiny")


def assert_same(found, expected):
  """Equal trees."""
  found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
  assert set(found) == set(expected)
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=path)


@functools.cache
def compiled(size):
  """The forward pass, compiled once for all tests of a size."""
  model = create_model(f"afformer_{size}")
  return jax.jit(
    lambda variables, images: model.apply(variables, images, train=False),
    compiler_options={"xla_backend_optimization_level": 0},  # compiles in half the time
  )


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_reference_logits_from_a_file(shared, tmp_path, size):
  path = save(tmp_path / "a.pth", {"state_dict": official.weights(size)})
  variables = load_weights(create_model(f"afformer_{size}"), path)
  images = np.random.Generator(np.random.PCG64(0)).standard_normal((1, 3, 64, 64))
  logits = compiled(size)(variables, jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float32))
  with np.load(shared / "golden" / "afformer" / f"afformer_{size}.npz") as golden:
    expected = golden["64x64/logits"].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4, rtol=0)


def test_every_kind_of_source_gives_the_same(model, tmp_path):
  weights = official.weights("tiny")
  expected = load_weights(model, weights)
  np.savez(tmp_path / "a.npz", **weights)
  save_file(weights, str(tmp_path / "a.safetensors"))
  save_bundle(tmp_path / "bundle.safetensors", expected, CARD)
  save_legacy(tmp_path / "a.pt", {"model": {f"module.{k}": v for k, v in weights.items()}})
  for name in ("a.npz", "a.safetensors", "bundle.safetensors", "a.pt"):
    assert_same(load_weights(model, tmp_path / name), expected)
  assert_same(load_weights(model, str(tmp_path / "a.npz")), expected)
  assert_same(load_weights(model, {"state_dict": weights}), expected)


def test_all_differences_are_named_at_once(model):
  weights = official.weights("tiny")
  del weights["backbone.stem.0.bn.running_mean"], weights["decode_head.align.gn.bias"]
  weights["backbone.stem.2.conv.weight"] = np.zeros(3, np.float32)
  weights["neck.scale"] = np.zeros(3, np.float32)
  weights["backbone.stem.0.conv.weight"] = np.zeros((32, 3, 3, 3), np.float32)
  weights["decode_head.conv_seg.bias"] = np.zeros(19, np.float32)
  weights[ALIAS] = weights[ALIAS] + np.float32(1e-3)
  with pytest.raises(UserError) as caught:
    load_weights(model, weights)
  message = str(caught.value)
  assert "\n" not in message
  for part in (
    "2 missing: ",
    "backbone.stem.0.bn.running_mean",
    "decode_head.align.gn.bias",
    "2 unexpected: backbone.stem.2.conv.weight, neck.scale",
    "backbone.stem.0.conv.weight has shape (32, 3, 3, 3), expected (16, 3, 3, 3)",
    "decode_head.conv_seg.bias has shape (19,), expected (150,)",
    f"{ALIAS} != {CANONICAL}",
  ):
    assert part in message
  assert "decode_head.conv_seg.weight" not in message


def test_a_missing_alias_is_missing(model):
  weights = official.weights("tiny")
  del weights[ALIAS]
  with pytest.raises(UserError, match=f"1 missing: {ALIAS}"):
    load_weights(model, weights)


def test_counters_may_be_missing(model):
  weights = official.weights("tiny")
  expected = load_weights(model, weights)
  some = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
  assert_same(load_weights(model, some), expected)


def test_text_is_no_weight(model):
  weights = official.weights("tiny")
  weights["decode_head.conv_seg.bias"] = np.array(["x"] * 150)
  with pytest.raises(UserError, match="has type <U1, expected numbers"):
    load_weights(model, weights)


def test_the_backbone_alone(model):
  weights = official.weights("tiny")
  whole = load_weights(model, weights)
  expected = {
    collection: {"backbone": whole[collection]["backbone"]}
    for collection in ("params", "batch_stats")
  }
  assert_same(load_weights(model, weights, partial="backbone"), expected)
  backbone = {k: v for k, v in weights.items() if k.startswith("backbone.")}
  assert_same(load_weights(model, backbone, partial="backbone"), expected)
  imagenet = {k.removeprefix("backbone."): v for k, v in backbone.items()}
  imagenet["cls_head.cls.weight"] = np.zeros((1000, 216), np.float32)
  assert_same(load_weights(model, imagenet, partial="backbone"), expected)
  other_classes = create_model("afformer_tiny", num_classes=19)
  assert_same(load_weights(other_classes, weights, partial="backbone"), expected)

  with pytest.raises(UserError, match='partial="backbone" loads it alone'):
    load_weights(model, imagenet)
  with pytest.raises(UserError, match=r'expected \(150,\)\..*partial="backbone"'):
    load_weights(model, {**weights, "decode_head.conv_seg.bias": np.zeros(19, np.float32)})
  imagenet["stem.0.conv.weight"] = np.zeros((32, 3, 3, 3), np.float32)
  del imagenet["stem.0.bn.bias"]
  with pytest.raises(UserError, match=r"missing: backbone\.stem\.0\.bn\.bias; .*\(32, 3, 3, 3\)"):
    load_weights(model, imagenet, partial="backbone")


def test_other_sizes_do_not_fit(model):
  with pytest.raises(UserError, match=r"unexpected: .*MHCA_layers\.4"):
    load_weights(model, official.weights("base"))
  with pytest.raises(UserError, match=r"expected \(160, "):
    load_weights(model, official.weights("small"))


def test_a_bundle_may_lack_what_is_never_used(model, tmp_path):
  path = tmp_path / "bundle.safetensors"
  variables = load_weights(model, official.weights("tiny"))
  align = variables.pop("unused")["head"]["align"]
  save_bundle(path, variables, CARD)
  found = load_weights(model, path)
  assert not found.pop("unused")["head"]["align"]["conv"]["kernel"].any()
  assert align["conv"]["kernel"].shape == (1, 1, 256, 256)
  assert_same(found, variables)


def test_a_bundle_must_fit_too(model, tmp_path):
  path = tmp_path / "bundle.safetensors"
  variables = load_weights(model, official.weights("tiny"))
  del variables["params"]["head"]["norm"]["bias"]
  variables["params"]["neck"] = np.zeros(2, np.float32)
  save_bundle(path, variables, CARD)
  with pytest.raises(UserError, match=r"1 missing: params/head/norm/bias; .*: params/neck"):
    load_weights(model, path)
  part = load_weights(model, path, partial="backbone")
  assert_same(part["params"]["backbone"], variables["params"]["backbone"])
  save_bundle(path, load_weights(model, official.weights("tiny")), CARD, half=True)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(load_weights(model, path)))
  with pytest.raises(UserError, match=r"kernel has shape .*150\), expected .*19\)"):
    load_weights(create_model("afformer_tiny", num_classes=19), path)


def test_mistakes_are_one_line(model, tmp_path):
  with pytest.raises(UserError, match=r"partial is 'backbon'.*Did you mean 'backbone'"):
    load_weights(model, {}, partial="backbon")
  with pytest.raises(UserError, match="missing"):
    load_weights(model, tmp_path / "none.pth")
  with pytest.raises(UserError, match="no named tensors"):
    load_weights(model, {})
  (tmp_path / "a.safetensors").write_bytes(b"not one")
  with pytest.raises(UserError, match="damaged"):
    load_weights(model, tmp_path / "a.safetensors")
  with pytest.raises(UserError, match="Dense has no official weights"):
    load_weights(nn.Dense(3), {})
