"""Official files become bundles and come back."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from command import call
from flax.traverse_util import unflatten_dict

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.cli import convert
from effseg_jax.input_pipeline.datasets import DATASETS
from effseg_jax.weights.bundle import load_bundle
from effseg_jax.weights.loading import export_weights, variable_shapes
from effseg_jax.weights.reader import read_state_dict
from tests.universal_models import SMALL, SMALL_BACKBONE, SMALL_ENCODER, small_model


@pytest.fixture(scope="module")
def official(tmp_path_factory):
  """A file with official names, of 19 classes."""
  model = create_model("afformer_tiny", num_classes=19)
  rng = np.random.default_rng(0)
  names = export_weights(model, _random_variables(model, rng))
  path = tmp_path_factory.mktemp("official") / "a.npz"
  np.savez(path, **names)
  return path


def _random_variables(model, rng):
  flat = {
    path: rng.standard_normal(shape).astype(np.float32)
    for path, shape in variable_shapes(model).items()
  }
  return unflatten_dict(flat, sep="/")


def test_there_and_back(official, tmp_path, capsys):
  bundle_path, back = tmp_path / "new" / "b.safetensors", tmp_path / "back.safetensors"
  flags = ["--model=afformer_tiny", "--dataset=cityscapes", f"--input={official}"]
  call("convert", *flags, f"--output={bundle_path}")
  call("convert", f"--input={bundle_path}", f"--to_torch={back}")
  assert "19 classes, float32" in capsys.readouterr().out
  bundle = load_bundle(bundle_path)
  assert bundle.model == create_model("afformer_tiny", num_classes=19)
  task = bundle.card["task"]
  assert task["name"] == "semantic"
  assert task["classes"][0] == "road"
  assert len(task["palette"]) == 19
  assert bundle.card["converted_from"] == "a.npz"
  expected = read_state_dict(official)
  found = read_state_dict(back)
  assert set(found) == set(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_universal_models_know_their_things(tmp_path):
  small = {**SMALL, **SMALL_BACKBONE["r50"], **SMALL_ENCODER["proscale"]}
  fields = {key: value for key, value in small.items() if key != "num_classes"}
  model = small_model("proscale_r50", num_classes=133)
  names = export_weights(model, _random_variables(model, np.random.default_rng(0)))
  source, output = tmp_path / "official.npz", tmp_path / "bundle.safetensors"
  np.savez(source, **names)
  flags = ["--model=proscale_r50", "--dataset=coco_panoptic", f"--fields={json.dumps(fields)}"]
  call("convert", *flags, f"--input={source}", f"--output={output}")
  bundle = load_bundle(output)
  assert bundle.model == model
  assert bundle.card["task"]["name"] == "universal"
  assert bundle.card["task"]["classes"][0] == "person"
  assert sum(bundle.card["task"]["is_thing"]) == 80


def test_half_of_the_size(official, tmp_path):
  sizes = []
  for half in (False, True):
    path = tmp_path / f"{half}.safetensors"
    convert.to_bundle("afformer_tiny", official, path, num_classes=19, half=half)
    sizes.append(path.stat().st_size)
    leaves = jax.tree.leaves(load_weights(load_bundle(path).model, path))
    assert all(leaf.dtype == np.float32 for leaf in leaves)
  assert sizes[1] < 0.52 * sizes[0]


def test_a_file_for_pytorch(official, tmp_path):
  torch = pytest.importorskip("torch")
  bundle_path, back = tmp_path / "b.safetensors", tmp_path / "back.pth"
  convert.to_bundle("afformer_tiny", official, bundle_path, num_classes=19)
  assert convert.to_official(bundle_path, back) == 420
  state = torch.load(back, weights_only=True)["state_dict"]
  expected = read_state_dict(official)
  assert list(state) == list(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)


def test_mistakes_are_one_line(official, tmp_path, capsys):
  output = f"--output={tmp_path / 'b.safetensors'}"
  model, source = "--model=afformer_tiny", f"--input={official}"
  for flags, message in [
    ([source], "--model and --output are needed"),
    ([source, model, output], "--num_classes is needed"),
    ([source, model, output, "--dataset=cityscape"], "Did you mean 'cityscapes'"),
    ([source, model, output, "--dataset=folder"], "no segmentation data set with fixed classes"),
    ([source, model, output, "--dataset=ade20k", "--num_classes=19"], "but ade20k has 150"),
    ([source, model, output, "--dataset=ade20k"], r"has shape (19,), expected (150,)"),
    ([source, model, "--output=b.pth", "--num_classes=19"], "ends in .safetensors"),
    ([source, "--to_torch=b.onnx"], "expected a name ending in .pth"),
  ]:
    with pytest.raises(SystemExit) as caught:
      call("convert", *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
  with pytest.raises(UserError, match="missing"):
    convert.to_official(tmp_path / "none.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_a_class_table_or_one_line(name):
  try:
    classes, palette, things = convert.class_table(name, None)
  except UserError as error:
    assert "no segmentation data set with fixed classes" in str(error)
    assert name in ("folder", "imagenet", "tfds", "avss") or "synthetic" in name
  else:
    assert len(classes) == len(palette) == len(things) > 0
