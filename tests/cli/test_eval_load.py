"""What `effseg eval` takes from a checkpoint: weights of any file by its content, and the task."""

from __future__ import annotations

import numpy as np
import pytest
import small_config
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from effseg_jax import create_model, experiment
from effseg_jax.cli import eval as evaluation
from effseg_jax.input_pipeline.datasets import synthetic
from effseg_jax.weights.bundle import save_bundle
from effseg_jax.weights.loading import export_weights, variable_shapes

FIELDS = {"widths": (8, 16, 32, 32), "depths": (0, 1, 1, 1), "dropout": 0.0}


@pytest.fixture(scope="module")
def model():
  return create_model("afformer_tiny", num_classes=8, **FIELDS)


@pytest.fixture(scope="module")
def variables(model):
  """Random arrays of the model's shapes."""
  rng = np.random.default_rng(0)
  shapes = variable_shapes(model).items()
  flat = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes}
  return unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def task():
  dataset = synthetic.open_split(None, "val", size=(64, 64))
  return experiment.make_task({"name": "semantic", "normalize_by": "all"}, dataset)


def same(found, expected):
  found = flatten_dict(dict(found), sep="/")
  for name, array in flatten_dict(expected, sep="/").items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_official_files_are_told_by_their_content(tmp_path, model, variables, task, suffix):
  path = tmp_path / f"official{suffix}"
  official = {name: np.ascontiguousarray(x) for name, x in export_weights(model, variables).items()}
  if suffix == ".npz":
    np.savez(path, **official)
  else:
    save_file(official, str(path))
  _, found, same_task = evaluation.load(small_config.get_config(), path, task)
  same(found, variables)
  assert same_task == task


def test_the_task_is_that_of_the_checkpoint_and_the_classes_are_those_of_the_data(
  tmp_path, variables, task
):
  card = {
    "model": {"name": "afformer_tiny", "fields": {"num_classes": 8, **FIELDS}},
    "task": {
      "name": "semantic",
      "classes": list(synthetic.CLASSES),
      "palette": [[1, 2, 3]] * 8,
      "mean": [100.0, 101.0, 102.0],
      "std": [50.0, 51.0, 52.0],
      "normalize_by": "valid",
      "class_weights": [2.0] * 8,
    },
  }
  path = tmp_path / "bundle.safetensors"
  save_bundle(path, variables, card)
  _, found, loaded = evaluation.load(small_config.get_config(), path, task)
  same(found, variables)
  assert loaded.mean == (100.0, 101.0, 102.0)
  assert loaded.std == (50.0, 51.0, 52.0)
  assert loaded.normalize_by == "valid"
  assert loaded.palette == task.palette
  assert loaded.class_weights == ()
