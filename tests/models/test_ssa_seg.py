"""SSA-Seg's classifier and losses against an independent implementation of the equations."""

from __future__ import annotations

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model
from effseg_jax.models import flops
from effseg_jax.models.ssa_seg import SSAClassifier, SSAHead
from effseg_jax.tasks import make_task, ssa_losses
from tests.models import reference
from tests.models.reference import channels_first, channels_last
from tests.weights.official import tensor_of

TOLERANCE = 2e-5


def golden():
  return reference.read("ssa_seg")


@functools.cache
def parameters():
  shapes = json.loads(str(golden()["shapes_json"]))
  drawn = {name: tensor_of(f"ssa.{name}", tuple(shape)) for name, shape in shapes.items()}
  linear = lambda name: {"kernel": drawn[f"{name}.weight"].T, "bias": drawn[f"{name}.bias"]}  # noqa: E731
  position = drawn["position.weight"].transpose(2, 3, 1, 0)
  return {
    "classify": linear("classify"),
    "position": {"kernel": position, "bias": drawn["position.bias"]},
    "position_basis": drawn["position_basis"],
    "semantic": linear("semantic"),
    "spatial": linear("spatial"),
  }


def labels():
  return jnp.asarray(golden()["labels"].astype(np.int32))


@functools.cache
def outputs():
  run = jax.jit(lambda p, x, y: SSAClassifier(5).apply({"params": p}, x, y))
  return run(parameters(), channels_last(golden()["input"]), labels())


@pytest.mark.parametrize(("name", "key"), [
  ("coarse_logits", "coarse_logits"), ("logits", "logits"), ("semantic_prototypes", "S_p"),
  ("spatial_prototypes", "P_p"), ("teacher_logits", "teacher/logits"),
  ("teacher_semantic_prototypes", "teacher/S_p"), ("teacher_spatial_prototypes", "teacher/P_p"),
])  # fmt: skip
def test_classifier(name, key):
  found, expected = np.asarray(outputs()[name]), golden()[key]
  found = channels_first(found) if found.ndim == 4 else found
  reference.assert_close(found, expected, TOLERANCE)


def test_prototypes_of_the_whole_batch():
  found = outputs()["batch_semantic_prototypes"]
  reference.assert_close(found, golden()["teacher/S_p_of_batch"][0], TOLERANCE)


def test_losses():
  seen, expected = outputs(), golden()
  boundary = jnp.asarray(expected["edges"].astype(bool))
  found = {
    "response": ssa_losses.response_loss(
      seen["logits"], seen["teacher_logits"], labels(), boundary
    ),
    "semantic": ssa_losses.semantic_loss(
      seen["semantic_prototypes"], seen["batch_semantic_prototypes"]
    ),
    "spatial": ssa_losses.spatial_loss(
      seen["spatial_prototypes"], seen["teacher_spatial_prototypes"]
    ),
    "spatial_as_printed": ssa_losses.spatial_loss(
      seen["spatial_prototypes"], seen["teacher_spatial_prototypes"], as_printed=True
    ),
  }
  for name, loss in found.items():
    np.testing.assert_allclose(loss, expected[f"loss/{name}"], rtol=TOLERANCE)


@pytest.mark.parametrize("width", [2, 4])
def test_boundaries_are_a_band_between_classes(width):
  rng = np.random.default_rng(0)
  regions = rng.integers(0, 3, (2, 3, 4)).repeat(5, 1).repeat(4, 2)
  regions[rng.random(regions.shape) < 0.1] = 255
  expected = np.zeros(regions.shape, bool)
  reach = range(-(width // 2), width // 2 + 1)
  for b, y, x in np.ndindex(regions.shape):
    for i, j in itertools.product(reach, reach):
      if 0 <= y + i < regions.shape[1] and 0 <= x + j < regions.shape[2]:
        pair = regions[b, y, x], regions[b, y + i, x + j]
        expected[b, y, x] |= pair[0] != pair[1] and 255 not in pair
  found = ssa_losses.near_boundaries(jnp.asarray(regions), 3, width)
  np.testing.assert_array_equal(found, expected)


class _Dataset:
  classes = ("ground", "sky", "tree")
  palette = np.arange(9, dtype=np.uint8).reshape(3, 3)
  ignore_label = 255


@pytest.mark.parametrize("teacher", ["shared", "own"])
def test_training_loss(teacher):
  head = SSAHead(3, dropout=0.0, teacher=teacher)
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.standard_normal((1, 5, 6, 16)), jnp.float32)
  params = jax.jit(lambda key: head.init(key, features, False))(jax.random.key(0))["params"]
  target = rng.integers(0, 3, (1, 5, 6)).repeat(8, 1).repeat(8, 2)
  target[:, :3] = 255
  task = make_task({"name": "semantic_ssa"}, _Dataset())
  batch = {"label": jnp.asarray(target)}

  @jax.jit
  def run(params, distill):
    def loss(params):
      seen = head.apply({"params": params}, features, True)
      total, scalars, counts = task.loss(seen, batch, jax.random.key(1))
      parts = [scalars[f"loss_{name}"] for name in ("response", "semantic", "spatial")]
      return total - (1.0 - distill) * sum(parts), (total, scalars, counts)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (_, (total, scalars, counts)), slopes = run(params, 1.0)
  parts = [value for name, value in scalars.items() if name.startswith("loss_")]
  assert len(parts) == 5
  np.testing.assert_allclose(total, sum(parts), rtol=1e-6)
  assert int(counts.sum()) <= 30
  classifier = slopes["classifier"]
  own = {name for name in classifier if name.startswith("teacher_")}
  expected = {f"teacher_{n}" for n in ("position", "position_basis", "semantic", "spatial")}
  assert own == (expected if teacher == "own" else set())
  for leaf in jax.tree.leaves(classifier):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
  if teacher == "own":  # what brings the classifier near its teacher teaches the teacher nothing
    without = run(params, 0.0)[1]["classifier"]
    for name in expected:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
        classifier[name],
        without[name],
      )


def test_prediction_is_an_image_of_logits():
  net = create_model("afformer_tiny", head="ssa", num_classes=7, dtype=jnp.bfloat16)
  logits = jax.eval_shape(
    lambda: net.init_with_output(jax.random.key(0), jnp.zeros((2, 40, 64, 3)))[0]
  )
  assert (logits.shape, logits.dtype) == ((2, 5, 8, 7), jnp.float32)


def test_parameters_that_are_added():
  plain, adaptive = (create_model("afformer_base", head=head) for head in ("official", "ssa"))
  added = flops.parameter_counts(adaptive)[0] - flops.parameter_counts(plain)[0]
  assert added == 303_616


def test_mistakes_are_named():
  with pytest.raises(UserError, match=r"ssa_teacher is 'onw'.*'own'"):
    create_model("afformer_tiny", head="ssa", ssa_teacher="onw")
  with pytest.raises(UserError, match="Did you mean 'ssa'"):
    create_model("afformer_tiny", head="sssa")
