"""A training from its configuration on: what stops it early, what it writes, how it resumes."""

from __future__ import annotations

import contextlib
import io
import json

import jax
import numpy as np
import pytest
import small_config
import tiny_run

from effseg_jax import create_model, experiment
from effseg_jax.cli import train
from effseg_jax.errors import UserError
from effseg_jax.run import finite
from effseg_jax.training import sharding

SMALL_AFFORMER = {"widths": (8, 16, 32, 32), "depths": (0, 1, 1, 1)}
STEPS = {"train.num_steps": 4, "checkpoint.every": 2, "eval.every": 0, "log.every": 1}


@pytest.fixture(scope="module", autouse=True)
def net():
  """A network of three layers in the model's place; one device."""
  with pytest.MonkeyPatch.context() as patch:
    for owner, name in ((experiment, "make_model"), (finite, "check_finite")):
      patch.setattr(owner, name, getattr(owner, name))
    make_mesh = sharding.make_mesh
    patch.setattr(sharding, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
    tiny_run.use_net()
    yield


def configured(**changes):
  config = small_config.get_config()
  config.update_from_flattened_dict({**STEPS, **changes})
  return config


def run(workdir, **changes):
  """Trains; returns what was said."""
  with contextlib.redirect_stdout(io.StringIO()) as said:
    train.train(configured(**changes), str(workdir))
  return said.getvalue()


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoints(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """A finished run of four steps."""
  workdir = tmp_path_factory.mktemp("runs") / "first"
  run(workdir)
  return workdir


def test_the_builder_gives_the_parts_of_a_run(first):
  parts = experiment.build(configured(**{"eval.every": 4}))
  state, losses = parts.state, []
  for _, batch in zip(range(4), parts.batches, strict=False):
    state, report = parts.step(state, batch)
    losses.append(float(report.scalars["loss"]))
  logged = [line["train/loss"] for line in lines(first)]
  np.testing.assert_allclose(losses, logged, rtol=1e-5)
  result = parts.evaluate(state.eval_variables())
  assert set(result.scalars) == {"mIoU", "mean_accuracy", "pixel_accuracy"}
  assert parts.task.num_classes == parts.dataset.num_classes == 8
  assert jax.tree.map(np.shape, dict(state.params)) == jax.tree.map(
    lambda leaf: leaf.shape, dict(parts.abstract_state.params)
  )


def test_the_compilers_optimisations_change_no_result(first):
  """The suite compiles without them, to save time; users compile with them."""
  parts = experiment.build(configured())
  lowered = parts.step.lower(parts.abstract_state, parts.batch_shapes)
  step = lowered.compile(compiler_options={"xla_backend_optimization_level": 3})
  state, losses = parts.state, []
  for _, batch in zip(range(4), parts.batches, strict=False):
    state, report = step(state, batch)
    losses.append(float(report.scalars["loss"]))
  logged = [line["train/loss"] for line in lines(first)]
  np.testing.assert_allclose(losses, logged[:4], rtol=1e-5)

  model = create_model("afformer_tiny", num_classes=3, **SMALL_AFFORMER)
  images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  forward = jax.jit(model.apply).lower(variables, images)
  plain, optimised = (
    forward.compile(compiler_options={"xla_backend_optimization_level": level})(variables, images)
    for level in (0, 3)
  )
  np.testing.assert_allclose(optimised, plain, rtol=1e-4, atol=1e-5)


def test_the_configuration_of_an_experiment_is_a_copy():
  config = configured(**{"optimizer.name": "sgd", "schedule.name": "constant"})
  parts = experiment.build(config)
  assert parts.config.optimizer.momentum == 0.9
  assert "momentum" not in config.optimizer


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"eval.best_by": "miou"}, "eval.best_by is 'miou'.*Did you mean 'mIoU'"),
    ({"train.accumulate": 3}, "train.accumulate is 3; expected a divisor"),
    ({"train.accumulate": 0}, "train.accumulate is 0; expected a whole number of 1"),
    ({"task.class_weights": (1.0, 2.0)}, "class_weights has 2 numbers; expected 8"),
    ({"model.dtype": "float16"}, "float16"),
    ({"mesh.fsdp": 3}, "mesh data=-1, fsdp=3, model=1 does not multiply to the 1 devices"),
  ],
)
def test_a_mistake_is_noticed_before_the_working_directory_is_made(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    run(tmp_path / "run", **changes)
  assert not (tmp_path / "run").exists()


def test_zero_means_never(tmp_path):
  said = run(tmp_path, **{"log.every": 0, "checkpoint.every": 0})
  assert "step 4/4" not in said
  assert lines(tmp_path) == []
  assert checkpoints(tmp_path) == [4]  # what was trained is not lost


def test_a_resumed_run_refuses_other_data(first):
  with pytest.raises(UserError, match=r"options\.seed = 0 and now has 7"):
    run(first, **{"data.options.seed": 7, "train.num_steps": 6})
  assert "nothing left to do" in run(first)


def test_a_longer_run_says_that_the_rate_changes(first):
  said = run(first, **{"train.num_steps": 6})
  assert "note: the schedule ended at step 4 and ends at 6 now" in said
  assert "the learning rate of step 5 goes from 0 to" in said
  assert [line["step"] for line in lines(first)] == [1, 2, 3, 4, 5, 6]
  assert "note:" not in run(first, **{"train.num_steps": 6})


def test_skipped_steps_are_in_the_log(tmp_path):
  changes = {"on_nonfinite": "skip", "optimizer.learning_rate": 1e38, "schedule.warmup_steps": 0}
  said = run(tmp_path, **changes, **{"train.num_steps": 5})
  assert "skipped_steps" in said
  numbers = lines(tmp_path)
  skipped = [line.get("train/skipped_steps", 0.0) for line in numbers]
  count = int(skipped[-1])
  assert count >= 2
  assert skipped[-2] == count - 1
  assert numbers[-1]["train/loss"] is None
  # The rate is that of the last step that changed something.
  rates = [line["train/learning_rate"] for line in numbers]
  assert rates[-1] == rates[5 - count - 1]


def test_a_dry_run_says_what_would_happen(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  said = train.dry_run(configured(**{"eval.every": 2}))
  for words in (
    "model          afformer_tiny, 3,256 parameters",
    "data           synthetic train: 2,048 examples, 8 classes",
    "training       4 steps of 4 images",
    "evaluation     synthetic val: 96 examples, every 2 steps",
    "memory         state 0 MiB, a step",
    "learning rate  1e-08 at step 1",
  ):
    assert words in said
  assert not list(tmp_path.iterdir())
