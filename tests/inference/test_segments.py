"""Reading masks: against the official post-processing, and against each rule by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.errors import UserError
from effseg_jax.inference import mask_readout
from effseg_jax.inference import segments as mask_inference
from effseg_jax.inference.mask_readout import MaskInference
from effseg_jax.ops import mask_scores
from effseg_jax.ops.resize import resize_bilinear

segment_batch = jax.jit(mask_readout.segment_batch, static_argnames=("canvas", "inference"))

# Four classes: two things, two stuff.
THINGS = (True, True, False, False)


GOLDEN = Path(__file__).parents[1] / "golden" / "mask2former_postproc.npz"


@pytest.fixture(scope="module")
def official():
  """The recorded outputs, which have the resolution of the results, and what was read there."""
  golden = dict(np.load(GOLDEN))
  things = np.isin(np.arange(golden["num_classes"]), golden["thing_ids"])
  outputs = {"class_logits": golden["mask_cls"][None], "mask_logits": golden["mask_pred"][None]}
  return golden, outputs, tuple(map(bool, things))


def _read(outputs, inference):
  rows, cols = outputs["mask_logits"].shape[2:]
  size = np.array([[rows, cols]], np.int32)
  found = segment_batch(outputs, size, size, canvas=(64, 64), inference=inference)
  return jax.device_get(found), (rows, cols)


@pytest.mark.parametrize("overlap, suffix", [(0.8, ""), (0.3, "_ov0p3")])
def test_panoptic_equals_the_official_one(official, overlap, suffix):
  golden, outputs, things = official
  inference = MaskInference(
    things, instance=False, semantic=False, overlap_threshold=overlap, stride=1
  )
  found, size = _read(outputs, inference)
  result = mask_inference.panoptic_result(found, 0, size, things)
  np.testing.assert_array_equal(result["segmentation"], golden[f"panoptic_seg{suffix}"])
  name = "segments_ov0p3" if suffix else "segments_id_isthing_cat"
  table = [(s["id"], s["is_thing"], s["label_id"]) for s in result["segments_info"]]
  np.testing.assert_array_equal(np.array(table, int), golden[name])


def test_instances_equal_the_official_ones(official):
  golden, outputs, things = official
  inference = MaskInference(things, semantic=False, detections=20, stride=1)
  found, size = _read(outputs, inference)
  result = mask_inference.instance_result(found, 0, size)
  order = np.argsort(-result["scores"], kind="stable")[: len(golden["inst_scores_sorted"])]
  np.testing.assert_allclose(result["scores"][order], golden["inst_scores_sorted"], rtol=1e-5)
  np.testing.assert_array_equal(result["labels"][order], golden["inst_classes_sorted"])
  np.testing.assert_array_equal(result["masks"][order], golden["inst_masks_sorted"])


def test_semantic_equals_the_official_one(official):
  golden, outputs, things = official
  for together in (True, False):
    inference = MaskInference(things, panoptic=together, instance=False, stride=1)
    found, (rows, cols) = _read(outputs, inference)
    np.testing.assert_array_equal(found.semantic[0, :rows, :cols], golden["semantic"])
    assert not found.semantic[0, rows:].any()


def test_semantic_scores_equal_the_official_ones(official, shared):
  _, outputs, _ = official
  scores = mask_scores.semantic_scores(outputs["class_logits"], outputs["mask_logits"])
  expected = np.load(shared / "golden" / "mask2former" / "postproc.npz")["sem_seg"]
  np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-5)


def test_resizes_as_the_official_evaluation_does(shared):
  golden = np.load(shared / "golden" / "mask2former" / "postproc_resize.npz")
  low, expected = golden["low"], golden["out"]
  class_logits = np.full((1, len(low), 2), -9.0, np.float32)
  class_logits[..., 0] = np.arange(len(low), 0, -1)  # probabilities fall with the query's number
  outputs = {"class_logits": class_logits, "mask_logits": low[None]}
  result = mask_inference.post_process_instance(
    outputs,
    [tuple(golden["final"])],
    detections=len(low),
    valid_sizes=[tuple(golden["crop"])],
  )[0]
  certain = np.abs(expected) > 1e-4
  np.testing.assert_array_equal(result["masks"][certain], expected[certain] > 0)
  sigmoid = 1 / (1 + np.exp(-expected.astype(np.float64)))
  mean = (sigmoid * (expected > 0)).sum((1, 2)) / (expected > 0).sum((1, 2))
  probability = np.asarray(jax.nn.softmax(class_logits))[0, :, 0]
  np.testing.assert_allclose(result["scores"], probability * mean, rtol=1e-5)


def test_semantic_alone_resizes_scores_and_not_logits():
  rng = np.random.default_rng(0)
  class_logits = jnp.asarray(3 * rng.standard_normal((1, 6, 5)), jnp.float32)
  mask_logits = jnp.asarray(4 * rng.standard_normal((1, 6, 9, 11)), jnp.float32)
  valid, label = (33, 41), (50, 61)
  full = resize_bilinear(mask_logits.transpose(0, 2, 3, 1), (36, 44)).transpose(0, 3, 1, 2)
  scores = mask_scores.semantic_scores(class_logits, full)[:, :, : valid[0], : valid[1]]
  expected = resize_bilinear(scores.transpose(0, 2, 3, 1), label)[0]
  outputs = {"class_logits": class_logits, "mask_logits": mask_logits}
  result = mask_inference.post_process_semantic(outputs, [label], valid_sizes=[valid])[0]
  top = np.sort(np.asarray(expected), axis=-1)
  certain = top[..., -1] - top[..., -2] > 1e-4
  np.testing.assert_array_equal(result[certain], np.asarray(expected).argmax(-1)[certain])


def _outputs(*queries):
  """One image of 64 x 64 from (class, logit of the class, columns of the mask, mask logit)."""
  queries += ((len(THINGS), 9, slice(0, 16), 20),) * (4 - len(queries))  # no object
  class_logits = np.zeros((1, len(queries), len(THINGS) + 1), np.float32)
  mask_logits = np.full((1, len(queries), 16, 16), -20.0, np.float32)
  for i, (kind, class_logit, columns, mask_logit) in enumerate(queries):
    class_logits[0, i, kind] = class_logit
    mask_logits[0, i, :, columns] = mask_logit
  return {"class_logits": class_logits, "mask_logits": mask_logits}


def _panoptic(outputs, **options):
  result = mask_inference.post_process_panoptic(outputs, [(16, 64)], is_thing=THINGS, **options)[0]
  segments = [(s["id"], s["label_id"]) for s in result["segments_info"]]
  return result["segmentation"], segments


def test_stuff_is_merged_and_things_are_not():
  segmentation, segments = _panoptic(
    _outputs(
      (2, 9, slice(0, 4), 20),
      (1, 9, slice(4, 8), 20),
      (2, 9, slice(8, 12), 20),
      (1, 9, slice(12, 16), 20),
    )
  )
  assert segments == [(1, 2), (2, 1), (3, 1)]
  assert segmentation[8, [2, 18, 34, 50]].tolist() == [1, 2, 1, 3]


def test_uncertain_queries_and_those_without_object_are_left_out():
  segmentation, segments = _panoptic(
    _outputs(
      (0, 9, slice(0, 4), 20),
      (1, 2, slice(4, 8), 20),  # probability 0.65
      (4, 9, slice(8, 16), 20),  # no object
    )
  )
  assert segments == [(1, 0)]
  assert segmentation[8, [2, 18, 34, 50]].tolist() == [1, 0, 0, 0]


def test_a_mask_that_is_mostly_covered_is_dropped_and_leaves_void():
  covered = _outputs((0, 9, slice(0, 16), 1.0), (1, 9, slice(0, 8), 20))
  segmentation, segments = _panoptic(covered)
  assert segments == [(1, 1)]
  assert segmentation[8, [2, 50]].tolist() == [1, 0]
  segmentation, segments = _panoptic(covered, thresholds=(0.8, 0.3))
  assert segments == [(1, 0), (2, 1)]
  assert segmentation[8, [2, 50]].tolist() == [2, 1]


def test_nothing_kept_is_void_everywhere():
  segmentation, segments = _panoptic(_outputs((0, 0, slice(0, 16), 20)))
  assert segments == []
  assert segmentation.shape == (16, 64) and not segmentation.any()


def test_pictures_of_a_batch_have_sizes_of_their_own():
  rng = np.random.default_rng(1)
  outputs = {
    "class_logits": 3 * rng.standard_normal((2, 6, 5)).astype(np.float32),
    "mask_logits": 4 * rng.standard_normal((2, 6, 16, 16)).astype(np.float32),
  }
  sizes, valid = [(40, 50), (64, 30)], [(51, 64), (64, 30)]
  together = mask_inference.post_process_semantic(outputs, sizes, valid_sizes=valid)
  for i in range(2):
    alone = mask_inference.post_process_semantic(
      {name: value[i : i + 1] for name, value in outputs.items()},
      [sizes[i]],
      valid_sizes=[valid[i]],
    )
    assert together[i].shape == sizes[i]
    np.testing.assert_array_equal(together[i], alone[0])


def test_as_many_sizes_as_images():
  with pytest.raises(UserError, match="target_sizes has 2 entries; the outputs are of 1 images"):
    mask_inference.post_process_panoptic(_outputs((0, 9, slice(0, 4), 20)), [(8, 8), (8, 8)])
