"""From a configuration to a run's parts: the data set's options, and weights to start from."""

from __future__ import annotations

import functools
import importlib
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from effseg_jax import UserError, cli, create_model, experiment
from effseg_jax.cli import train
from effseg_jax.input_pipeline import datasets
from effseg_jax.run.checkpoint import initialise_from
from effseg_jax.training.state import TrainState
from effseg_jax.weights import avesformer
from effseg_jax.weights.bundle import save_bundle
from effseg_jax.weights.loading import export_weights, variable_shapes
from effseg_jax.weights.table import official_shape

CONFIGS = Path(__file__).parents[1] / "configs" / "afformer"
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")

# Options of the data set.


@pytest.mark.parametrize("name", [*EXPERIMENTS, "coco_stuff:base_164k"])
def test_every_option_of_the_data_set_is_listed_with_its_default(name):
  name, _, variant = name.partition(":")
  config = importlib.import_module(f"effseg_jax.configs.afformer.{name}").get_config(
    variant or "tiny"
  )
  module, _, function = datasets.DATASETS[config.data.name].partition(":")
  opener = getattr(importlib.import_module(module), function or "open_split")
  known = list(inspect.signature(opener).parameters.values())[2:]
  defaults = {parameter.name: parameter.default for parameter in known}
  assert config.data.options.to_dict() == defaults


@pytest.mark.parametrize(
  ("file", "option", "text", "value"),
  [
    ("folder.py", "ignore", "0", 0),
    ("cityscapes.py", "labels", "train_ids", "train_ids"),
    ("coco_stuff.py:base_164k", "labels", "ids", "ids"),
    ("synthetic.py", "seed", "3", 3),
    ("synthetic.py", "size", "(64,96)", (64, 96)),
  ],
)
def test_options_are_set_from_the_command_line(file, option, text, value):
  words = [f"--config={CONFIGS / file}", f"--config.data.options.{option}={text}"]
  values, _ = cli.parse(train, words)
  assert values.config.data.options[option] == value


# Weights to start from.

FIELDS = {"widths": (8, 16, 16, 16), "depths": (0, 1, 1, 1)}
NAME = "afformer_tiny"


@functools.cache
def model(num_classes):
  return create_model(NAME, num_classes=num_classes, **FIELDS)


@functools.cache
def variables(num_classes, seed=0):
  """Random arrays of the model's shapes."""
  rng = np.random.default_rng(seed)
  shapes = variable_shapes(model(num_classes))
  flat = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
  return unflatten_dict({name: x.astype(np.float32) for name, x in flat.items()}, sep="/")


@pytest.fixture(scope="module")
def official():
  return export_weights(model(5), variables(5))


def read(path, num_classes):
  found = experiment.read_variables(str(path), model(num_classes))
  return flatten_dict(dict(found), sep="/")


def same(found, expected):
  assert set(found) == set(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def backbone_of(tree):
  flat = flatten_dict(tree, sep="/")
  return {name: x for name, x in flat.items() if name.split("/")[1] == "backbone"}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("num_classes", [5, 3])
def test_official_files_give_the_backbone(tmp_path, official, suffix, num_classes):
  path = tmp_path / f"official{suffix}"
  if suffix == ".npz":
    np.savez(path, **official)
  else:
    save_file(official, str(path))
  same(read(path, num_classes), backbone_of(variables(5)))


@pytest.mark.parametrize("num_classes", [5, 3])
def test_bundles_give_all_they_have(tmp_path, num_classes):
  path = tmp_path / "bundle.safetensors"
  card = {"model": {"name": NAME, "fields": {"num_classes": 5, **FIELDS}}, "task": {}}
  save_bundle(path, variables(5), card)
  same(read(path, num_classes), flatten_dict(variables(5), sep="/"))


def test_a_bundle_of_another_head_leaves_the_head_alone(tmp_path, capsys):
  path = tmp_path / "bundle.safetensors"
  card = {"model": {"name": NAME, "fields": {"num_classes": 5, **FIELDS}}, "task": {}}
  save_bundle(path, variables(5), card)
  fresh = jax.tree.map(jnp.asarray, variables(3, seed=1))
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=fresh["params"],
    model_state={"batch_stats": fresh["batch_stats"]},
    opt_state=(),
    average={},
    rng=jnp.zeros((2,), jnp.uint32),
    skipped=jnp.zeros((), jnp.int32),
  )
  started = initialise_from(state, experiment.read_variables(str(path), model(3)), str(path))
  same(backbone_of(dict(started.variables())), backbone_of(variables(5)))
  head = [name for name, shape in variable_shapes(model(3)).items() if shape[-1] == 3]
  found = flatten_dict(dict(started.variables()), sep="/")
  said = capsys.readouterr().out
  assert head
  for name in head:
    np.testing.assert_array_equal(found[name], flatten_dict(fresh, sep="/")[name])
    assert f"not loaded: {name}" in said


def test_what_cannot_be_read_is_explained(tmp_path):
  with pytest.raises(UserError, match=r"init_from: .*nothing\.npz does not exist"):
    experiment.read_variables(str(tmp_path / "nothing.npz"), model(3))
  (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
  with pytest.raises(UserError, match=r"damaged\.safetensors"):
    experiment.read_variables(str(tmp_path / "damaged.safetensors"), model(3))
  with pytest.raises(UserError, match="holds no checkpoint"):
    experiment.read_variables(str(tmp_path), model(3))
  np.savez(tmp_path / "other.npz", **{"conv.weight": np.zeros((1, 1, 1, 1), np.float32)})
  with pytest.raises(UserError, match="missing"):
    experiment.read_variables(str(tmp_path / "other.npz"), model(3))


def test_several_files_are_put_together(tmp_path):
  fields = {"num_classes": 1, "backbone": "resnet18", "width": 32, "widths": (32,) * 4}
  fields |= {"depths": (1,) * 4, "hidden": 32, "prompts": 2, "prompt_layers": 1}
  audio_visual = create_model("avesformer_r18", **fields)
  shapes = variable_shapes(audio_visual)
  for part, kept in (("backbone", "resnet18"), ("audio", "vggish")):
    held = {
      row.name.removeprefix(f"{part}."): np.zeros(
        official_shape(shapes[row.path], row.layout), np.float32
      )
      for row in avesformer.rows(audio_visual, shapes)
      if row.path and row.name.startswith(f"{part}.")
    }
    save_file(held, str(tmp_path / f"{kept}.safetensors"))
  files = [str(tmp_path / f"{kept}.safetensors") for kept in ("resnet18", "vggish")]
  found = experiment.read_variables(",".join(files), audio_visual)
  assert set(found["params"]) == {"backbone", "audio"}
  assert set(experiment.read_variables(files[1], audio_visual)["params"]) == {"audio"}
