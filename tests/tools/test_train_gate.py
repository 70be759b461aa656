"""The gate: measured exits, a file that goes on, and a choice that is learnt."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from effseg_jax import UserError, configs, create_model, experiment
from effseg_jax.models.eco import best_exits
from effseg_jax.weights.bundle import Bundle
from tests.universal_models import SMALL
from tools import train_gate
from tools.train_gate import Exits


@pytest.fixture(scope="module")
def config():
  config = configs.load("eco_m2f/synthetic:r50")
  config.data.options.size = (64, 64)
  config.eval.short_side = config.eval.max_size = 64
  config.eval.batch_size = 4
  return config


@pytest.fixture(scope="module")
def bundle(config):
  dataset = experiment.open_dataset(config, "val")
  small = {**SMALL, "depth": 18, "norm": "bn", "num_classes": dataset.num_classes}
  model = create_model("eco_m2f_r50", **small)
  image = np.zeros((1, 64, 64, 3), np.float32)
  return Bundle(model, jax.jit(model.init)(jax.random.key(0), image), {})


class _First:
  """The first images of a split."""

  def __init__(self, dataset, count):
    self._dataset, self._count = dataset, count

  def __len__(self):
    return self._count

  def __getattr__(self, name):
    return getattr(self._dataset, name)

  def __getitem__(self, index):
    return self._dataset[index]


def test_measuring_goes_on_where_it_was_stopped(config, bundle, tmp_path, monkeypatch):
  path = tmp_path / "eco.exits.npz"
  opened = experiment.open_dataset
  several = lambda count: lambda config, split: _First(opened(config, split), count)  # noqa: E731
  asked = []
  quality = train_gate.image_quality
  # Random weights find nothing; a quality by exit and image shows where each number goes.
  monkeypatch.setattr(
    train_gate,
    "image_quality",
    lambda result, truth, task: asked.append(quality(result, truth, task)) or len(asked) / 100,
  )
  monkeypatch.setattr(experiment, "open_dataset", several(4))
  first = train_gate.measure_exits(config, bundle, "val", path)
  assert first.quality.shape == (4, 5) and first.inputs.shape == (4, SMALL["features"])
  np.testing.assert_allclose(first.quality, np.arange(1, 21).reshape(5, 4).T / 100)
  assert all(0 <= value <= 1 for value in asked)

  monkeypatch.setattr(experiment, "open_dataset", several(6))
  more = train_gate.measure_exits(config, bundle, "val", path)
  assert len(asked) == 5 * 6  # the first batch was there
  assert more.index.tolist() == list(range(6))
  np.testing.assert_array_equal(more.quality[:4], first.quality)
  np.testing.assert_array_equal(more.inputs[:4], first.inputs)
  assert np.ptp(more.inputs, axis=0).max() > 0


def test_the_gate_learns_to_choose():
  rng = np.random.default_rng(0)
  inputs = rng.standard_normal((200, 8)).astype(np.float32)
  needs_more = inputs[:, 0] > 0  # easy images are as good after two layers as after six
  quality = np.where(needs_more[:, None], np.linspace(0.3, 0.7, 5), 0.6).astype(np.float32)
  exits = Exits(np.arange(200, dtype=np.int32), inputs, quality, "")
  start = {"kernel": np.zeros((8, 5), np.float32), "bias": np.zeros(5, np.float32)}
  gate, losses = train_gate.train_gate(exits, start, beta=0.02, learning_rate=0.05, steps=300)
  chosen = np.argmax(inputs @ gate["kernel"] + gate["bias"], axis=-1)
  assert losses[0] == pytest.approx(np.log(5), rel=1e-5)
  assert np.mean(chosen == np.asarray(best_exits(quality, 0.02))) > 0.95
  text = train_gate.report(exits, gate, 0.02)
  assert "best: PQ 64" in text and "     6   " in text


def test_mistakes(tmp_path):
  path = tmp_path / "x.npz"
  path.write_bytes(b"nothing")
  with pytest.raises(UserError, match="cannot be read"):
    train_gate.read_exits(path, "abc")
  assert train_gate.read_exits(tmp_path / "new.npz", "abc") is None
  Exits(np.arange(1), np.zeros((1, 8)), np.zeros((1, 5)), "abc").save(path)
  assert train_gate.read_exits(path, "abc").quality.shape == (1, 5)
  with pytest.raises(UserError, match="with other weights"):
    train_gate.read_exits(path, "def")
  with pytest.raises(UserError, match="no exits"):
    train_gate.exit_depths(create_model("mask2former_r50"))
