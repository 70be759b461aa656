"""The picture of what the attention hears shows what the paper says."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from effseg_jax import UserError, create_model
from effseg_jax.cli.plot_attention import listen, plot, trained
from tests.models.test_avesformer import SMALL


@pytest.fixture(scope="module")
def heard():
  rng = np.random.default_rng(0)
  frame = rng.integers(0, 255, (64, 96, 3)).astype(np.uint8)
  log_mel = rng.standard_normal((96, 64)).astype(np.float32)
  found = {}
  for queries in ("audio", "prompts"):
    model = create_model("avesformer_lite", **{**SMALL, "queries": queries})
    inputs = (np.zeros((1, 1, 64, 96, 3), np.float32), log_mel[None, None])
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    found[queries] = listen(model, variables, frame, log_mel)
  return frame, found


def test_one_token_dissipates_and_prompts_do_not(heard):
  audio, prompts = heard[1]["audio"], heard[1]["prompts"]
  np.testing.assert_array_equal(audio.weights, np.ones((24, 1)))
  np.testing.assert_array_equal(audio.tokens, np.ones((4, 6)))
  assert audio.deviation.max() < 1e-5
  assert prompts.weights.shape == (24, SMALL["prompts"] + 1)
  np.testing.assert_allclose(prompts.weights.sum(-1), 1, atol=1e-5)
  assert prompts.tokens.min() > 1
  assert prompts.deviation.shape == (4, 6)
  assert prompts.deviation.min() > 1e-4


def test_picture(heard, tmp_path):
  pytest.importorskip("matplotlib")
  path = plot(*heard, tmp_path / "new" / "attention.png")
  with Image.open(path) as picture:
    assert picture.width > picture.height > 100
  with pytest.raises(UserError, match=r"--output=.*attention\.xyz"):
    plot(*heard, tmp_path / "attention.xyz")


def test_mistakes(tmp_path):
  model = create_model("avesformer_lite", **{**SMALL, "stage_types": ("conv",) * 4})
  with pytest.raises(UserError, match="has no 'attn'"):
    listen(model, {}, np.zeros((64, 64, 3), np.uint8), np.zeros((96, 64), np.float32))
  with pytest.raises(UserError):
    trained(str(tmp_path / "none"), "prompts")
