"""The losses against the official criterion, and training's edge cases."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.ops import backend
from effseg_jax.ops.point_sample import NO_SEGMENT
from effseg_jax.tasks.mask_losses import uncertain_points
from effseg_jax.tasks.universal import UniversalTask
from effseg_jax.training import sharding

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


@pytest.fixture(scope="module", params=["trimmed", "full"])
def golden(request):
  """The recorded criterion: two predictions of it, or all five."""
  if request.param == "trimmed":
    return dict(np.load(Path(__file__).parents[1] / "golden" / "mask2former_criterion.npz"))
  shared = request.getfixturevalue("shared")
  return dict(np.load(shared / "golden" / "mask2former" / "criterion.npz"))


def _recorded(golden):
  """Numbers of the recorded predictions in the order of their draws: the final one first."""
  return [i for i in (4, 0, 1, 2, 3) if f"pred_logits_{i}" in golden]


@pytest.fixture(scope="module")
def official(golden):
  """The recorded criterion as our arguments: predictions (final first), batch and points."""
  predictions = [
    {name: golden[f"pred_{kind}_{i}"] for name, kind in _NAMES.items()} for i in _recorded(golden)
  ]
  count = len(predictions)
  num_targets = 6  # one more than there are: padding
  labels = np.full((2, num_targets), -1, np.int32)
  for i in range(2):
    labels[i, : len(golden[f"labels_{i}"])] = golden[f"labels_{i}"]
  batch = {
    "labels": labels,
    "segments": np.stack([segment_layers(golden[f"masks_{i}"], 3) for i in range(2)]),
  }
  draws = [golden[f"rand_{i:02d}"] for i in range(4 * count)]
  match_points = np.stack([np.concatenate(draws[4 * i : 4 * i + 2]) for i in range(count)])
  by_target = lambda arrays: np.stack(  # noqa: E731
    [_by_target(golden, i, array, num_targets) for i, array in enumerate(arrays)]
  )
  pair_points = by_target([golden[f"points_{i:02d}"] for i in range(count)])
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
  suffixes = ["" if i == 4 else f"_{i}" for i in _recorded(golden)]
  np.testing.assert_allclose(losses.total, golden["total_weighted"], rtol=1e-5)
  for name in ("class", "mask", "dice"):
    key = {"class": "ce"}.get(name, name)
    expected = [golden[f"L_loss_{key}{suffix}"] for suffix in suffixes]
    np.testing.assert_allclose(getattr(losses, f"{name}_loss"), expected, rtol=1e-5)


def test_matches_equal_the_official_criterion(golden, losses):
  losses, _ = losses
  for prediction in range(len(losses.queries)):
    for image in range(2):
      queries, targets = golden[f"match_{prediction:02d}_b{image}"]
      np.testing.assert_array_equal(losses.queries[prediction, image, targets], queries)
      assert losses.matched[prediction, image].sum() == len(targets)


def test_gradients_equal_the_official_criterion(golden, losses):
  _, gradient = losses
  for index, ours in zip(_recorded(golden), gradient, strict=True):
    for name, kind in _NAMES.items():
      np.testing.assert_allclose(
        ours[name], golden[f"grad_{kind}_{index}"], rtol=1e-4, atol=1e-7, err_msg=f"{name} {index}"
      )


def test_costs_equal_the_official_criterion(golden, official):
  predictions, batch, match_points, _, _ = official
  stacked = [np.stack([p[name] for p in predictions]) for name in _NAMES]
  costs = TASK._costs(*stacked, batch["labels"], batch["segments"], match_points)
  for i in range(2 * len(predictions)):
    expected = golden[f"cost_{i:02d}"]
    ours = costs[i // 2, i % 2, :, : expected.shape[1]]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_uncertain_points_equal_the_official_choice(golden, official, losses):
  predictions, _, _, pair_points, (candidates, uniform) = official
  losses, _ = losses
  choose = jax.jit(uncertain_points, static_argnames="num_points")
  for p, prediction in enumerate(predictions):
    for image in range(2):
      for target in np.flatnonzero(losses.matched[p, image]):
        maps = prediction["mask_logits"][image, losses.queries[p, image, target]]
        draws = candidates[p, image, target], uniform[p, image, target]
        points = choose(maps, *draws, num_points=TASK.num_points)
        order = lambda x: x[np.lexsort(x.T)]  # noqa: E731
        np.testing.assert_array_equal(
          order(np.asarray(points)), order(pair_points[p, image, target])
        )


def _batch(rng, labels, size=32):
  """Images of vertical stripes, one per target, the last one's right half without a target."""
  segments = np.full((len(labels), 1, size, size), NO_SEGMENT, np.uint8)
  packed = np.full((len(labels), 4), -1, np.int32)
  for i, image_labels in enumerate(labels):
    packed[i, : len(image_labels)] = image_labels
    width = size // max(len(image_labels), 1)
    for n in range(len(image_labels)):
      segments[i, 0, :, n * width : n * width + width // (1 + (n == 3))] = n
  return {
    "image": rng.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8),
    "valid_size": np.full((len(labels), 2), size, np.int32),
    "segments": segments,
    "labels": packed,
    "dropped_segments": np.zeros(len(labels), np.int32),
    "weight": np.ones(len(labels), np.float32),
  }


def _outputs(rng, batch_size, num_predictions=3, num_queries=6):
  def prediction():
    logits = rng.standard_normal((batch_size, num_queries, TASK.num_classes + 1))
    masks = rng.standard_normal((batch_size, num_queries, 8, 8))
    return {"class_logits": logits.astype(np.float32), "mask_logits": masks.astype(np.float32)}

  return {**prediction(), "aux": [prediction() for _ in range(num_predictions - 1)]}


@jax.jit
def loss_and_gradient(outputs, batch, rng):
  def loss(outputs):
    total, scalars, counts = TASK.loss(outputs, batch, rng)
    return total, (scalars, counts)

  return jax.value_and_grad(loss, has_aux=True)(outputs)


def test_training_loss_of_random_points():
  rng = np.random.default_rng(0)
  batch, outputs = _batch(rng, [[3, 5, 3, 18], [0], [], [7, 7]]), _outputs(rng, 4)
  key = jax.random.key(0)
  (loss, (scalars, counts)), gradient = loss_and_gradient(outputs, batch, key)
  again, _ = loss_and_gradient(outputs, batch, key)
  assert float(loss) == float(again[0])
  assert float(loss) != float(loss_and_gradient(outputs, batch, jax.random.key(1))[0][0])
  assert float(scalars["targets"]) == 7 / 4
  # Per image 8x8 labels; the image without targets has none, half a stripe of the first neither.
  assert counts.sum() == 3 * 64 - 8
  assert set(TASK.summarise(counts)) == {"mIoU"}
  # Without a target, no mask learns, and every query learns that it is no object.
  masks, classes = gradient["mask_logits"], gradient["class_logits"]
  assert not masks[2].any() and masks[3].any()
  assert (np.asarray(classes[2, :, -1]) < 0).all()


def test_a_batch_without_any_target_trains_no_object():
  rng = np.random.default_rng(1)
  batch, outputs = _batch(rng, [[], [], [], []]), _outputs(rng, 4)
  (loss, (scalars, counts)), gradient = loss_and_gradient(outputs, batch, jax.random.key(0))
  assert np.isfinite(loss) and loss > 0
  assert scalars["loss_mask"] == 0 and scalars["loss_dice"] == 0 and counts.sum() == 0
  assert not np.asarray(gradient["mask_logits"]).any()
  assert np.isfinite(gradient["class_logits"]).all()


def test_the_right_answer_costs_next_to_nothing():
  rng = np.random.default_rng(2)
  batch = _batch(rng, [[3, 5], [18, 2], [1, 0], [7, 7]])
  outputs = _outputs(rng, 4, num_predictions=3)
  for prediction in (outputs, *outputs["aux"]):
    prediction["class_logits"][...] = 20.0 * np.eye(TASK.num_classes + 1)[-1]
    prediction["mask_logits"][...] = -12.0
    for i in range(4):
      for n, query in enumerate([4, 1]):  # the queries of targets 0 and 1
        prediction["class_logits"][i, query] = 20.0 * np.eye(20)[batch["labels"][i, n]]
        mask = batch["segments"][i, 0, 2::4, 2::4] == n
        prediction["mask_logits"][i, query] = np.where(mask, 12.0, -12.0)
  (_, (scalars, counts)), _ = loss_and_gradient(outputs, batch, jax.random.key(0))
  # Points between two pixels of a target have a label between 0 and 1, which no logit meets.
  assert scalars["loss_class"] < 1e-4
  assert scalars["loss_dice"] < 0.1
  assert TASK.summarise(counts)["mIoU"] == 1.0


def test_semantic_targets_and_padding_cost_nothing_extra():
  """A semantic target is one segment per class; room for more targets changes no loss."""
  rng = np.random.default_rng(3)
  batch, outputs = _batch(rng, [[0, 5, 9, 18], [1, 2], [3], []]), _outputs(rng, 4)
  wide = dict(batch, labels=np.pad(batch["labels"], ((0, 0), (0, 5)), constant_values=-1))
  key = jax.random.key(0)
  (loss, _), gradient = loss_and_gradient(outputs, batch, key)
  (wide_loss, _), wide_gradient = loss_and_gradient(outputs, wide, key)
  np.testing.assert_allclose(wide_loss, loss, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), wide_gradient, gradient)


def test_a_sharded_batch_gives_the_same_loss_and_stays_where_it_is():
  rng = np.random.default_rng(4)
  batch, outputs = _batch(rng, [[3, 5, 3, 18], [0], [], [7, 7]]), _outputs(rng, 4)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})
  cut, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  @functools.partial(jax.jit, in_shardings=(cut, cut, everywhere), out_shardings=(everywhere, cut))
  def step(*args):
    with backend.several_devices(cut):
      return loss_and_gradient.__wrapped__(*args)

  key = jax.random.key(0)
  program = step.lower(outputs, batch, key).compile()
  text = program.as_text()
  # What moves between devices is sums.
  for kind in ("all-gather", "all-to-all", "collective-permute"):
    assert kind not in text
  (loss, _), gradient = program(jax.device_put(outputs, cut), jax.device_put(batch, cut), key)
  (expected, _), expected_gradient = loss_and_gradient(outputs, batch, key)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), gradient, expected_gradient
  )
