"""Official names of the universal models and their backbones, Hugging Face's, and back."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.weights import mask2former, mask2former_huggingface, table
from effseg_jax.weights.loading import export_weights, variable_shapes
from tests import official_weights
from tests.universal_models import (
  nhwc,
  official_shapes,
  official_tensors,
  official_variables,
  small_model,
)

from .torch_files import save

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CLASS_EMBED = "sem_seg_head.predictor.class_embed"


def assert_same(found, expected):
  """Equal trees, or mappings of arrays."""
  found, expected = flatten_dict(dict(found), sep="/"), flatten_dict(dict(expected), sep="/")
  assert set(found) == set(expected)
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize(("name", "file"), [
  ("mask2former_r50", "m2f_r50"), ("mask2former_swin_tiny", "m2f_swint"),
  ("proscale_r50", "proscale333_r50"), ("proscale_swin_tiny", "proscale333_swint"),
])  # fmt: skip
def test_names_order_and_shapes_are_the_official_ones(shared, name, file):
  path = shared / "specs" / "state_dict_shapes" / f"shapes_{file}.json"
  listed = {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}
  model = create_model(name)
  shapes = variable_shapes(model)
  rows = mask2former.rows(model, shapes)
  ours = {
    row.name: table.official_shape(shapes[row.path], row.layout) if row.path else row.constant.shape
    for row in rows
  }
  assert ours.pop("criterion.empty_weight") == (134,)
  assert list(ours.items()) == list(listed.items())
  assert {row.path for row in rows} - {""} == set(shapes)


@pytest.mark.parametrize(("name", "fields"), [
  ("mask2former_swin_tiny", {}), ("proscale_r50", {}), ("eco_m2f_r50", {}),
  ("proscale_r50", {"norm": "bn", "depth": 50, "trc_gate": "conv"}),
  ("proscale_r50", {"trc_gate": "none", "light_pixel_embedding": False}),
])  # fmt: skip
def test_official_to_ours_to_official_is_exact(name, fields):
  model = small_model(name, **fields)
  tensors = official_tensors(model)
  variables = load_weights(model, tensors)
  leaves = jax.tree.leaves(variables)
  assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in leaves)
  exported = export_weights(model, variables)
  assert list(exported)[-1] == "criterion.empty_weight"
  np.testing.assert_allclose(exported["criterion.empty_weight"], [1, 1, 1, 1, 1, 0.1])
  buffers = ("criterion.empty_weight", "relative_position_index", "num_batches_tracked")
  assert_same({k: x for k, x in exported.items() if not k.endswith(buffers)}, tensors)
  assert_same(load_weights(model, exported), variables)


def test_layouts():
  model = small_model("mask2former_swin_tiny")
  tensors = official_tensors(model)
  params = load_weights(model, tensors)["params"]
  predictor = "sem_seg_head.predictor.transformer_cross_attention_layers.1.multihead_attn"
  packed = params["decoder"]["layer_1"]["cross_attention"]["in_kernel"]
  np.testing.assert_array_equal(packed[5, 128:], tensors[f"{predictor}.in_proj_weight"][128:, 5])
  patches = tensors["backbone.patch_embed.proj.weight"]
  np.testing.assert_array_equal(
    params["backbone"]["patch_embed"]["kernel"][2, 1, 0], patches[:, 0, 2, 1]
  )
  index = export_weights(model, {"params": params})[
    "backbone.layers.2.blocks.1.attn.relative_position_index"
  ]
  assert index.dtype == np.int64
  assert index.shape == (16, 16)
  # From pixel (1, 2) to (3, 0): two rows down, two columns to the left, on a table of 7x7.
  assert index[1 * 4 + 2, 3 * 4 + 0] == (1 - 3 + 3) * 7 + 2 - 0 + 3


def test_files_as_they_are_published(tmp_path):
  model = small_model("mask2former_swin_tiny")
  tensors, expected = official_tensors(model), official_variables(model)
  buffers = {
    "criterion.empty_weight": np.ones(134, np.float32),  # of other classes: not looked at
    "backbone.layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), np.int64),
  }
  path = tmp_path / "model_final.pkl"
  content = {"model": {**tensors, **buffers}, "__author__": "third_party"}
  path.write_bytes(pickle.dumps(content))
  assert_same(load_weights(model, path), expected)
  parallel = {f"module.{name}": x for name, x in {**tensors, **buffers}.items()}
  path = save(tmp_path / "model.pth", {"model": parallel, "iteration": 7})
  assert_same(load_weights(model, path), expected)
  older = {name.replace("query_feat", "static_query"): x for name, x in tensors.items()}
  assert_same(load_weights(model, older), expected)


# --- Hugging Face --------------------------------------------------------------------------------


def huggingface_model():
  return create_model(
    "mask2former_swin_tiny",
    num_classes=7,
    num_queries=13,
    features=64,
    heads=4,
    encoder_mlp_features=96,
    decoder_mlp_features=128,
    decoder_layers=3,
    encoder_layers=2,
    backbone_features=24,
    backbone_depths=(1, 1, 2, 1),
    backbone_heads=(1, 2, 3, 4),
    window=4,
  )


VERSION_4 = {
  "encoder.swin.": "encoder.",
  "attention.q_proj": "attention.self.query",
  "attention.k_proj": "attention.self.key",
  "attention.v_proj": "attention.self.value",
  "attention.o_proj": "attention.output.dense",
  "attention.relative_position_bias.": "attention.self.",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
}


def test_huggingface_outputs_under_both_versions_names():
  golden = np.load(GOLDEN / "mask2former_huggingface.npz")
  shapes = zip(golden["names"].tolist(), map(json.loads, golden["shapes"].tolist()), strict=True)
  tensors = {name: official_weights.tensor(name, tuple(shape)) for name, shape in shapes}
  model = huggingface_model()
  variables = load_weights(model, tensors)
  outputs = jax.jit(model.apply)(variables, nhwc(golden["x"]))
  for key, step in (("class_logits", 1), ("mask_logits", 2)):
    found = np.stack([prediction[key][0] for prediction in (*outputs["aux"], outputs)])
    found = found[..., ::step, ::step] if step > 1 else found
    np.testing.assert_allclose(found, golden[key], atol=2e-4, rtol=1e-4)

  older = {}
  for name, tensor in tensors.items():
    if ".encoder.swin." in name:
      for new, old in VERSION_4.items():
        name = name.replace(new, old)
    older[name] = tensor
  index = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
  older[f"{index}.relative_position_index"] = np.zeros((16, 16), np.int64)
  assert sum(name not in tensors for name in older) > 80
  assert_same(load_weights(model, older), variables)


@pytest.mark.parametrize("version_5", [False, True])
def test_huggingface_names_are_those_of_the_reference_table(shared, version_5):
  sys.path.insert(0, str(shared / "specs"))
  try:
    from hf_mask2former_names import official_to_hf
  finally:
    sys.path.pop(0)
  shapes = official_shapes(create_model("mask2former_swin_tiny"))
  tensors = {name: np.arange(shape[0], dtype=np.float32) for name, shape in shapes.items()}
  theirs = dict(pair for name, x in tensors.items() for pair in official_to_hf(name, x, version_5))
  assert_same(mask2former_huggingface.renamed(theirs), tensors)


def test_a_third_of_a_projection_that_is_missing_is_named():
  golden = np.load(GOLDEN / "mask2former_huggingface.npz")
  tensors = {
    name: np.zeros(json.loads(shape), np.float32)
    for name, shape in zip(golden["names"].tolist(), golden["shapes"].tolist(), strict=True)
  }
  del tensors["model.transformer_module.decoder.layers.1.self_attn.k_proj.bias"]
  tensors["model.transformer_module.decoder.layers.1.gate.weight"] = np.zeros(3, np.float32)
  with pytest.raises(
    UserError, match=r"layers\.1\.self_attn\.in_proj_bias.*decoder\.layers\.1\.gate"
  ):
    load_weights(huggingface_model(), tensors)


# --- ImageNet ------------------------------------------------------------------------------------


def backbone_tensors(model):
  """The backbone's official tensors without their prefix."""
  return {
    name.removeprefix("backbone."): x
    for name, x in official_tensors(model).items()
    if name.startswith("backbone.")
  }


def model_zoo_name(name):
  """`res2.0.conv2.norm.weight` -> `layer1.0.bn2.weight`."""
  block, _, leaf = name.rpartition(".")
  block = block.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
  if block.endswith(".norm"):
    block = block.removesuffix(".norm")
    block = block[:-5] + block[-5:].replace("conv", "bn")
  stage, _, rest = block.partition(".")
  stage = "" if stage == "stem" else f"layer{int(stage[3:]) - 1}."
  return f"{stage}{rest}.{leaf}"


def test_names_of_the_model_zoo():
  assert model_zoo_name("stem.conv1.norm.bias") == "bn1.bias"
  assert model_zoo_name("res3.0.shortcut.norm.weight") == "layer2.0.downsample.1.weight"
  assert model_zoo_name("res5.2.conv3.weight") == "layer4.2.conv3.weight"


@pytest.mark.parametrize(("depth", "norm"), [(18, "frozen_bn"), (50, "bn")])
def test_resnets_of_imagenet(depth, norm):
  model = small_model("proscale_r50", depth=depth, norm=norm)
  expected = {kind: tree["backbone"] for kind, tree in official_variables(model).items()}
  backbone = backbone_tensors(model)
  zoo = {model_zoo_name(name): x for name, x in backbone.items()}
  zoo |= {"fc.weight": np.zeros((1000, 8)), "fc.bias": np.zeros(1000)}
  zoo["bn1.num_batches_tracked"] = np.zeros((), np.int64)
  detectron2 = {"model": {**backbone, "stem.fc.bias": np.zeros(1000)}, "__author__": "torchvision"}
  for source in (zoo, detectron2, official_tensors(model)):
    found = load_weights(model, source, partial="backbone")
    assert set(found) == {"params", "batch_stats"}
    assert_same({kind: tree["backbone"] for kind, tree in found.items()}, expected)


def test_swins_of_imagenet_get_output_norms_that_change_nothing():
  model = small_model("mask2former_swin_tiny")
  backbone = {name: x for name, x in backbone_tensors(model).items() if not name.startswith("norm")}
  expected = official_variables(model)["params"]["backbone"]
  for stage in range(4):
    ones, zeros = np.ones(8 * 2**stage), np.zeros(8 * 2**stage)
    expected[f"norm_{stage}"] = {"scale": ones, "bias": zeros}
  classifier = {
    "norm.weight": np.zeros(64),
    "norm.bias": np.zeros(64),
    "head.weight": np.zeros((1000, 64)),
    "head.bias": np.zeros(1000),
    "layers.0.blocks.1.attn_mask": np.zeros((64, 16, 16)),
  }
  found = load_weights(model, {"model": {**backbone, **classifier}}, partial="backbone")
  assert_same(found["params"]["backbone"], expected)
  with pytest.raises(UserError, match=r"missing: backbone\.norm0\.weight"):
    load_weights(model, backbone, partial="backbone")  # no classifier: something was lost


# --- What does not fit ---------------------------------------------------------------------------


def test_a_head_of_other_classes_is_named_and_left_out_when_asked():
  tensors = official_tensors(small_model("proscale_r50"))
  other = small_model("proscale_r50", num_classes=9)
  with pytest.raises(UserError) as caught:
    load_weights(other, tensors)
  message = str(caught.value)
  assert f"{CLASS_EMBED}.weight has shape (6, 64), expected (10, 64)" in message
  assert "one row for each class and one for no object" in message
  assert message.endswith('The body fits: partial="body" loads it alone.')
  body = load_weights(other, tensors, partial="body")
  whole = official_variables(small_model("proscale_r50"))
  assert whole["params"]["decoder"]["head"].pop("classify")
  assert_same(body, whole)


def test_every_difference_is_named_at_once():
  model = small_model("mask2former_r50")
  tensors = official_tensors(model)
  del tensors["sem_seg_head.predictor.query_embed.weight"]
  tensors["sem_seg_head.pixel_decoder.transformer.level_embed"] = np.zeros((3, 7), np.float32)
  tensors["sem_seg_head.predictor.input_proj.0.weight"] = np.zeros((3, 7), np.float32)
  pattern = (
    r"1 missing: \S+query_embed\.weight; 1 unexpected: \S+input_proj\.0\.weight; 1 of the wrong"
    r".*level_embed has shape \(3, 7\), expected \(3, 64\)\. The backbone fits"
  )
  with pytest.raises(UserError, match=pattern):
    load_weights(model, tensors)


def test_another_variants_file_is_refused():
  tensors = official_tensors(small_model("proscale_r50"))
  with pytest.raises(UserError, match=r"missing: \S+layer_1\.weight.*unexpected: \S+token_excite"):
    load_weights(small_model("mask2former_r50", encoder_layers=3), tensors)
  with pytest.raises(UserError, match=r"backbone\.res2\.0\.conv3\.weight"):
    load_weights(small_model("proscale_r50", depth=50), tensors)
