"""The losses against the official criterion, and training's edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops.point_sample import NO_SEGMENT
from effseg_jax.tasks.mask_losses import uncertain_points
from effseg_jax.tasks.universal import UniversalTask

TASK = UniversalTask(
  classes=tuple(f"class {i}" for i in range(19)),
  palette=((0, 0, 0),) * 19,
  is_thing=(True,) * 10 + (False,) * 9,
  num_points=112,
)


def _recorded_points(points, target, maps):
  """A `PointSource` of points that were recorded, (L, B, N, P, 2)."""
  del maps
  return jnp.take(points, target, axis=2)


def segment_layers(masks, num_layers):
  """Puts masks (N, H, W) that overlap into layers of segment maps, greedily."""
  layers = np.full((num_layers, *masks.shape[1:]), NO_SEGMENT, np.uint8)
  for number, mask in enumerate(masks):
    free = next(layer for layer in layers if (layer[mask] == NO_SEGMENT).all())
    free[mask] = number
  return layers


@pytest.fixture(scope="module")
def golden(shared):
  return dict(np.load(shared / "golden" / "mask2former" / "criterion.npz"))


@pytest.fixture(scope="module")
def official(golden):
  """The recorded criterion as our arguments: predictions (final first), batch and points."""
  predictions = [
    {name: golden[f"pred_{kind}_{i}"] for name, kind in _NAMES.items()} for i in (4, 0, 1, 2, 3)
  ]
  num_targets = 6  # one more than there are: padding
  labels = np.full((2, num_targets), -1, np.int32)
  for i in range(2):
    labels[i, : len(golden[f"labels_{i}"])] = golden[f"labels_{i}"]
  batch = {
    "labels": labels,
    "segments": np.stack([segment_layers(golden[f"masks_{i}"], 3) for i in range(2)]),
  }
  draws = [golden[f"rand_{i:02d}"] for i in range(20)]
  match_points = np.stack([np.concatenate(draws[4 * i : 4 * i + 2]) for i in range(5)])
  by_target = lambda arrays: np.stack(  # noqa: E731
    [_by_target(golden, i, array, num_targets) for i, array in enumerate(arrays)]
  )
  pair_points = by_target([golden[f"points_{i:02d}"] for i in range(5)])
  candidates, uniform = by_target(draws[2::4]), by_target(draws[3::4])
  return predictions, batch, match_points, pair_points, (candidates, uniform)


_NAMES = {"class_logits": "logits", "mask_logits": "masks"}


def _by_target(golden, prediction, array, num_targets):
  """Per pair (image, then query) -> (B, N, ...) by target."""
  result = np.zeros((2, num_targets, *array.shape[1:]), np.float32)
  begin = 0
  for image in range(2):
    targets = golden[f"match_{prediction:02d}_b{image}"][1]
    result[image, targets] = array[begin : begin + len(targets)]
    begin += len(targets)
  return result


@pytest.fixture(scope="module")
def losses(official):
  predictions, batch, match_points, pair_points, _ = official

  @jax.jit
  def run(predictions):
    losses = TASK.set_losses(
      predictions, batch, match_points=match_points, source=pair_points, points=_recorded_points
    )
    return losses.total, losses

  (_, losses), gradient = jax.value_and_grad(run, has_aux=True)(predictions)
  return jax.device_get((losses, gradient))


def test_losses_equal_the_official_criterion(golden, losses):
  losses, _ = losses
  np.testing.assert_allclose(losses.total, golden["total_weighted"], rtol=1e-5)
  for name in ("class", "mask", "dice"):
    key = {"class": "ce"}.get(name, name)
    expected = [golden[f"L_loss_{key}{suffix}"] for suffix in ("", "_0", "_1", "_2", "_3")]
    np.testing.assert_allclose(getattr(losses, f"{name}_loss"), expected, rtol=1e-5)


def test_matches_equal_the_official_criterion(golden, losses):
  losses, _ = losses
  for prediction in range(5):
    for image in range(2):
      queries, targets = golden[f"match_{prediction:02d}_b{image}"]
      np.testing.assert_array_equal(losses.queries[prediction, image, targets], queries)
      assert losses.matched[prediction, image].sum() == len(targets)


def test_gradients_equal_the_official_criterion(golden, losses):
  _, gradient = losses
  for index, ours in zip((4, 0, 1, 2, 3), gradient, strict=True):
    for name, kind in _NAMES.items():
      np.testing.assert_allclose(
        ours[name], golden[f"grad_{kind}_{index}"], rtol=1e-4, atol=1e-6, err_msg=f"{name} {index}"
      )


def test_costs_equal_the_official_criterion(golden, official):
  predictions, batch, match_points, _, _ = official
  stacked = [np.stack([p[name] for p in predictions]) for name in _NAMES]
  costs = TASK._costs(*stacked, batch["labels"], batch["segments"], match_points)
  for i in range(10):
    expected = golden[f"cost_{i:02d}"]
    ours = costs[i // 2, i % 2, :, : expected.shape[1]]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_uncertain_points_equal_the_official_choice(golden, official, losses):
  predictions, _, _, pair_points, (candidates, uniform) = official
  losses, _ = losses
  for p, prediction in enumerate(predictions):
    for image in range(2):
      for target in np.flatnonzero(losses.matched[p, image]):
        maps = prediction["mask_logits"][image, losses.queries[p, image, target]]
        points = uncertain_points(
          maps, candidates[p, image, target], uniform[p, image, target], TASK.num_points
        )
        order = lambda x: x[np.lexsort(x.T)]  # noqa: E731
        np.testing.assert_array_equal(
          order(np.asarray(points)), order(pair_points[p, image, target])
        )
