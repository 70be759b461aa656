"""The optimizer against a plain AdamW, and the rules that act by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effseg_jax.errors import UserError
from effseg_jax.training.optimizer import make_optimizer

CONFIG = {
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


def _params():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    "backbone": {"kernel": jax.random.normal(keys[0], (3, 4)), "bias": jnp.ones((4,))},
    "head": {"kernel": jax.random.normal(keys[1], (4, 2))},
  }


def _train(optimizer, steps=5):
  params = _params()
  state = optimizer.init(params)
  for i in range(steps):
    grads = jax.tree.map(lambda p, i=i: jnp.cos(p + i), params)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _make(**changes):
  return make_optimizer({**CONFIG, **changes}, lambda step: 1e-2, _params())


def test_equals_adamw_of_optax():
  expected = _train(optax.adamw(1e-2, weight_decay=0.01))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), _train(_make()), expected
  )


def test_freeze_keeps_parameters_and_has_no_state_for_them():
  optimizer = _make(freeze=("^backbone/",))
  trained = _train(optimizer)
  np.testing.assert_array_equal(trained["backbone"]["kernel"], _params()["backbone"]["kernel"])
  assert not np.array_equal(trained["head"]["kernel"], _params()["head"]["kernel"])
  sizes = [leaf.size for leaf in jax.tree.leaves(optimizer.init(_params()))]
  assert sum(sizes) == 2 * 8 + 2  # two moments of the head's 8 numbers, two step counters


def test_learning_rate_and_decay_rules_take_the_first_match():
  plain, scaled = _train(_make(), 1), _train(_make(lr_rules=(("^backbone/", 0.1), (".", 1.0))), 1)
  moved = lambda params, part: params[part]["kernel"] - _params()[part]["kernel"]  # noqa: E731
  np.testing.assert_allclose(moved(scaled, "backbone"), 0.1 * moved(plain, "backbone"), atol=1e-6)
  np.testing.assert_allclose(moved(scaled, "head"), moved(plain, "head"), atol=1e-6)
  undecayed = _train(_make(decay_rules=((".", 0.0),)), 1)
  expected = _train(optax.adam(1e-2), 1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), undecayed, expected)


def test_clipping_uses_the_norm_of_the_whole_gradient():
  optimizer = make_optimizer(
    {**CONFIG, "name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.5},
    lambda step: 1.0,
    _params(),
  )
  grads = jax.tree.map(jnp.ones_like, _params())
  updates, _ = optimizer.update(grads, optimizer.init(_params()), _params())
  np.testing.assert_allclose(optax.global_norm(updates), 0.5, rtol=1e-5)


def test_clipping_leaves_out_what_is_frozen():
  changes = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1.0}
  optimizer = make_optimizer(
    {**CONFIG, **changes, "freeze": ("^backbone/",)}, lambda step: 1.0, _params()
  )
  grads = {
    "backbone": jax.tree.map(lambda p: jnp.full_like(p, 100.0), _params()["backbone"]),
    "head": {"kernel": jnp.zeros((4, 2)).at[0, 0].set(1.0)},
  }
  updates, _ = optimizer.update(grads, optimizer.init(_params()), _params())
  np.testing.assert_allclose(updates["head"]["kernel"][0, 0], -1.0, rtol=1e-6)
  np.testing.assert_array_equal(updates["backbone"]["kernel"], 0.0)


def test_a_pattern_that_matches_nothing_is_an_error():
  with pytest.raises(UserError, match=r"optimizer\.freeze: '\^bakbone'.*backbone/bias"):
    _make(freeze=("^bakbone",))
