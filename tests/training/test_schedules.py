"""Schedules against the values that the recipe states."""

import numpy as np
import pytest

from effseg_jax.errors import UserError
from effseg_jax.training.schedules import make_schedule

POLY = {"name": "poly", "power": 1.0, "warmup_steps": 1500, "warmup_ratio": 1e-6}


@pytest.mark.parametrize(
  ("step", "expected"),
  [
    (0, 3.0e-10),
    (1, 2.00299e-7),
    (750, 1.49297e-4),
    (1499, 2.96991e-4),
    (1500, 2.971875e-4),
    (80_000, 1.5e-4),
    (159_999, 1.875e-9),
  ],
)
def test_poly_with_warmup_has_the_recipes_values(step, expected):
  schedule = make_schedule(POLY, 3e-4, 160_000)
  np.testing.assert_allclose(float(schedule(step)), expected, rtol=1e-5)


def test_cosine_begins_at_base_and_ends_at_end():
  schedule = make_schedule(
    {"name": "cosine", "end": 0.01, "warmup_steps": 0, "warmup_ratio": 0.0}, 1.0, 100
  )
  np.testing.assert_allclose([float(schedule(i)) for i in (0, 50, 100)], [1.0, 0.505, 0.01])


def test_step_multiplies_at_each_milestone():
  config = {"name": "step", "milestones": (3, 5), "factor": 0.1, "warmup_steps": 0}
  schedule = make_schedule({**config, "warmup_ratio": 0.0}, 1.0, 10)
  np.testing.assert_allclose([float(schedule(i)) for i in (2, 3, 4, 5)], [1, 0.1, 0.1, 0.01])


def test_milestones_below_one_are_shares_of_the_training():
  config = {"name": "step", "milestones": (0.5, 0.9), "factor": 0.1, "warmup_steps": 0}
  schedule = make_schedule({**config, "warmup_ratio": 0.0}, 1.0, 10)
  np.testing.assert_allclose([float(schedule(i)) for i in (4, 5, 8, 9)], [1, 0.1, 0.1, 0.01])


def test_a_rate_of_zero_stays_zero():
  for name in ("poly", "cosine", "constant"):
    schedule = make_schedule({"name": name, "warmup_steps": 2, "warmup_ratio": 0.1}, 0.0, 4)
    assert [float(schedule(i)) for i in range(5)] == [0.0] * 5


def test_an_unknown_schedule_is_named_with_a_suggestion():
  with pytest.raises(UserError, match="Did you mean 'cosine'"):
    make_schedule({"name": "cosin", "warmup_steps": 0, "warmup_ratio": 0.0}, 1.0, 10)
