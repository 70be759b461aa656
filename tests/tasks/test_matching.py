"""Matching against scipy, and against the official criterion's recorded costs and matches."""

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from effseg_jax.ops import backend
from effseg_jax.tasks.matching import assign
from effseg_jax.training import sharding

assign_jitted = jax.jit(assign)


def _check(costs, counts):
  """Compares with scipy on the targets that count; returns queries and matched."""
  num_queries, num_targets = costs.shape[-2:]
  valid = np.arange(num_targets) < np.asarray(counts)[:, None]
  queries, matched = (np.asarray(x)[0] for x in assign_jitted(costs[None], valid[None]))
  for cost, count, query, has in zip(costs, counts, queries, matched, strict=True):
    rows, columns = linear_sum_assignment(cost[:, :count])
    assert has.sum() == min(count, num_queries)
    assert not has[count:].any()
    assert len(set(query[has])) == has.sum()
    ours = cost[query[has], np.flatnonzero(has)].sum()
    np.testing.assert_allclose(ours, cost[rows, columns].sum(), atol=1e-3)
    assert (query[~has] == 0).all()
  return queries, matched


def test_padded_targets_change_nothing():
  costs = np.random.default_rng(0).standard_normal((6, 12, 9)).astype(np.float32)
  queries, _ = _check(costs, [0, 1, 3, 5, 8, 9])
  garbage = costs.copy()
  garbage[3, :, 5:] = np.nan
  again, _ = _check(garbage, [0, 1, 3, 5, 8, 9])
  np.testing.assert_array_equal(again, queries)


def test_more_targets_than_queries_leaves_the_most_expensive_out():
  costs = np.random.default_rng(1).standard_normal((2, 4, 9)).astype(np.float32)
  _check(costs, [9, 6])


def test_costs_that_are_not_finite_do_not_hang():
  costs = np.full((1, 1, 12, 9), np.nan, np.float32)
  _, matched = assign_jitted(costs, np.ones((1, 1, 9), bool))
  assert bool(matched.all())


def test_several_predictions():
  costs = np.random.default_rng(2).standard_normal((3, 2, 12, 9)).astype(np.float32)
  valid = np.ones((3, 2, 9), bool)
  queries, _ = assign_jitted(costs, valid)
  np.testing.assert_array_equal(queries[1], assign_jitted(costs[1:2], valid[1:2])[0][0])


def test_every_device_matches_its_own_images():
  costs = np.random.default_rng(3).standard_normal((2, 4, 12, 9)).astype(np.float32)
  valid = np.arange(9) < np.array([[9], [3], [0], [7]])
  valid = np.broadcast_to(valid, (2, 4, 9))
  batch = sharding.batch_sharding(sharding.make_mesh({"data": 4, "fsdp": 1, "model": 1}))

  @jax.jit
  def assign_cut(costs, valid):
    with backend.several_devices(batch):
      return assign(costs, valid)

  queries, matched = assign_cut(costs, valid)
  for found, expected in zip((queries, matched), assign_jitted(costs, valid), strict=True):
    np.testing.assert_array_equal(found, expected)
