"""The loss of SegViT against the reference implementation, and how its class maps are read."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.inference.semantic import Inference, class_scores, forward_pass, tile_classes
from effseg_jax.tasks import make_task
from effseg_jax.tasks.class_masks import losses
from effseg_jax.training import sharding
from effseg_jax.weights.loading import export_weights
from tests.vit_models import assert_close, channels_first, golden, images, loaded

NAMES = {"segvit": "segvit_b16", "segvit_shrunk": "segvit_shrunk_l16"}
DATASET = types.SimpleNamespace(
  classes=tuple("abcdef"), palette=np.arange(18).reshape(6, 3), ignore_label=255
)


@functools.cache
def gradient(file):
  """Compiled: (variables, images, labels) -> (loss, terms), gradients."""
  model, _ = loaded(NAMES[file], file)

  def loss(variables, x, labels):
    terms = losses(model.apply(variables, x), labels)
    return sum(terms.values()), terms

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("file", NAMES)
def test_official_losses_and_gradients(file):
  reference, (model, variables) = golden(file), loaded(NAMES[file], file)
  labels, x = reference["loss/labels"], images(0, 2, 64, 64)
  (total, terms), (own, by_image) = gradient(file)(variables, x, labels)
  expected = {key: reference[key] for key in reference if key.startswith("loss/loss")}
  assert {f"loss/{name}" for name in terms} == set(expected)
  for key, value in expected.items():
    np.testing.assert_allclose(terms[key.removeprefix("loss/")], value, rtol=2e-4, err_msg=key)
  np.testing.assert_allclose(total, reference["loss/total"], rtol=2e-4)

  assert_close(channels_first(by_image)[:, :, ::2, ::2], reference["grad/input"], 5e-4)
  gradients = export_weights(model, own)
  norms = np.array([np.linalg.norm(gradients[name]) for name in reference["grad/param_names"]])
  assert_close(norms, reference["grad/param_l2norms"], 5e-4)
  for key in reference:
    if key.startswith(("grad/backbone", "grad/decode")):
      step = 4 if "in_proj" in key else 1
      assert_close(gradients[key.removeprefix("grad/")][::step], reference[key], 5e-4)

  labels = labels.copy()
  labels[0] = 255
  (total, _), _ = gradient(file)(variables, x, labels)
  np.testing.assert_allclose(total, reference["loss_one_empty/total"], rtol=2e-4)


def outputs(batch, seed=0):
  rng = np.random.default_rng(seed)
  one = lambda: {  # noqa: E731
    "class_logits": jnp.asarray(rng.standard_normal((batch, 6, 7)), jnp.float32),
    "mask_logits": jnp.asarray(rng.standard_normal((batch, 6, 4, 5)), jnp.float32),
  }
  return {**one(), "aux": [one()]}


def test_a_batch_without_labels_trains_no_object_alone():
  found = losses(outputs(2), jnp.full((2, 16, 20), 255))
  assert float(found["loss_mask"]) == float(found["loss_dice_0"]) == 0.0
  nll = -jax.nn.log_softmax(outputs(2)["class_logits"])[..., -1].mean()
  np.testing.assert_allclose(found["loss_ce"], nll, rtol=1e-5)


def test_devices_that_share_a_batch_compute_its_loss_and_gather_nothing():
  labels = np.random.default_rng(1).integers(0, 7, (4, 16, 20))
  labels[labels == 6] = 255
  value = jax.jit(
    jax.value_and_grad(lambda o, y: sum(losses(o, y).values())),
    static_argnames=(),
  )
  expected = value(outputs(4), labels)
  mesh = sharding.make_mesh({"data": 4, "fsdp": 1, "model": 1})
  placed = jax.device_put((outputs(4), labels), sharding.batch_sharding(mesh))
  found = value(*placed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)
  text = value.lower(*placed).compile().as_text()
  assert "all-gather" not in text and 0 < text.count(" all-reduce(") < 12


def test_the_task_reads_scores_of_pixels():
  task = make_task({"name": "class_masks"}, DATASET)
  assert task.num_classes == 6 and task.averages_scores
  found = outputs(2)
  labels = np.random.default_rng(1).integers(0, 6, (2, 16, 20)).astype(np.uint8)
  loss, scalars, counts = task.loss(found, {"label": labels}, None)
  np.testing.assert_allclose(loss, sum(losses(found, labels).values()), rtol=1e-6)
  assert set(scalars) == {"loss_ce", "loss_mask", "loss_dice"} and counts.sum() == 2 * 4 * 5
  assert 0 <= task.summarise(np.asarray(counts))["mIoU"] <= 1
  scores = task.pixel_scores(found, (32, 40))
  assert scores.shape == (2, 32, 40, 6) and float(scores.min()) > 0


def test_views_of_scores_are_averaged_as_they_are():
  task = make_task({"name": "class_masks"}, DATASET)
  model = types.SimpleNamespace(apply=lambda variables, x, train: outputs(x.shape[0], x.shape[1]))
  forward = forward_pass(model, task, {})
  x, size = jnp.zeros((1, 32, 40, 3)), jnp.array([[32, 40]])
  views = Inference(scales=(1.0, 2.0), scores=True)
  found = class_scores(forward, x, size, (32, 40), views)
  one = [
    class_scores(forward, jnp.zeros((1, 32 * f, 40 * f, 3)), size, (32, 40), Inference())
    for f in (1, 2)
  ]
  np.testing.assert_allclose(found, (one[0] + one[1]) / 2, atol=1e-6)
  logits = tuple(task.pixel_scores(outputs(1, n), (n, 40 * n // 32)) for n in (32, 64))
  zero = jnp.zeros(2, jnp.int32)
  tile = tile_classes(logits, jnp.int32(0), size[0], zero, (32, 40), averages_scores=True)
  assert np.mean(tile == jnp.argmax(found[0], -1)) > 0.999
