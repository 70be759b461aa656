"""The audio-visual recipes: every variant builds, and freezes what it should."""

from __future__ import annotations

import importlib

import jax
import numpy as np
import pytest

from effseg_jax import experiment
from effseg_jax.training.optimizer import is_frozen


def get_config(name, variant):
  return importlib.import_module(f"effseg_jax.configs.avesformer.{name}").get_config(variant)


@pytest.mark.parametrize(
  ("name", "variant"), [("s4", "r50"), ("ms3", "r50_avsegformer"), ("avss", "lite")]
)
def test_a_recipe_fits_its_model(name, variant):
  config = get_config(name, variant)
  model = experiment.make_model(config.model, 1)
  size = tuple(config.data.augment.size)
  inputs = (
    jax.ShapeDtypeStruct((1, 1, *size, 3), np.float32),
    jax.ShapeDtypeStruct((1, 1, 96, 64), np.float32),
  )
  _, schedule = experiment.make_optimizer(config, model, inputs)  # every pattern finds a parameter
  assert schedule(config.train.num_steps // 2) > 0
  assert is_frozen(config.optimizer.freeze, "audio/conv_0/kernel") == (variant != "lite")
  assert config.train.num_steps > 1000
  assert 0 < config.eval.every < config.train.num_steps
