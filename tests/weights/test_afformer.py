"""Official AFFormer names, shapes and order; there and back without a changed bit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.weights import table
from effseg_jax.weights.loading import export_weights, variable_shapes

from . import official
from .official import SIZES


@pytest.mark.parametrize(("size", "entries", "distinct"), [
  ("tiny", 420, 308), ("small", 420, 308), ("base", 476, 336),
])  # fmt: skip
def test_the_number_of_entries_is_the_official_one(size, entries, distinct):
  rows = official.rows(size)
  assert len(rows) == entries
  assert len({row.canonical or row.name for row in rows}) == distinct


@pytest.mark.parametrize("size", SIZES)
def test_names_order_shapes_and_aliases_are_the_official_ones(shared, size):
  shapes = variable_shapes(create_model(f"afformer_{size}"))
  listed = official.listed(shared, size)
  rows = official.rows(size)
  assert [row.name for row in rows] == [entry[0] for entry in listed]
  assert [row.canonical or row.name for row in rows] == [entry[3] for entry in listed]
  for row, (name, shape, dtype, _) in zip(rows, listed, strict=True):
    if row.path:
      assert table.official_shape(shapes[row.path], row.layout) == tuple(shape), name
    else:
      assert (shape, dtype) == ([], "int64")
  assert {row.path for row in rows} - {""} == set(shapes)


@pytest.mark.parametrize("size", SIZES)
def test_official_to_ours_to_official_is_exact(size):
  model = create_model(f"afformer_{size}")
  weights = official.weights(size)
  variables = load_weights(model, weights)
  assert all(
    isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables)
  )
  assert {
    path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()
  } == variable_shapes(model)
  exported = export_weights(model, variables)
  assert list(exported) == list(weights)
  for name, array in weights.items():
    assert exported[name].dtype == array.dtype
    np.testing.assert_array_equal(exported[name], array, err_msg=name)


def test_layouts():
  model = create_model("afformer_tiny")
  weights = official.weights("tiny")
  params = load_weights(model, weights)["params"]
  stem = weights["backbone.stem.0.conv.weight"]
  np.testing.assert_array_equal(
    params["backbone"]["stem_0"]["conv"]["kernel"][2, 1, 0], stem[:, 0, 2, 1]
  )
  block = params["backbone"]["stage_2"]["block_3"]
  layer = "backbone.mhca_stages.2.mhca_blks.0.MHCA_layers.3"
  np.testing.assert_array_equal(
    block["filter"]["qkv"]["kernel"][5], weights[f"{layer}.factoratt_crpe.qkv.weight"][:, 5]
  )
  depthwise = weights[f"{layer}.mlp.dwconv.dwconv.weight"]
  np.testing.assert_array_equal(block["mlp"]["depthwise"]["kernel"][2, 1, 0], depthwise[:, 0, 2, 1])


def test_dead_layers_are_zero_where_a_run_did_not_keep_them():
  model = create_model("afformer_tiny")
  weights = official.weights("tiny")
  variables = load_weights(model, weights)
  variables.pop("unused")
  exported = export_weights(model, variables)
  assert list(exported) == list(weights)
  assert not exported["decode_head.align.conv.weight"].any()


@pytest.mark.parametrize("head", ["linear", "image"])
def test_other_heads_take_the_backbone_and_say_so(head):
  model = create_model("afformer_tiny", head=head, num_classes=150)
  weights = official.weights("tiny")
  with pytest.raises(UserError, match=r"head/classify/bias \(ours alone\).*The backbone fits"):
    load_weights(model, weights)
  whole = load_weights(create_model("afformer_tiny"), weights)
  part = load_weights(model, weights, partial="backbone")
  jax.tree.map(
    np.testing.assert_array_equal, part["params"]["backbone"], whole["params"]["backbone"]
  )
  with pytest.raises(UserError, match="cannot be exported: the official model has no params/head"):
    export_weights(
      model,
      {
        **whole,
        "params": {
          **whole["params"],
          "head": {
            "classify": {
              "kernel": np.zeros((1, 1, 216, 150), np.float32),
              "bias": np.zeros(150, np.float32),
            }
          },
        },
        "unused": {},
      },
    )


def test_inputs_of_other_channels_and_features_alone():
  weights = official.weights("tiny")
  weights["backbone.stem.0.conv.weight"] = np.ones((16, 4, 3, 3), np.float32)
  model = create_model("afformer_tiny", in_channels=4)
  stem = load_weights(model, weights)["params"]["backbone"]["stem_0"]["conv"]["kernel"]
  assert stem.shape == (3, 3, 4, 16)
  features = create_model("afformer_tiny", in_channels=4, features_only=True)
  variables = load_weights(features, weights, partial="backbone")
  assert set(variables) == {"params", "batch_stats"}
  backbone = {k: v for k, v in weights.items() if k.startswith("backbone.")}
  assert list(export_weights(features, variables)) == list(backbone)


@pytest.mark.parametrize("mode", ["spatial", "fft", "fft_circular", "fft_ideal"])
def test_every_formulation_takes_the_official_weights(mode):
  weights = official.weights("tiny")
  expected = load_weights(create_model("afformer_tiny"), weights)
  found = load_weights(create_model("afformer_tiny", filter_mode=mode), weights)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_filters_without_official_weights_are_named():
  model = create_model("afformer_tiny", filter_mode="vanilla")
  with pytest.raises(UserError, match=r"filters/vanilla_real \(ours alone\).*unexpected: .*crpe"):
    load_weights(model, official.weights("tiny"), partial="backbone")


def test_an_exported_state_dict_must_be_complete():
  model = create_model("afformer_tiny")
  variables = load_weights(model, official.weights("tiny"))
  del variables["params"]["head"]["classify"]["bias"]
  variables["params"]["head"]["norm"]["offset"] = np.zeros(256, np.float32)
  with pytest.raises(UserError, match=r"params/head/classify/bias.*params/head/norm/offset"):
    export_weights(model, variables)


@pytest.mark.parametrize("size", SIZES)
def test_pytorch_loads_an_export_strictly(size, tmp_path):
  torch = pytest.importorskip("torch")
  from benchmarks.peers.afformer_torch import AFFormerTorch

  weights = official.weights(size)
  model = create_model(f"afformer_{size}")
  exported = export_weights(model, load_weights(model, weights))
  path = tmp_path / "a.pth"
  torch.save({"state_dict": {k: torch.tensor(v) for k, v in exported.items()}}, path)
  peer = AFFormerTorch(f"afformer_{size}", 150)
  peer.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
  assert list(peer.state_dict()) == list(weights)
  # What PyTorch writes of its shared modules comes back as it was.
  torch.save(peer.state_dict(), path)
  again = export_weights(model, load_weights(model, path))
  for name, array in weights.items():
    np.testing.assert_array_equal(again[name], array, err_msg=name)
