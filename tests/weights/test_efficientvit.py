"""EfficientViT's official names; there and back without a changed bit."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.weights import table
from effseg_jax.weights.efficientvit import rows
from effseg_jax.weights.loading import export_weights, variable_shapes
from tests.models import reference
from tests.weights.official import tensor_of

ADE20K = {"num_classes": 150, "head_expand": None}


def weights(part):
  listed = reference.decoded(reference.read("efficientvit")[f"{part}/state_dict_json"])
  return {name: tensor_of(name, tuple(shape)) for name, shape in listed}


def assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("part", "fields"), [("b0_cityscapes", {}), ("b1_ade20k", ADE20K)])
def test_there_and_back(part, fields):
  net = create_model(f"efficientvit_{part[:2]}", **fields)
  official = weights(part)
  exported = export_weights(net, load_weights(net, official))
  assert list(exported) == list(official)
  assert_same(exported, official)
  assert_same(load_weights(net, {"state_dict": official}), load_weights(net, official))


@pytest.mark.parametrize("part", ["b1_cityscapes", "b2_ade20k", "b3_cityscapes"])
def test_names_order_and_shapes_are_the_official_ones(shared, part):
  variant, dataset = part.split("_")
  path = shared / "specs" / "state_dict_shapes" / f"efficientvit_{part}.json"
  listed = json.loads(path.read_text())
  net = create_model(f"efficientvit_{variant}", **(ADE20K if dataset == "ade20k" else {}))
  shapes = variable_shapes(net)
  found = [
    [row.name, list(table.official_shape(shapes[row.path], row.layout)) if row.path else []]
    for row in rows(net, shapes)
  ]
  assert found == listed
  assert {row.path for row in rows(net, shapes)} - {""} == set(shapes)


def test_backbones_of_classifiers():
  net = create_model("efficientvit_b0")
  official = weights("b0_cityscapes")
  expected = load_weights(net, official, partial="backbone")
  backbone = {name: x for name, x in official.items() if name.startswith("backbone.")}
  classifier = {"head.op_list.0.conv.weight": np.zeros((1024, 128, 1, 1), np.float32)}
  assert_same(load_weights(net, {**backbone, **classifier}, partial="backbone"), expected)
  timm = {"head.classifier.4.weight": np.zeros((1000, 1280), np.float32)}
  for name, x in backbone.items():
    name = name.removeprefix("backbone.").replace("input_stem.op_list.0.", "stem.in_conv.")
    name = name.replace("input_stem.op_list.1.", "stem.res0.")
    timm[name.replace(".op_list.", ".blocks.")] = x
  assert "stages.2.blocks.1.context_module.main.aggreg.0.0.weight" in timm
  assert_same(load_weights(net, timm, partial="backbone"), expected)
  bare = {name.removeprefix("backbone."): x for name, x in backbone.items()}
  assert_same(load_weights(net, bare, partial="backbone"), expected)


def test_the_other_head_is_named():
  with pytest.raises(UserError, match=r"head\.output_ops\.0\.op_list\.1\.conv.*The backbone fits"):
    load_weights(create_model("efficientvit_b1", num_classes=150), weights("b1_ade20k"))
  with pytest.raises(UserError, match=r"expected \(150, 128, 1, 1\)"):
    load_weights(create_model("efficientvit_b0", num_classes=150), weights("b0_cityscapes"))


def test_pytorch_loads_an_export_strictly():
  torch = pytest.importorskip("torch")
  from benchmarks.peers.efficientvit_torch import EfficientViTTorch

  net = create_model("efficientvit_b0")
  official = weights("b0_cityscapes")
  exported = export_weights(net, load_weights(net, official))
  peer = EfficientViTTorch("efficientvit_b0").eval()
  assert list(peer.state_dict()) == list(exported)
  peer.load_state_dict({name: torch.tensor(x) for name, x in exported.items()}, strict=True)
  with torch.inference_mode():
    images = torch.tensor(reference.channels_first(reference.images(96, 160)))
    found = peer(images).numpy()
  expected = reference.read("efficientvit")["b0_cityscapes/logits"]
  reference.assert_close(found, expected, 2e-4)
