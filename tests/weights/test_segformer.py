"""SegFormer's four families of names; there and back without a changed bit."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.weights import table
from effseg_jax.weights.loading import export_weights, variable_shapes
from effseg_jax.weights.segformer import rows
from tests.models import reference
from tests.weights.official import tensor_of

FIELDS = {"widths": (8, 8, 10, 16), "depths": (1, 1, 2, 1), "decoder_features": 8, "num_classes": 5}
FAMILIES = ("hub", "transformers 5", "authors", "mmseg")


@functools.cache
def model(**more):
  fields = {**FIELDS, **more}
  if "heads" not in fields:
    fields["heads"] = (1, 1, 5, 2)
  return create_model("segformer_b0", **fields)


@functools.cache
def hub_weights(**more):
  """The hub's names, with tensors drawn for them."""
  net = model(**more)
  shapes = variable_shapes(net)
  rng = np.random.default_rng(0)
  own = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
  tree = {}
  for path, array in own.items():
    node = tree
    *parents, leaf = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = array
  return export_weights(net, tree)


def transformers_5(tensors):
  """Names as the specification's table has them, written down independently of ours."""
  pairs = (
    ("segformer.encoder.patch_embeddings.{s}.", "segformer.stages.{s}.patch_embeddings."),
    ("segformer.encoder.layer_norm.{s}.", "segformer.stages.{s}.layer_norm."),
    ("segformer.encoder.block.{s}.", "segformer.stages.{s}.blocks."),
  )
  inner = (
    ("layer_norm_1", "layernorm_before"), ("layer_norm_2", "layernorm_after"),
    ("attention.self.query", "attention.q_proj"), ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
    ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
    ("attention.self.layer_norm", "attention.sequence_reduction.layer_norm"),
    ("mlp.dense", "mlp.fc"), ("decode_head.linear_c.", "decode_head.linear_projections."),
  )  # fmt: skip
  return {_replaced(name, pairs, inner): tensor for name, tensor in tensors.items()}


def authors(tensors):
  """The authors' files: keys and values packed, names counted from one, a dead classifier."""
  pairs = (
    ("segformer.encoder.patch_embeddings.{s}.proj", "backbone.patch_embed{S}.proj"),
    ("segformer.encoder.patch_embeddings.{s}.layer_norm", "backbone.patch_embed{S}.norm"),
    ("segformer.encoder.layer_norm.{s}.", "backbone.norm{S}."),
    ("segformer.encoder.block.{s}.", "backbone.block{S}."),
    ("decode_head.linear_c.{s}.", "decode_head.linear_c{S}."),
  )
  inner = (
    ("layer_norm_1", "norm1"), ("layer_norm_2", "norm2"), ("attention.self.query", "attn.q"),
    ("attention.self.key", "attn.kv"), ("attention.output.dense", "attn.proj"),
    ("attention.self.sr", "attn.sr"), ("attention.self.layer_norm", "attn.norm"),
    ("mlp.dense", "mlp.fc"), ("linear_fuse.weight", "linear_fuse.conv.weight"),
    ("decode_head.batch_norm", "decode_head.linear_fuse.bn"),
    ("decode_head.classifier", "decode_head.linear_pred"),
  )  # fmt: skip
  found = {}
  for name, tensor in tensors.items():
    if ".self.key." in name:
      tensor = np.concatenate([tensor, tensors[name.replace(".self.key.", ".self.value.")]])
    if ".self.value." not in name:
      found[_replaced(name, pairs, inner)] = tensor
  classifier = tensors["decode_head.classifier.weight"]
  found["decode_head.conv_seg.weight"] = np.zeros_like(classifier)
  found["decode_head.conv_seg.bias"] = np.zeros(len(classifier), np.float32)
  return found


def _replaced(name, pairs, inner):
  for stage in range(4):
    for old, new in pairs:
      old, new = (text.format(s=stage, S=stage + 1) for text in (old, new))
      if name.startswith(old):
        name = new + name.removeprefix(old)
  for old, new in inner:
    name = name.replace(old, new)
  return name


def assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_names_order_and_shapes_are_the_hubs():
  for part in ("b0", "b1"):
    listed = reference.decoded(reference.read("segformer")[f"{part}/state_dict_json"])
    net = create_model(f"segformer_{part}", num_classes=150 if part == "b0" else 19)
    shapes = variable_shapes(net)
    zeros = export_weights(net, _zeros(shapes))
    assert [[name, list(x.shape)] for name, x in zeros.items()] == listed
    assert {row.path for row in rows(net, shapes)} - {""} == set(shapes)


def _zeros(shapes):
  tree = {}
  for path, shape in shapes.items():
    node = tree
    *parents, leaf = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = np.zeros(shape, np.float32)
  return tree


@pytest.mark.parametrize("variant", ["b2", "b5"])
def test_names_of_larger_variants(shared, variant):
  listed = json.loads(
    (shared / "specs" / "state_dict_shapes" / f"segformer_{variant}.json").read_text()
  )
  net = create_model(f"segformer_{variant}")
  zeros = export_weights(net, _zeros(variable_shapes(net)))
  assert [[name, list(x.shape)] for name, x in zeros.items()] == [row[:2] for row in listed]
  spelled = [row[2] for row in listed]
  assert list(transformers_5(dict(zeros))) == spelled


@pytest.mark.parametrize("rename", [transformers_5, authors])
def test_other_families_are_the_same_weights(rename):
  expected = load_weights(model(), hub_weights())
  renamed = rename(hub_weights())
  assert not set(renamed) & {name for name in hub_weights() if ".block." in name}
  assert_same(load_weights(model(), renamed), expected)
  again = export_weights(model(), expected)
  assert list(again) == list(hub_weights())
  assert_same(again, hub_weights())


def test_mmsegmentation_there_and_back():
  listed = reference.decoded(reference.read("segformer")["mmseg/state_dict_json"])
  net = create_model(
    "segformer_b0", **reference.decoded(reference.read("segformer")["mmseg/fields_json"])
  )
  weights = {name: tensor_of(name, tuple(shape)) for name, shape in listed}
  own = load_weights(net, weights)
  exported = export_weights(net, own)
  assert list(exported) == list(weights)
  assert_same(exported, weights)
  block = own["params"]["backbone"]["stage_1_block_0"]
  packed = weights["backbone.layers.1.1.0.attn.attn.in_proj_weight"]
  np.testing.assert_array_equal(block["attention"]["query"]["kernel"][3], packed[:32, 3])
  np.testing.assert_array_equal(block["attention"]["key_value"]["kernel"][3], packed[32:, 3])
  official = create_model(
    "segformer_b0", widths=net.widths, depths=net.depths, num_classes=7, decoder_features=32
  )
  part = load_weights(official, weights, partial="backbone")
  assert_same(part["params"]["backbone"], own["params"]["backbone"])
  bare = {name.removeprefix("backbone."): x for name, x in weights.items()}
  assert_same(load_weights(official, bare, partial="backbone"), part)
  with pytest.raises(UserError, match=r"unexpected: decode_head\.conv_seg.*The backbone fits"):
    load_weights(official, weights)


def test_the_encoder_alone_with_and_without_its_prefix():
  expected = load_weights(model(), hub_weights(), partial="backbone")
  assert set(expected["params"]) == {"backbone"}
  classifier = {"classifier.weight": np.zeros((1000, 16), np.float32)}
  for named, prefix in (
    (hub_weights(), "segformer."),
    (transformers_5(hub_weights()), "segformer."),
    (authors(hub_weights()), "backbone."),
  ):
    alone = {name: x for name, x in named.items() if name.startswith(prefix)}
    bare = {name.removeprefix(prefix): x for name, x in alone.items()}
    head = {"head.weight": classifier["classifier.weight"]} if prefix == "backbone." else classifier
    for file in (named, {**alone, **classifier}, {**bare, **head}):
      assert_same(load_weights(model(), file, partial="backbone"), expected)


def test_classifiers_of_images():
  classifier = model(head="image", num_classes=9)
  hub = hub_weights(head="image", num_classes=9)
  assert list(hub)[-2:] == ["classifier.weight", "classifier.bias"]
  expected = load_weights(classifier, hub)
  renamed = {
    name.replace("classifier.", "head.").removeprefix("backbone."): x
    for name, x in authors(
      {**hub, "decode_head.classifier.weight": hub["classifier.weight"]}
    ).items()
    if not name.startswith("decode_head.")
  }
  assert "head.weight" in renamed and "patch_embed1.proj.weight" in renamed
  assert_same(load_weights(classifier, renamed), expected)
  assert_same(
    load_weights(model(), hub, partial="backbone")["params"]["backbone"],
    expected["params"]["backbone"],
  )


def test_differences_are_named():
  weights = dict(hub_weights())
  del weights["segformer.encoder.block.2.1.attention.self.key.weight"]
  del weights["decode_head.batch_norm.running_var"]
  weights["decode_head.classifier.bias"] = np.zeros(7, np.float32)
  with pytest.raises(UserError) as caught:
    load_weights(model(), weights)
  for part in (
    "backbone.block3.1.attn.kv.weight",
    "segformer.encoder.block.2.1.attention.self.value.weight",
    "decode_head.linear_fuse.bn.running_var",
    "decode_head.linear_pred.bias has shape (7,), expected (5,)",
  ):
    assert part in str(caught.value)
  with pytest.raises(UserError, match=r"unexpected: .*block\.2\.1"):
    load_weights(model(depths=(1, 1, 1, 1)), hub_weights())


def test_layouts():
  own = load_weights(model(), hub_weights())["params"]
  fuse = hub_weights()["decode_head.linear_fuse.weight"]
  np.testing.assert_array_equal(own["head"]["fuse"]["kernel"][0, 0, 3], fuse[:, 3, 0, 0])
  attention = own["backbone"]["stage_0_block_0"]["attention"]
  name = "segformer.encoder.block.0.0.attention.self."
  np.testing.assert_array_equal(
    attention["key_value"]["kernel"][2],
    np.concatenate([hub_weights()[f"{name}{part}.weight"][:, 2] for part in ("key", "value")]),
  )
  reduce = hub_weights()[f"{name}sr.weight"]
  np.testing.assert_array_equal(attention["reduce"]["kernel"][5, 1, 2], reduce[:, 2, 5, 1])
  assert table.official_shape((7, 7, 3, 8), "conv") == (8, 3, 7, 7)
