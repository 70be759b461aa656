"""Classification: targets, mixing, counts."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effseg_jax.scaling.collectives import read_collectives
from effseg_jax.scaling.program import read_program
from effseg_jax.tasks.classification import ClassificationTask

SIZE = 16


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8),
    "label": np.array([0, 2, 1, 0], np.int32),
    "valid_size": np.full((4, 2), SIZE, np.int32),
    "weight": np.array([1, 1, 1, 0], np.float32),
  }


def _task(**options):
  return ClassificationTask(("cat", "dog", "bird"), **options)


def test_smoothed_targets_and_normalised_images(batch):
  task = _task(label_smoothing=0.3)
  result = task.augment(batch, jax.random.key(0))
  np.testing.assert_allclose(result["target"][0], [0.8, 0.1, 0.1], rtol=1e-6)
  expected = (batch["image"] - np.array(task.mean)) / np.array(task.std)
  np.testing.assert_allclose(result["image"], expected, rtol=1e-4, atol=1e-5)
  (inputs,) = task.model_inputs(result)
  assert inputs is result["image"]  # not normalised twice
  np.testing.assert_allclose(task.model_inputs(batch)[0], result["image"], rtol=1e-6)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1}])
def test_image_and_target_are_mixed_in_the_same_share(batch, options):
  # Images of one colour tell their own share.
  colours = np.array([0, 255, 0, 255], np.uint8)
  batch["image"] = np.broadcast_to(colours[:, None, None, None], (4, SIZE, SIZE, 3))
  batch["label"] = np.array([0, 1, 0, 1], np.int32)
  task = ClassificationTask(("black", "white"), mean=(0, 0, 0), std=(255, 255, 255), **options)
  augment = jax.jit(task.augment)
  kinds = set()
  for seed in range(6):
    result = jax.device_get(augment(batch, jax.random.key(seed)))
    np.testing.assert_allclose(result["target"].sum(-1), 1.0, rtol=1e-5)
    share = result["image"].mean((1, 2, 3))
    np.testing.assert_allclose(result["target"][:, 1], share, atol=1e-5)
    kinds.add(len(np.unique(result["image"][1].round(5))) > 1)
  if "cutmix" not in options:
    assert kinds == {False}


@pytest.mark.parametrize("count", [1, 4, 5])
def test_neighbours_are_mixed(batch, count):
  batch = {key: np.resize(value, (count, *value.shape[1:])) for key, value in batch.items()}
  batch["label"] = np.arange(count, dtype=np.int32)
  task = ClassificationTask(tuple("abcde"), mixup=0.8)
  targets = jax.jit(task.augment)(batch, jax.random.key(0))["target"]
  partners = [1, 0, 3, 2, 4][:count] if count > 1 else [0]
  expected = np.eye(5)[np.arange(count)] + np.eye(5)[partners]
  np.testing.assert_array_equal(np.asarray(targets) > 0, expected > 0)


def test_mixing_stays_on_a_device(batch):
  batch = {key: np.concatenate([value, value]) for key, value in batch.items()}
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
  batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  augment = jax.jit(_task(mixup=0.8, cutmix=1.0).augment)
  program = augment.lower(batch, jax.random.key(0)).compile()
  assert read_collectives(read_program(program.as_text()), mesh) == []


def test_loss_is_the_cross_entropy(batch):
  task = _task()
  batch = task.augment(batch, jax.random.key(0))
  logits = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
  loss, scalars, counts = task.loss(logits, batch, jax.random.key(0))
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  assert float(loss) == pytest.approx(-log_p[np.arange(4), batch["label"]].mean(), rel=1e-5)
  assert float(scalars["accuracy"]) == (logits.argmax(-1) == batch["label"]).mean()
  assert counts is None


def test_fillers_are_not_counted(batch):
  task = _task()
  logits = np.eye(3, dtype=np.float32)[[0, 2, 0, 0]]
  counts = task.eval_counts(logits, batch)
  np.testing.assert_array_equal(counts, [[1, 0, 0], [1, 0, 0], [0, 0, 1]])
  assert task.summarise(counts) == {"top1": pytest.approx(2 / 3)}
