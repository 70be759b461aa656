"""The audio-visual task: inputs, losses and what padding does to them."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from effseg_jax.errors import UserError
from effseg_jax.tasks import make_task
from effseg_jax.tasks.audio_visual import AudioVisualTask, bce_loss, dice_loss

SIZE = (8, 12)
COLOURS = ((0, 0, 0), (200, 0, 0), (0, 200, 0))
binary = AudioVisualTask(("sounding",), COLOURS[1:2])
semantic = AudioVisualTask(("background", "cat", "dog"), COLOURS)
loss = jax.jit(lambda task, outputs, batch: task.loss(outputs, batch, None), static_argnums=0)


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return {
    "frames": rng.integers(0, 256, (2, 4, *SIZE, 3), dtype=np.uint8),
    "log_mel": rng.standard_normal((2, 4, 96, 64)).astype(np.float32),
    "masks": rng.integers(0, 2, (2, 4, *SIZE)).astype(np.uint8),
    "frame_weight": np.array([[1, 0, 0, 0], [1, 1, 1, 1]], np.float32),
    "valid_frames": np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.float32),
    "weight": np.ones(2, np.float32),
  }


def logits_of(task, seed=1):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((2, 4, *SIZE, task.num_classes)).astype(np.float32)


def test_inputs_are_normalised_and_padding_is_zero(batch):
  frames, log_mel = binary.model_inputs(batch)
  expected = (batch["frames"] - np.array(binary.mean)) / np.array(binary.std)
  np.testing.assert_allclose(frames[1], expected[1], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(frames[0, :2], expected[0, :2], rtol=1e-4, atol=1e-5)
  assert not np.asarray(frames[0, 2:]).any()
  np.testing.assert_array_equal(log_mel, batch["log_mel"])


def test_only_supervised_frames_are_in_the_loss(batch):
  logits = logits_of(binary)
  found, scalars, _ = loss(binary, logits, batch)
  assert set(scalars) == {"mask_loss"}
  each = np.asarray(dice_loss(logits[..., 0], batch["masks"].astype(np.float32)))
  supervised = batch["frame_weight"] > 0
  assert float(found) == pytest.approx(each[supervised].mean(), rel=1e-5)
  logits[0, 1:] += 3.0  # the unsupervised frames
  assert float(loss(binary, logits, batch)[0]) == pytest.approx(float(found), rel=1e-6)
  batch["weight"][1] = 0  # a filler
  assert float(loss(binary, logits, batch)[0]) == pytest.approx(each[0, 0], rel=1e-5)
  batch["weight"][0] = 0
  assert float(loss(binary, logits, batch)[0]) == 0.0


def test_semantic_loss_is_the_cross_entropy(batch):
  batch["masks"] = np.random.default_rng(2).integers(0, 3, batch["masks"].shape).astype(np.uint8)
  logits = logits_of(semantic)
  found, _, counts = loss(semantic, logits, batch)
  labels = batch["masks"].astype(int)
  each = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean((-2, -1))
  assert float(found) == pytest.approx(np.asarray(each)[batch["frame_weight"] > 0].mean(), rel=1e-5)
  assert counts.shape == (3, 3) and counts.sum() == 5 * SIZE[0] * SIZE[1] / 16
  prediction, sample = logits.argmax(-1)[..., ::4, ::4], labels[..., ::4, ::4]
  right = (prediction == sample)[batch["frame_weight"] > 0].sum()
  assert np.trace(counts) == right
  assert 0 < semantic.summarise(np.asarray(counts))["mIoU"] < 1


def test_logits_of_padding_are_those_of_the_background(batch):
  logits = np.asarray(semantic.valid_logits(logits_of(semantic) + 2.0, batch))
  assert not logits[0, 2:].any() and logits[0, :2].all() and logits[1].all()


def test_counts_become_the_iou_of_what_sounds(batch):
  batch["masks"][:] = 0
  batch["masks"][..., :6] = 1
  logits = np.where(np.arange(SIZE[1]) < 4, 1.0, -1.0) * np.ones((2, 4, *SIZE))
  counts = loss(binary, logits[..., None].astype(np.float32), batch)[2]
  assert binary.summarise(np.asarray(counts))["IoU"] == pytest.approx(1 / 2)  # of columns 0, 4, 8
  silent = np.array([[9, 0], [0, 0]])
  assert binary.summarise(silent)["IoU"] == 0.0


def test_the_losses_add_up():
  rng = np.random.default_rng(0)
  logits, masks = rng.standard_normal(SIZE), rng.integers(0, 2, SIZE).astype(np.float32)
  task = make_task(
    {"name": "audio_visual", "mask_loss": "bce_dice"},
    type("Sounds", (), {"classes": ("sounding",), "palette": np.array(COLOURS[1:2])}),
  )
  one = {
    "masks": masks[None, None].astype(np.uint8),
    "frame_weight": np.ones((1, 1)),
    "valid_frames": np.ones((1, 1)),
    "weight": np.ones(1),
  }
  found = loss(task, logits[None, None, ..., None].astype(np.float32), one)[0]
  p = 1 / (1 + np.exp(-logits))
  dice = 1 - 2 * (p * masks).sum() / ((p**2).sum() + masks.sum() + 0.002)
  bce = -(masks * np.log(p) + (1 - masks) * np.log(1 - p)).mean()
  assert float(found) == pytest.approx(dice + bce, rel=1e-5)


def test_silence_has_no_gradient_from_dice_but_from_cross_entropy():
  masks = np.zeros(SIZE, np.float32)
  slope = lambda one: np.abs(jax.grad(lambda x: one(x, masks))(np.zeros(SIZE))).max()  # noqa: E731
  assert slope(dice_loss) < 1e-6 < slope(bce_loss)


def test_an_unknown_loss_is_refused():
  with pytest.raises(UserError, match=r"mask_loss is 'dise'; .*Did you mean 'dice'"):
    AudioVisualTask(("sounding",), COLOURS[1:2], mask_loss="dise")


@pytest.fixture(scope="module")
def golden():
  """Losses of the reference, and a regular sample of their gradients."""
  with np.load(Path(__file__).parents[1] / "golden" / "audio_visual_losses.npz") as arrays:
    return dict(arrays)


def by_clip(array, time):
  """(B T, C, H, W) -> (B, T, H, W, C)."""
  array = array.reshape(-1, time, *array.shape[1:])
  return np.moveaxis(array, 2, -1)


@pytest.mark.parametrize("kind", ["dice", "bce"])
@pytest.mark.parametrize("subset", ["s4", "ms3"])
def test_reference_losses_and_gradients(golden, subset, kind):
  task = AudioVisualTask(("sounding",), COLOURS[1:2], mask_loss=kind)
  masks = by_clip(golden["gt5"], 5)[..., 0]
  weight = np.ones((2, 5), np.float32)
  if subset == "s4":
    weight[:, 1:] = 0
    masks = np.concatenate([golden["gt1"][:, 0], 0 * masks[:, 1:]], axis=1)
  batch = {
    "masks": masks.astype(np.uint8),
    "frame_weight": weight,
    "valid_frames": np.ones((2, 5), np.float32),
    "weight": np.ones(2, np.float32),
  }

  def total(logits, feature):
    outputs = {"logits": logits, "mask_feature": feature}
    return task.loss(outputs, batch, None)[:2]

  inputs = by_clip(golden["pred"], 5), by_clip(golden["mask_feature"], 5)
  (found, scalars), slopes = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*inputs)
  case = f"{subset}_{kind}"
  assert float(found) == pytest.approx(float(golden[f"{case}/total"]), rel=2e-6)
  assert float(scalars["mask_loss"]) == pytest.approx(float(golden[f"{case}/iou"]), rel=2e-6)
  mix = task.mix_weight * float(scalars["mix_loss"])
  assert mix == pytest.approx(float(golden[f"{case}/mix_weighted"]), rel=2e-6)
  for slope, name in zip(slopes, ("grad_pred", "grad_mask_feature"), strict=True):
    expected = by_clip(golden[f"{case}/{name}"], 5)
    slope = slope[:, :, ::6, ::7]
    np.testing.assert_allclose(slope, expected, atol=2e-6 * np.abs(expected).max())


def test_reference_semantic_loss(shared):
  with np.load(shared / "golden/avesformer/avs_losses.npz") as losses:
    golden = dict(losses)
  with np.load(shared / "golden/avesformer/avs_metrics.npz") as metrics:
    logits, masks = metrics["avss/logits_f16"], metrics["avss/target"]
  task = AudioVisualTask(tuple(map(str, range(71))), ((0, 0, 0),) * 71)
  batch = {
    "masks": masks.reshape(2, 10, *masks.shape[1:]),
    "frame_weight": golden["avss/gt_flag"].reshape(2, 10),
    "valid_frames": np.ones((2, 10), np.float32),
    "weight": np.ones(2, np.float32),
  }
  outputs = {
    "logits": by_clip(logits.astype(np.float32), 10),
    "mask_feature": by_clip(golden["avss/mask_feature"], 10),
  }
  found, scalars, _ = loss(task, outputs, batch)
  assert float(found) == pytest.approx(float(golden["avss/total"]), rel=2e-6)
  assert float(scalars["mask_loss"]) == pytest.approx(float(golden["avss/ce"]), rel=2e-6)
