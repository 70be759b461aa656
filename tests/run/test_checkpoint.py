"""Checkpoints: a run goes on bit for bit, the best one stays, and mistakes are explained."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import loader
from effseg_jax.input_pipeline import transforms_semantic as transforms
from effseg_jax.run import saved_model
from effseg_jax.run.checkpoint import (
  Checkpointer,
  RunDescription,
  initialise_from,
)
from effseg_jax.run.saved_model import load_for_inference
from effseg_jax.tasks.semantic import SemanticTask
from effseg_jax.training import sharding
from effseg_jax.training.state import init_state
from effseg_jax.training.step import compile_train_step, make_train_step

SIZE = 16
CARD = {
  "model": {"name": "afformer_tiny", "fields": {"num_classes": 3}},
  "task": {"name": "semantic", "classes": ["a", "b", "c"]},
}
POSITION = {
  "seed": 0,
  "batch_size": 4,
  "data": "noise",
  "options": {"size": (8, 8)},
  "examples": 6,
  "classes": [f"class {number}" for number in range(9)],
}
SGD = optax.sgd(0.1, momentum=0.9)


class Net(nn.Module):
  """A convolution with batch statistics, and a head."""

  num_classes: int = 3

  @nn.compact
  def __call__(self, images, train):
    x = nn.Conv(8, (3, 3), name="conv")(images)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
    x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
    return nn.Conv(self.num_classes, (1, 1), name="head")(x)


class Noise:
  """Six pictures."""

  name = "noise"

  def __len__(self):
    return 6

  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    label = rng.integers(0, 3, (SIZE, SIZE), np.uint8)
    return {
      "image": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
      "label": label,
      "valid_size": np.array(label.shape, np.int32),
    }


def _batches(start=0):
  augment = transforms.semantic_transforms(
    scale=(SIZE, SIZE),
    ratio=(0.8, 1.3),
    crop=(SIZE, SIZE),
    max_class_share=0.75,
    flip=0.5,
    photometric=True,
  )
  return loader.train_batches(Noise(), augment, batch_size=4, seed=0, start=start)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})


@pytest.fixture(scope="module")
def fresh(mesh):
  """Makes states of step 0."""

  def make(num_classes=3, optimizer=SGD):
    return init_state(
      Net(num_classes),
      (jax.ShapeDtypeStruct((4, SIZE, SIZE, 3), jnp.float32),),
      optimizer,
      seed=1,
      keep_average=True,
      rules=((".*", "fsdp"),),
      mesh=mesh,
    )

  return make


@pytest.fixture(scope="module")
def train_step(mesh, fresh):
  task = SemanticTask(("a", "b", "c"), ((0, 0, 0),) * 3, normalize_by="valid")
  return compile_train_step(make_train_step(Net(), task, SGD, average_decay=0.9), fresh(), mesh)


@pytest.fixture
def open_run(tmp_path):
  """Opens the checkpoints of one working directory."""

  def open_with(keep=2, metric="mIoU", **changes):
    run = RunDescription({"eval": {"best_by": metric}}, CARD, {**POSITION, **changes})
    return Checkpointer(tmp_path, run, keep=keep, metric=metric)

  return open_with


def _train(state, batches, steps, train_step, mesh):
  losses = []
  for _ in range(steps):
    state, report = train_step(state, sharding.put_batch(next(batches), mesh))
    losses.append(float(report.scalars["loss"]))
  return state, losses


def _same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_the_best_may_be_chosen_by_another_metric_later(open_run, fresh, tmp_path):
  checkpointer = open_run(keep=3)
  _save_steps(checkpointer, fresh(), {1: 0.9, 2: 0.1, 3: None})
  checkpointer.close()
  _chosen(tmp_path, 1)
  again = open_run(keep=3, metric="pixel_accuracy")
  again.save(fresh().replace(step=jnp.asarray(4, jnp.int32)), {"pixel_accuracy": 0.5})
  again.close()
  _chosen(tmp_path, 2)  # of the metric that the latest step names
  again = open_run(keep=1, metric="PQ")  # which no checkpoint has
  again.save(fresh().replace(step=jnp.asarray(5, jnp.int32)), {"PQ": 0.1})
  again.save(fresh().replace(step=jnp.asarray(6, jnp.int32)), {"PQ": 0.0})
  again.close()
  assert _saved(tmp_path) == [5, 6]
  _chosen(tmp_path, 5)


def _chosen(tmp_path, step):
  """Asserts which step's folder inference reads."""
  assert saved_model._step_folder(tmp_path).name == str(step)


def _saved(tmp_path):
  return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())


def _save_steps(checkpointer, state, scores):
  for step, score in scores.items():
    state = state.replace(step=jnp.asarray(step, jnp.int32))
    metrics = None if score is None else {"mIoU": score, "pixel_accuracy": 1 - score}
    checkpointer.save(state, metrics)


def test_a_stopped_run_goes_on_bit_for_bit(open_run, fresh, train_step, mesh):
  whole, expected = _train(fresh(), _batches(), 7, train_step, mesh)

  batches = _batches()
  state, first = _train(fresh(), batches, 3, train_step, mesh)
  checkpointer = open_run()
  checkpointer.save(state)
  # The state may be given away at once: what is saved is what it was.
  _train(state, batches, 1, train_step, mesh)
  checkpointer.close()

  again = open_run()
  state = again.restore(fresh())
  assert int(state.step) == 3
  kernel = state.params["conv"]["kernel"]
  assert kernel.sharding == fresh().params["conv"]["kernel"].sharding
  state, rest = _train(state, _batches(start=3), 4, train_step, mesh)
  again.close()
  assert first + rest == expected
  _same(state, whole)


def test_nothing_saved_is_none(open_run, fresh):
  checkpointer = open_run()
  assert checkpointer.restore(fresh()) is None
  checkpointer.close()


def test_the_best_stays_and_is_what_inference_takes(open_run, fresh, tmp_path):
  state = fresh()
  checkpointer = open_run(keep=1)
  _save_steps(checkpointer, state, {1: 0.2, 2: 0.9, 3: 0.3, 4: None})
  checkpointer.close()
  assert _saved(tmp_path) == [2, 4]

  marked = jax.tree.map(lambda x: x + 1, state)
  checkpointer = open_run(keep=1)  # a run that goes on remembers what was best
  _save_steps(checkpointer, marked, {5: 0.5, 6: 0.1})
  checkpointer.close()
  assert _saved(tmp_path) == [2, 6]

  bundle = load_for_inference(tmp_path)
  _same(bundle.variables, state.eval_variables())
  assert bundle.card == CARD
  assert bundle.model.num_classes == 3
  latest = load_for_inference(tmp_path / "checkpoints" / "6")
  _same(latest.variables, marked.eval_variables())


def test_without_an_average_the_trained_weights_are_taken(open_run, fresh, tmp_path):
  state = fresh().replace(average={})
  checkpointer = open_run()
  _save_steps(checkpointer, state, {1: None, 2: None})
  checkpointer.close()
  _same(load_for_inference(tmp_path).variables, state.variables())


def test_a_half_written_checkpoint_is_ignored(open_run, fresh, tmp_path):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: None, 2: None})
  checkpointer.close()
  newest = tmp_path / "checkpoints" / "2"
  newest.rename(newest.with_name("2.orbax-checkpoint-tmp"))  # as a killed process leaves it
  assert load_for_inference(tmp_path).card == CARD
  again = open_run()
  assert int(again.restore(fresh()).step) == 1
  again.close()
  assert _saved(tmp_path) == [1]


def _damage(path, how):
  content = path.read_bytes()
  middle = len(content) // 2
  if how == "removed":
    path.unlink()
  elif how == "truncated":
    path.write_bytes(content[:middle])
  else:
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])


def _largest(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("how", ["truncated", "removed", "changed"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(open_run, fresh, tmp_path, how):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: 0.3, 2: 0.2})
  checkpointer.close()
  _damage(_largest(tmp_path / "checkpoints" / "2" / "state"), how)
  with pytest.warns(UserWarning, match=r"checkpoint of step 2 is damaged .* moved to"):
    again = open_run()
  assert int(again.restore(fresh()).step) == 1
  _save_steps(again, fresh(), {2: 0.2})  # the run gets there once more
  again.close()
  assert _saved(tmp_path) == [1, 2]
  assert (tmp_path / "broken_checkpoints" / "2" / "state").is_dir()


def test_one_that_was_not_sealed_is_read_to_find_out(open_run, fresh, tmp_path):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: None, 2: None, 3: None})
  checkpointer.close()
  for step in ("2", "3"):  # a killed process leaves its last checkpoint without checksums
    (tmp_path / "checkpoints" / step / "checksums.json").unlink()
  _damage(_largest(tmp_path / "checkpoints" / "3" / "state"), "truncated")
  again = open_run()
  with pytest.warns(UserWarning, match="checkpoint of step 3 is damaged"):
    assert int(again.restore(fresh()).step) == 2
  again.close()


def test_damaged_metrics_of_any_checkpoint_do_not_stop_a_run(open_run, fresh, tmp_path):
  checkpointer = open_run(keep=3)
  _save_steps(checkpointer, fresh(), {1: 0.5, 2: 0.3, 3: 0.2})
  checkpointer.close()
  _damage(tmp_path / "checkpoints" / "2" / "metrics" / "metrics", "truncated")
  with pytest.warns(UserWarning, match="checkpoint of step 2 is damaged"):
    again = open_run(keep=3)
  assert int(again.restore(fresh()).step) == 3
  again.close()
  assert _saved(tmp_path) == [1, 3]


def test_nothing_but_damaged_checkpoints_is_an_error_once(open_run, fresh, tmp_path):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: None, 2: None})
  checkpointer.close()
  for step in ("1", "2"):
    _damage(_largest(tmp_path / "checkpoints" / step / "state"), "truncated")
  with (
    pytest.warns(UserWarning, match="damaged"),
    pytest.raises(UserError, match=r"no checkpoint can be read \(damaged: 2, 1\)"),
  ):
    open_run()
  again = open_run()
  assert again.restore(fresh()) is None
  again.close()


def test_inference_says_that_a_checkpoint_is_damaged(open_run, fresh, tmp_path):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: None})
  checkpointer.close()
  _damage(_largest(tmp_path / "checkpoints" / "1" / "state"), "truncated")
  with pytest.raises(UserError, match=r"checkpoints/1 cannot be read"):
    load_for_inference(tmp_path)


def test_another_mesh_goes_on(open_run, fresh):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: None})
  checkpointer.close()
  other = sharding.make_mesh({"data": 4, "fsdp": 1, "model": 1})
  place = lambda leaf: jax.device_put(leaf, sharding.replicated(other))  # noqa: E731
  again = open_run()
  restored = again.restore(jax.tree.map(place, fresh()))
  again.close()
  _same(restored.params, fresh().params)
  assert restored.params["conv"]["kernel"].sharding == sharding.replicated(other)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seed": 5}, "seed = 0 and now has 5"),
    ({"batch_size": 8}, "batch_size = 4 and now has 8"),
    ({"examples": 7}, "examples = 6 and now has 7"),
    ({"options": {"size": (8, 9)}}, r"options.size = \[8, 8\] and now has \[8, 9\]"),
    ({"options": {"size": (8, 8), "seed": 1}}, "options.seed = None and now has 1"),
    ({"classes": ["class 0"]}, "9 classes and there are 1 now"),
    ({"classes": [*"abcdefghi"]}, r"classes\[0\] = class 0 and now has a"),
  ],
)
def test_another_order_of_the_data_is_an_error(open_run, fresh, change, message):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: None})
  checkpointer.close()
  changed = open_run(**change)
  with pytest.raises(UserError, match=f"this run was saved with {message}"):
    changed.restore(fresh())
  changed.close()
  same = open_run()
  assert int(same.restore(fresh()).step) == 1
  same.close()


def test_another_model_or_optimizer_is_an_error(open_run, fresh):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: None})
  checkpointer.close()
  again = open_run()
  for other in (fresh(num_classes=5), fresh(optimizer=optax.adam(0.1))):
    with pytest.raises(UserError, match=r"another model or optimizer.*there and .* here"):
      again.restore(other)
  again.close()


def test_an_empty_folder_is_explained(tmp_path):
  with pytest.raises(UserError, match="holds no checkpoint"):
    load_for_inference(tmp_path)
  with pytest.raises(UserError, match="holds no checkpoint"):
    load_for_inference(tmp_path / "nowhere")


def test_fine_tuning_with_another_head(fresh, capsys):
  source = jax.device_get(jax.tree.map(lambda x: x + 1, dict(fresh().variables())))
  source["params"]["extra"] = {"bias": np.zeros(2, np.float32)}
  state = fresh(num_classes=5)
  head = jax.device_get(state.params["head"])
  result = initialise_from(state, source, "other.safetensors")

  _same(result.params["conv"], source["params"]["conv"])
  _same(result.model_state["batch_stats"], source["batch_stats"])
  _same(result.params["head"], head)
  _same(result.average["params"], result.params)
  assert int(result.step) == 0
  said = capsys.readouterr().out
  assert "initialised from other.safetensors: 6 of 8 tensors" in said
  assert "not loaded: params/head/kernel (1, 1, 8, 5) has shape (1, 1, 8, 3)" in said
  assert "unused: params/extra/bias" in said
  assert "conv" not in said


def test_weights_of_something_else_are_an_error(fresh):
  with pytest.raises(UserError, match="no parameter fits"):
    initialise_from(fresh(), {"params": {"other": np.zeros(3, np.float32)}}, "other.safetensors")


def test_the_configuration_is_kept(open_run, fresh, tmp_path):
  checkpointer = open_run()
  _save_steps(checkpointer, fresh(), {1: 0.5})
  checkpointer.close()
  folder = tmp_path / "checkpoints" / "1"
  assert json.loads((folder / "config" / "metadata").read_text()) == {"eval": {"best_by": "mIoU"}}
