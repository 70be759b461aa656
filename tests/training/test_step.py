"""The training step: the same curve on any mesh, accumulation, averages, bad gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effseg_jax.errors import UserError
from effseg_jax.tasks.semantic import SemanticTask
from effseg_jax.training import sharding, trees
from effseg_jax.training.optimizer import make_optimizer
from effseg_jax.training.state import init_state
from effseg_jax.training.step import compile_train_step, make_train_step

ADAMW = {
  "name": "adamw",
  "b1": 0.9,
  "b2": 0.999,
  "eps": 1e-8,
  "weight_decay": 0.01,
  "clip_norm": 0.0,
  "lr_rules": (),
  "decay_rules": (),
  "freeze": (),
}


class Net(nn.Module):
  """Two convolutions, batch statistics and dropout: what a segmentation network is made of."""

  dropout: float = 0.0

  @nn.compact
  def __call__(self, images, train):
    x = nn.Conv(64, (3, 3), name="conv")(images)
    x = nn.BatchNorm(use_running_average=not train, use_fast_variance=False, name="norm")(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
    return nn.Conv(5, (1, 1), name="head")(x)


class PixelTask:
  """Cross-entropy per pixel."""

  num_classes = 5

  def augment(self, batch, rng):
    return batch

  def model_inputs(self, batch):
    return (batch["image"],)

  def loss(self, outputs, batch, rng):
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()
    return loss, {}, jnp.bincount(batch["label"].ravel(), length=5)


def _batches(count, size=8):
  rng = np.random.default_rng(0)
  for _ in range(count):
    image = rng.standard_normal((size, 8, 8, 3), np.float32)
    label = (image.sum(-1) > 0).astype(np.int32) + (image[..., 0] > 1)
    yield {"image": image, "label": label}


def _run(
  axes,
  steps=10,
  dropout=0.1,
  devices=None,
  average=0.0,
  freeze=(),
  bad_at=None,
  rules=((".*", "fsdp"),),
  clip=0.0,
  **options,
):
  mesh = sharding.make_mesh(axes, devices)
  model = Net(dropout)
  inputs = (jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32),)
  params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)["params"]
  optimizer = make_optimizer(
    {**ADAMW, "freeze": freeze, "clip_norm": clip}, lambda step: 1e-2, params
  )
  state = init_state(
    model,
    inputs,
    optimizer,
    seed=3,
    keep_average=average > 0,
    rules=rules,
    mesh=mesh,
  )
  first = jax.device_get(state)
  step = make_train_step(
    model, PixelTask(), optimizer, average_decay=average, freeze=freeze, **options
  )
  step = compile_train_step(step, state, mesh)
  losses, reports = [], []
  for index, batch in enumerate(_batches(steps)):
    if index == bad_at:
      batch = {**batch, "image": np.full_like(batch["image"], np.nan)}
    state, report = step(state, sharding.put_batch(batch, mesh))
    losses.append(float(report.scalars["loss"]))
    reports.append(report)
  return np.array(losses), first, state, reports


ONE = {"data": 1, "fsdp": 1, "model": 1}


@pytest.fixture(scope="module")
def one_device():
  return _run(ONE, devices=jax.devices()[:1])


@pytest.mark.parametrize("axes", [(4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2)])
def test_the_curve_does_not_depend_on_the_mesh(one_device, axes):
  losses, _, state, _ = _run(dict(zip(sharding.AXES, axes, strict=True)))
  np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
  if axes[1] > 1:
    assert "fsdp" in str(state.params["conv"]["kernel"].sharding.spec)


def test_a_new_state_does_not_depend_on_the_mesh():
  one, four = (
    _run(axes, steps=0, devices=jax.devices()[:count], average=0.9)[1]
    for axes, count in ((ONE, 1), ({"data": 2, "fsdp": 2, "model": 1}, 4))
  )
  jax.tree.map(np.testing.assert_array_equal, one, four)


def test_the_loss_falls(one_device):
  losses = one_device[0]
  assert losses[-1] < 0.6 * losses[0]


def test_accumulation_averages_the_parts():
  whole, _, _, _ = _run(ONE, dropout=0.0, devices=jax.devices()[:1], freeze=("norm",))
  parts, _, state, reports = _run(
    ONE, dropout=0.0, devices=jax.devices()[:1], freeze=("norm",), accumulate=2
  )
  # Batch statistics are those of the parts, so the curves are close and not equal.
  np.testing.assert_allclose(parts, whole, rtol=0.1)
  assert int(state.step) == 10
  assert int(reports[0].counts.sum()) == 8 * 8 * 8


def test_average_follows_the_parameters():
  _, first, state, _ = _run(ONE, steps=1, average=0.9, devices=jax.devices()[:1])
  decay = 1.0 / 10.0  # (1 + t) / (10 + t) at t = 0
  expected = jax.tree.map(
    lambda old, new: decay * old + (1 - decay) * new, first.variables(), state.variables()
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.average, expected
  )


@pytest.mark.parametrize("pattern", ["norm", "^norm/"])
def test_frozen_statistics_stay(pattern):
  _, first, state, _ = _run(ONE, steps=2, freeze=(pattern,), devices=jax.devices()[:1])
  np.testing.assert_array_equal(
    state.model_state["batch_stats"]["norm"]["mean"],
    first.model_state["batch_stats"]["norm"]["mean"],
  )
  np.testing.assert_array_equal(state.params["norm"]["scale"], first.params["norm"]["scale"])
  assert not np.array_equal(state.params["conv"]["kernel"], first.params["conv"]["kernel"])


def test_frozen_parameters_have_no_gradient():
  """Neither the reported norms nor the clipped one know of it, as with PyTorch's requires_grad."""
  one = {"steps": 1, "devices": jax.devices()[:1]}
  _, first, _, (free,) = _run(ONE, **one)
  _, _, state, (report,) = _run(ONE, freeze=("^conv/",), clip=1e-3, **one)
  names = trees.leaf_names(first.params)
  frozen = np.array([name.startswith("conv/") for name in names])
  assert (np.asarray(free.gradient_norms)[frozen] > 0).all()
  assert (np.asarray(report.gradient_norms)[frozen] == 0).all()
  np.testing.assert_allclose(
    report.gradient_norms[~frozen], free.gradient_norms[~frozen], rtol=1e-5, atol=1e-7
  )
  np.testing.assert_array_equal(state.params["conv"]["kernel"], first.params["conv"]["kernel"])


def test_sharding_rules_name_parameters_as_all_rules_do():
  axes = {"data": 1, "fsdp": 4, "model": 1}
  rules = (("^conv/", "replicate"), (".*", "fsdp"))
  _, _, state, _ = _run(axes, steps=1, average=0.5, rules=rules)
  moments = [
    leaf.sharding.spec
    for name, leaf in zip(
      trees.leaf_names(state.opt_state), jax.tree.leaves(state.opt_state), strict=True
    )
    if name.endswith("conv/kernel")
  ]
  kernels = (state.params["conv"]["kernel"], state.average["params"]["conv"]["kernel"])
  for spec in (*(kernel.sharding.spec for kernel in kernels), *moments):
    assert "fsdp" not in str(spec)
  assert len(moments) == 2
  with pytest.raises(UserError, match=r"mesh\.rules: '\^bakbone/' matches no parameter"):
    _run(axes, steps=1, rules=(("^bakbone/", "fsdp"),))


class DropTask(PixelTask):
  """Reports a sum over the batch."""

  def loss(self, outputs, batch, rng):
    loss, _, counts = super().loss(outputs, batch, rng)
    return loss, {"dropped_segments": jnp.sum(batch["label"] == 2).astype(jnp.float32)}, counts


def _one_step(model, task, batch, accumulate):
  mesh = sharding.make_mesh(ONE, jax.devices()[:1])
  optimizer = optax.sgd(0.1)
  inputs = (jax.ShapeDtypeStruct(batch["image"].shape, jnp.float32),)
  state = init_state(model, inputs, optimizer, seed=0, keep_average=False, rules=(), mesh=mesh)
  step = make_train_step(model, task, optimizer, accumulate=accumulate)
  return compile_train_step(step, state, mesh)(state, batch)


class PlainNet(nn.Module):
  """No statistics, no dropout: nothing in it depends on how a batch is divided."""

  @nn.compact
  def __call__(self, images, train):
    return nn.Conv(5, (1, 1), name="head")(nn.gelu(nn.Conv(8, (3, 3), name="conv")(images)))


def test_accumulation_is_exact_without_batch_statistics():
  (batch,) = _batches(1)
  (whole, report), *others = (
    _one_step(PlainNet(), DropTask(), batch, accumulate) for accumulate in (1, 2, 4)
  )
  for state, other in others:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      (state.params, other.scalars["loss"], other.gradient_norms),
      (whole.params, report.scalars["loss"], report.gradient_norms),
    )
    np.testing.assert_array_equal(other.counts, report.counts)
    assert float(other.scalars["dropped_segments"]) == float(np.sum(batch["label"] == 2)) > 0


@pytest.mark.parametrize("normalize_by", ["all", "valid"])
def test_accumulation_weighs_parts_by_their_labels(normalize_by):
  """Parts with few labelled pixels count as little as they do in the whole batch."""
  task = SemanticTask(tuple("abcde"), ((0, 0, 0),) * 5, normalize_by=normalize_by)
  rng = np.random.default_rng(0)
  label = rng.integers(0, 5, (4, 8, 8)).astype(np.uint8)
  label[1, 2:] = label[3] = 255
  batch = {
    "image": rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8),
    "label": label,
    "valid_size": np.full((4, 2), 8, np.int32),
  }
  (whole, report), *others = (
    _one_step(PlainNet(), task, batch, accumulate) for accumulate in (1, 2, 4)
  )
  for state, other in others:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      (state.params, other.scalars["loss"]),
      (whole.params, report.scalars["loss"]),
    )


def test_a_bad_gradient_changes_nothing_but_the_counters():
  _, first, state, reports = _run(ONE, steps=1, bad_at=0, devices=jax.devices()[:1], average=0.9)
  assert not bool(reports[0].finite)
  assert int(state.step) == int(state.skipped) == 1
  jax.tree.map(np.testing.assert_array_equal, first.variables(), dict(state.variables()))
  jax.tree.map(np.testing.assert_array_equal, first.opt_state, state.opt_state)
  losses = _run(ONE, steps=4, bad_at=1, devices=jax.devices()[:1])[0]
  assert np.isnan(losses[1]) and np.isfinite(losses[2:]).all()


def test_the_batch_stays_cut():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})
  model, task = Net(), PixelTask()
  inputs = (jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32),)
  optimizer = optax.sgd(0.1)
  state = init_state(model, inputs, optimizer, seed=0, keep_average=False, rules=(), mesh=mesh)
  step = compile_train_step(make_train_step(model, task, optimizer), state, mesh)
  batch = sharding.put_batch(next(_batches(1)), mesh)
  program = step.lower(state, batch).compile().as_text()
  assert "all-reduce" in program
  assert "all-gather" not in program
