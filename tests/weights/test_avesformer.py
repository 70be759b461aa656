"""ImageNet weights and VGGish into AVESFormer, part by part."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.weights import pvt, vggish
from effseg_jax.weights.bundle import save_bundle
from effseg_jax.weights.loading import export_weights, variable_shapes
from effseg_jax.weights.table import official_shape
from tests import official_weights

TINY = {"prompts": 2, "prompt_layers": 1, "depths": (1, 1, 1, 1), "width": 32, "widths": (32,) * 4,
        "hidden": 32, "prompt_hidden": 32}  # fmt: skip


def tensors(model, part, rename=lambda name: name):
  """Official name without `part.` -> tensor."""
  from effseg_jax.weights import avesformer

  shapes = variable_shapes(model)
  return {
    rename(row.name.removeprefix(f"{part}.")): official_weights.tensor(
      row.name, official_shape(shapes[row.path], row.layout)
    )
    for row in avesformer.rows(model, shapes)
    if row.path and row.name.startswith(f"{part}.")
  }


def zoo_name(name):
  """`res2.0.conv1.norm.weight` -> `layer1.0.bn1.weight`, as PyTorch's model zoo has it."""
  name = name.replace("stem.conv1.norm", "bn1").replace("stem.conv1", "conv1")
  for index in (1, 2, 3):
    name = name.replace(f"conv{index}.norm", f"bn{index}")
  name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
  return re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)


def test_a_resnet_of_the_model_zoo():
  model = create_model("avesformer_lite", **TINY)
  weights = tensors(model, "backbone", zoo_name)
  assert weights["layer1.0.conv1.weight"].shape == (64, 64, 3, 3)
  assert weights["layer2.0.downsample.1.running_var"].shape == (128,)
  weights["fc.weight"] = np.zeros((1000, 512), np.float32)
  weights["bn1.num_batches_tracked"] = np.zeros((), np.int64)
  found = load_weights(model, weights, partial="backbone")
  assert set(found) == {"params", "batch_stats"}
  assert set(found["params"]) == {"backbone"}
  stem = found["params"]["backbone"]["stem"]
  np.testing.assert_array_equal(stem["norm"]["scale"], weights["bn1.weight"])
  np.testing.assert_array_equal(
    stem["conv"]["kernel"][2, 1, 0], weights["conv1.weight"][:, 0, 2, 1]
  )
  del weights["layer4.1.bn2.bias"]
  with pytest.raises(UserError, match=r"missing: backbone\.res5\.1\.conv2\.norm\.bias"):
    load_weights(model, weights, partial="backbone")


def test_a_pvt_of_its_authors():
  model = create_model("avesformer_lite", backbone="pvt_v2_b0", **TINY)
  weights = tensors(model, "backbone")
  names = {
    "patch_embed1.proj.weight": (32, 3, 7, 7),
    "patch_embed4.norm.bias": (256,),
    "block1.1.attn.kv.weight": (64, 32),
    "block1.0.attn.sr.weight": (32, 32, 8, 8),
    "block3.0.attn.norm.weight": (160,),
    "block2.0.mlp.dwconv.dwconv.weight": (512, 1, 3, 3),
    "block4.1.mlp.fc2.bias": (256,),
    "norm4.weight": (256,),
  }
  assert {name: weights[name].shape for name in names} == names
  assert "block4.0.attn.sr.weight" not in weights
  assert all(name.startswith(pvt.BEGINNINGS) for name in weights)
  weights |= {"head.weight": np.zeros((1000, 256)), "head.bias": np.zeros(1000)}
  found = load_weights(model, weights, partial="backbone")["params"]["backbone"]
  assert sum(x.size for x in jax.tree.leaves(found)) == 3_409_760
  np.testing.assert_array_equal(
    found["stage_0_block_0"]["attention"]["reduce"]["kernel"][7, 1, 3],
    weights["block1.0.attn.sr.weight"][:, 3, 7, 1],
  )


def test_vggish_as_the_audio_backbone():
  model = create_model("avesformer_lite", audio="vggish", **TINY)
  shapes = variable_shapes(model)
  weights = {}
  for row in vggish.vggish_rows("", "audio/"):
    shape = official_shape(shapes[row.path], row.layout)
    weights[row.name] = np.broadcast_to(np.float32(len(weights)), shape)
  found = load_weights(model, weights, partial="audio")
  assert set(found) == {"params"}
  assert set(found["params"]) == {"audio"}
  assert found["params"]["audio"]["dense_2"]["bias"][0] == len(weights) - 1


def test_the_whole_model_has_bundles_alone(tmp_path):
  model = create_model("avesformer_lite", **TINY)
  shapes = variable_shapes(model)
  variables = {"params": {}, "batch_stats": {}}
  for path, shape in shapes.items():
    *parents, leaf = path.split("/")
    node = variables
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = np.full(shape, len(path), np.float32)
  card = {"model": {"name": "avesformer_lite", "fields": TINY}, "task": {}}
  save_bundle(tmp_path / "a.safetensors", variables, card)
  found = load_weights(model, tmp_path / "a.safetensors")
  jax.tree.map(np.testing.assert_array_equal, found, variables)
  part = load_weights(model, tmp_path / "a.safetensors", partial="audio")
  assert set(part["params"]) == {"audio"}

  with pytest.raises(UserError, match=r'missing: .*ours alone.*The backbone fits: partial="back'):
    load_weights(model, tensors(model, "backbone", zoo_name))
  with pytest.raises(UserError, match="cannot be exported"):
    export_weights(model, variables)
