"""Names of the models on a plain ViT: official and Hugging Face's, DINOv2's, timm's; and sizes."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.weights import eomt, segvit, setr, table
from effseg_jax.weights.loading import export_weights, variable_shapes
from tests.vit_models import (
  FEATURES,
  assert_close,
  channels_first,
  golden,
  images,
  loaded,
  official,
  tensor,
  tensors,
)

FILES = {
  "eomt": "eomt_vit_s",
  "setr_naive": "setr_naive_l16",
  "setr_mla": "setr_mla_l16",
  "segvit": "segvit_b16",
  "segvit_shrunk": "segvit_shrunk_l16",
}


def assert_same(found, expected):
  found, expected = flatten_dict(dict(found), sep="/"), flatten_dict(dict(expected), sep="/")
  assert set(found) == set(expected)
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize(("name", "file", "rows"), [
  ("eomt_vit_s", "eomt_vit_s", eomt.rows),
  ("setr_naive_l16", "setr_naive_l16_ade20k", setr.rows),
  ("setr_pup_l16", "setr_pup_l16_ade20k", setr.rows),
  ("setr_mla_l16", "setr_mla_l16_ade20k", setr.rows),
  ("segvit_b16", "segvit_b16_ade20k", segvit.rows),
  ("segvit_shrunk_l16", "segvit_shrunk_l16_ade20k", segvit.rows),
])  # fmt: skip
def test_names_order_and_shapes_are_the_official_ones(shared, name, file, rows):
  listed = json.loads((shared / "specs" / "state_dict_shapes" / f"{file}.json").read_text())
  listed = listed.items() if isinstance(listed, dict) else [row[:2] for row in listed]
  model = create_model(name)
  shapes = variable_shapes(model)
  ours = [
    (
      row.name,
      table.official_shape(shapes[row.path], row.layout) if row.path else row.constant.shape,
    )
    for row in rows(model, shapes)
  ]
  assert ours == [(key, tuple(shape)) for key, shape in listed]


@pytest.mark.parametrize("file", FILES)
def test_official_to_ours_to_official_is_exact(file):
  model, variables = loaded(FILES[file], file)
  exported = export_weights(model, variables)
  # The reference of EoMT is the network alone, without the buffer of its loss.
  own = [name for name in exported if name in official(file) or name != "criterion.empty_weight"]
  assert own == [row[0] for row in golden(file)["state_dict"]]
  for name, array in official(file).items():
    np.testing.assert_array_equal(exported[name], array, err_msg=name)
  assert_same(load_weights(model, exported), variables)


def test_layouts():
  model, variables = loaded("eomt_vit_s", "eomt")
  made, params = official("eomt"), variables["params"]
  block = "network.encoder.backbone.blocks.2.attn.qkv"
  attention = params["backbone"]["block_2"]["attention"]
  np.testing.assert_array_equal(attention["qkv_kernel"][5, 2], made[f"{block}.weight"][96:, 5])
  np.testing.assert_array_equal(attention["qkv_bias"][1], made[f"{block}.bias"][48:96])
  doubling = made["network.upscale.1.conv1.weight"]  # (in, out, 2, 2)
  np.testing.assert_array_equal(
    params["head"]["scale_1"]["conv1"]["kernel"][1, 0], doubling[:, :, 1, 0]
  )
  constants = export_weights(model, variables)
  np.testing.assert_allclose(constants["network.encoder.pixel_mean"].ravel(), [0.485, 0.456, 0.406])
  np.testing.assert_allclose(constants["criterion.empty_weight"][-2:], [1.0, 0.1])


def test_lightning_checkpoints_are_read():
  model, variables = loaded("eomt_vit_s", "eomt")
  state = {
    name.replace("network.", "network._orig_mod.", 1): x for name, x in official("eomt").items()
  }
  state["criterion.empty_weight"] = np.ones(7, np.float32)
  assert_same(load_weights(model, {"state_dict": state, "epoch": 3}), variables)


def test_huggingface_weights_give_huggingface_outputs():
  reference = golden("eomt_huggingface")
  model = create_model("eomt_vit_s", **reference["dinov2/fields"])
  theirs = tensors(reference["dinov2/state_dict"])
  theirs["attn_mask_probs"] = np.zeros(3, np.float32)
  variables = load_weights(model, theirs)
  x = images(int(reference["dinov2/image_seed"]), 1, 64, 64)
  apply = jax.jit(lambda v, x, p: model.apply(v, x, mask_probs=p, rngs={"mask": jax.random.key(0)}))
  for kind, probs in (("off", np.zeros(3, np.float32)), ("on", np.ones(3, np.float32))):
    found = apply(variables, x, probs)
    for name in ("class_logits", "mask_logits"):
      assert_close(found[name], reference[f"dinov2/{kind}/{name}"], 1e-4)
  # Their names, one by one.
  made = {
    name: np.full(tensor(name, shape).shape, index, np.float32)
    for index, (name, shape, *_) in enumerate(reference["dinov2/state_dict"])
  }
  ours, thirds = eomt.renamed(model, made), {}
  for theirs_name, name, third in reference["names"]:
    if name in ours and third is None:
      np.testing.assert_array_equal(ours[name].ravel(), made[theirs_name].ravel())
    elif third is not None:
      thirds.setdefault(name, {})[third] = made[theirs_name]
  for name, parts in thirds.items():
    np.testing.assert_array_equal(ours[name], np.concatenate([parts[i] for i in range(3)]))
  assert len(thirds) == 10 and set(ours) == {
    name for _, name, _ in reference["names"] if not re.search("attn_mask_probs|empty_weight", name)
  }


# --- DINOv2 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["64x64", "80x112"])
def test_dinov2_becomes_eomts_backbone(size, capsys):
  reference = golden("eomt_init")
  rows, cols = map(int, size.split("x"))
  model = create_model("eomt_vit_s", image_size=(rows, cols), **reference["fields"])
  hub = tensors(reference["hub_state_dict"])
  variables = load_weights(model, hub, partial="backbone")
  said = capsys.readouterr().err.splitlines()
  assert said == [
    f"the given mapping: positions of 5x5 patches were resized to {rows // 16}x{cols // 16}.",
    "the given mapping: patch kernels of 14x14 pixels were resized to 16x16.",
  ]
  assert set(variables["params"]) == {"backbone"}
  backbone = variables["params"]["backbone"]
  np.testing.assert_allclose(backbone["cls_token"], reference["cls_token"], atol=1e-6)
  np.testing.assert_allclose(backbone["reg_token"], reference["reg_token"], atol=1e-6)
  np.testing.assert_allclose(backbone["pos_embed"], reference[f"{size}/pos_embed"], atol=2e-6)
  kernel = backbone["patch_embed"]["kernel"].transpose(3, 2, 0, 1)
  assert_close(kernel, reference["patch_embed.proj.weight"], 2e-6)
  features = create_model(
    "eomt_vit_s", image_size=(rows, cols), features_only=True, **reference["fields"]
  )
  found = jax.jit(features.apply)(variables, images(0, 1, rows, cols))
  assert_close(channels_first(found), reference[f"{size}/features"], FEATURES)
  # timm's file lacks the class token's position, which it has added already.
  timm = {("reg_token" if k == "register_tokens" else k): x for k, x in hub.items()}
  timm["cls_token"] = timm["cls_token"] + timm["pos_embed"][:, :1]
  timm["pos_embed"] = timm["pos_embed"][:, 1:]
  assert_same(load_weights(model, timm, partial="backbone"), variables)


def test_dinov2_is_the_same_function_at_its_own_sizes():
  reference = golden("eomt_init")
  fields = {**reference["fields"], "features_only": True}
  model = create_model("eomt_vit_s", image_size=70, patch_size=14, **fields)
  variables = load_weights(model, tensors(reference["hub_state_dict"]))
  found = jax.jit(model.apply)(variables, images(0, 1, 70, 70))
  assert_close(channels_first(found), reference["hub/70x70/features"], FEATURES)


@pytest.mark.parametrize("source, grid", [("pos37", "32x32"), ("pos37", "20x30")])
def test_positions_of_dinov2_at_their_real_size(source, grid):
  reference = golden("eomt_init")
  from effseg_jax.weights import vit

  rows, cols = map(int, grid.split("x"))
  model = create_model("eomt_vit_s", embed_dim=3, num_heads=1, image_size=(16 * rows, 16 * cols))
  found, lines = vit.resize_backbone(
    model.vit(), {"p": reference[f"{source}/param"]}, "p", "k", "antialias"
  )
  assert lines and np.abs(found["p"] - reference[f"{source}/{grid}"]).max() < 5e-6


@pytest.mark.parametrize("size", [16, 8])
def test_patch_kernels_of_dinov2_at_their_real_size(size):
  reference = golden("eomt_init")
  from effseg_jax.weights import vit

  model = create_model("eomt_vit_s", patch_size=size)
  found, _ = vit.resize_backbone(
    model.vit(), {"k": reference["kernel14/param"]}, "p", "k", "antialias"
  )
  assert_close(found["k"], reference[f"kernel14/{size}x{size}"], 2e-6)


# --- What does not fit ---------------------------------------------------------------------------


def test_another_image_size_is_refused_and_resized_when_asked(capsys):
  fields = dict(golden("eomt")["fields"], image_size=(80, 112))
  model = create_model("eomt_vit_s", **fields)
  with pytest.raises(
    UserError, match=r"positions of 5x7 patches.*resize=True fits others"
  ) as caught:
    load_weights(model, official("eomt"))
  assert "\n" not in str(caught.value)
  assert capsys.readouterr().err == ""
  variables = load_weights(model, official("eomt"), resize=True)
  assert "positions of 4x4 patches were resized to 5x7" in capsys.readouterr().err
  assert variables["params"]["backbone"]["pos_embed"].shape == (1, 35, 48)


@pytest.mark.parametrize(("file", "method"), [("setr_mla", "bilinear"), ("segvit", "bicubic")])
def test_positions_are_resized_at_load_time_as_at_run_time(file, method, capsys):
  from effseg_jax.models.backbones.vit import resize_positions

  model = create_model(FILES[file], **dict(golden(file)["fields"], image_size=96))
  variables = load_weights(model, official(file), resize=True)
  assert "positions of 4x4 patches were resized to 6x6" in capsys.readouterr().err
  table_ = official(file)["backbone.pos_embed"]
  expected = resize_positions(table_[:, 1:], (4, 4), (6, 6), method)
  found = variables["params"]["backbone"]["pos_embed"]
  np.testing.assert_allclose(found[:, 1:], expected, atol=1e-6)
  np.testing.assert_array_equal(found[:, :1], table_[:, :1])


def test_patches_of_another_size_are_named():
  made = dict(official("setr_mla"))
  made["backbone.patch_embed.projection.weight"] = np.zeros((48, 3, 14, 14), np.float32)
  model, _ = loaded("setr_mla_l16", "setr_mla")
  with pytest.raises(UserError, match=r"\(48, 3, 14, 14\), expected .*patches of 16x16 pixels"):
    load_weights(model, made, partial="backbone")


def test_positions_of_no_square_are_one_line():
  made = {**official("setr_mla"), "backbone.pos_embed": np.zeros((1, 24, 48), np.float32)}
  with pytest.raises(
    UserError, match="has 24 positions; expected a square of patches and the class"
  ):
    load_weights(loaded("setr_mla_l16", "setr_mla")[0], made, partial="backbone")


def test_dinov3_is_one_line():
  rows = golden("eomt_huggingface")["dinov3/state_dict"]
  model = create_model("eomt_vit_s", **golden("eomt_huggingface")["dinov2/fields"])
  for names in (
    tensors(rows),
    {"rope_embed.periods": np.zeros(12), "storage_tokens": np.zeros((1, 4, 48))},
    {"network.encoder.backbone.rope_embed.periods": np.zeros(12)},
  ):
    with pytest.raises(
      UserError, match=r"DINOv3.*licence of its own.*use those of DINOv2"
    ) as caught:
      load_weights(model, names, partial="backbone")
    assert "\n" not in str(caught.value)


def test_other_classes_leave_the_body():
  fields = dict(golden("eomt")["fields"], num_classes=9)
  model = create_model("eomt_vit_s", **fields)
  with pytest.raises(UserError) as caught:
    load_weights(model, official("eomt"))
  message = str(caught.value)
  assert "network.class_head.weight has shape (7, 48), expected (10, 48)" in message
  assert "one row for each class and one for no object" in message
  assert message.endswith('The body fits: partial="body" loads it alone.')
  body = load_weights(model, official("eomt"), partial="body")
  whole = load_weights(create_model("eomt_vit_s", **golden("eomt")["fields"]), official("eomt"))
  assert whole["params"]["head"].pop("classify")
  assert_same(body, whole)


def test_auxiliary_heads_of_a_file_are_ignored_where_there_are_none():
  model, variables = loaded("setr_naive_l16", "setr_naive")
  found = load_weights(model.clone(auxiliary=False), official("setr_naive"))
  kept = {
    kind: {name: x for name, x in tree.items() if not name.startswith("auxiliary")}
    for kind, tree in variables.items()
  }
  assert_same(found, kept)
  made = {k: x for k, x in official("setr_naive").items() if "auxiliary_head.1." not in k}
  with pytest.raises(UserError, match=r"missing: auxiliary_head\.1\.conv_seg\.weight"):
    load_weights(model, made)
