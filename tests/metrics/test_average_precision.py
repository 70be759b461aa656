"""AP by hand on small scenes, and result files that COCO's own code reads back."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from effseg_jax.errors import UserError
from effseg_jax.metrics import coco_results
from effseg_jax.metrics.average_precision import AveragePrecision

# Categories 3 and 7 are things, 9 is stuff.
IDS, THINGS = (3, 7, 9), (True, True, False)
SIZE = (40, 60)


def box(top, left, height, width):
  mask = np.zeros(SIZE, bool)
  mask[top : top + height, left : left + width] = True
  return mask


LEFT, RIGHT, WIDE = box(5, 0, 30, 20), box(5, 30, 30, 20), box(5, 0, 30, 25)


def evaluated(*images, **more):
  """Evaluates images of (id, true masks, labels, found masks, labels, scores)."""
  precision = AveragePrecision(IDS, THINGS, **more)
  for name, true, true_labels, found, labels, scores in images:
    if not more:
      precision.add_truth(name, np.array(true), true_labels, [False] * len(true))
    precision.update(name, np.array(found).reshape(-1, *SIZE), labels, scores)
  return precision.result()


def test_the_truth_itself_is_perfect():
  means, per_class = evaluated((1, [LEFT, RIGHT], [0, 1], [RIGHT, LEFT], [1, 0], [0.3, 0.9]))
  # Both have 600 pixels: small is below 32^2.
  assert means == pytest.approx({"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "AP_small": 1.0})
  np.testing.assert_allclose(per_class, [1.0, 1.0, np.nan])


def test_a_mask_counts_up_to_its_iou():
  # IoU 600 / 750 = 0.8: right at 7 of 10 thresholds (0.50 to 0.80).
  means, per_class = evaluated((1, [LEFT], [0], [WIDE], [0], [0.5]))
  assert means["AP"] == pytest.approx(0.7) and means["AP75"] == pytest.approx(1.0)
  assert per_class[0] == pytest.approx(0.7) and np.isnan(per_class[1:]).all()


def test_order_by_score_matters():
  nowhere = box(36, 50, 4, 10)
  first = evaluated((1, [LEFT], [0], [LEFT, nowhere], [0, 0], [0.9, 0.2]))[0]
  second = evaluated((1, [LEFT], [0], [LEFT, nowhere], [0, 0], [0.2, 0.9]))[0]
  assert first["AP"] == pytest.approx(1.0) and second["AP"] == pytest.approx(0.5)


def test_a_missed_object_halves_the_recall():
  means, _ = evaluated((1, [LEFT, RIGHT], [0, 0], [LEFT], [0], [0.9]))
  assert means["AP"] == pytest.approx(51 / 101)  # recalls 0.00, 0.01, ... 0.50 of 101


def test_a_detection_inside_a_crowd_is_no_mistake():
  results = []
  for crowd in (True, False):
    precision = AveragePrecision(IDS, THINGS)
    precision.add_truth("a", np.array([LEFT, RIGHT]), [0, 0], [False, crowd])
    inside = box(10, 32, 5, 5)
    precision.update("a", np.array([inside, LEFT]), [0, 0], [0.9, 0.5])
    results.append(precision.result()[0]["AP"])
  assert results[0] == pytest.approx(1.0) and results[1] < 0.5


def test_stuff_is_passed_over():
  means, _ = evaluated((1, [LEFT, RIGHT], [0, 2], [RIGHT, LEFT], [2, 0], [0.9, 0.5]))
  assert means["AP"] == pytest.approx(1.0)


def test_nothing_to_find_and_nothing_found():
  assert evaluated((1, [LEFT], [0], [], [], []))[0]["AP"] == 0.0
  means, per_class = evaluated((1, [], [], [LEFT], [0], [0.9]))
  assert means == {} and np.isnan(per_class).all()
  # An image without objects still counts what is found in it.
  with_mistake = evaluated((1, [LEFT], [0], [LEFT], [0], [0.5]), (2, [], [], [RIGHT], [0], [0.9]))
  assert with_mistake[0]["AP"] == pytest.approx(0.5)


def test_merging_equals_one_pass():
  images = [
    ("a", [LEFT], [0], [WIDE], [0], [0.7]),
    ("b", [LEFT, RIGHT], [1, 0], [LEFT], [1], [0.4]),
    ("c", [], [], [RIGHT], [0], [0.8]),
  ]
  together, per_class = evaluated(*images)
  parts = [AveragePrecision(IDS, THINGS) for _ in images]
  for part, (name, true, true_labels, found, labels, scores) in zip(parts, images, strict=True):
    part.add_truth(name, np.array(true), true_labels, [False] * len(true))
    part.update(name, np.array(found), labels, scores)
  parts[2].merge_bytes(parts[0].to_bytes())
  parts[2].merge_bytes(parts[1].to_bytes())
  assert parts[2].result()[0] == together
  np.testing.assert_array_equal(parts[2].result()[1], per_class)


def instances_json(path, image_ids=(1, 2)):
  """An official annotation file in which image 1 has one object."""
  square = [0, 5, 20, 5, 20, 35, 0, 35]
  path.write_text(
    json.dumps(
      {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in image_ids],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
          {"id": 8, "image_id": 1, "category_id": 3, "segmentation": [square], "area": 600}
          | {"iscrowd": 0, "bbox": [0, 5, 20, 30]}
        ],
      }
    )
  )
  return path


def test_against_official_annotations(tmp_path):
  path = instances_json(tmp_path / "instances.json")
  images = ((1, [], [], [WIDE], [0], [0.7]), (2, [], [], [RIGHT], [0], [0.2]))
  assert evaluated(*images, truth=path)[0]["AP"] == pytest.approx(0.7)
  # Only what was evaluated counts.
  assert evaluated(images[1], truth=path)[0] == {}
  with pytest.raises(UserError, match=r"instances\.json lacks 1 of 1 evaluated images.*5"):
    evaluated((5, [], [], [], [], []), truth=path)
  path.write_text("{}")
  with pytest.raises(UserError, match=r"instances\.json"):
    evaluated(images[0], truth=path)


def test_detections_are_read_by_coco(tmp_path):
  entries = coco_results.detections(1, np.array([LEFT, WIDE]), [3, 7], np.float32([0.5, 0.25]))
  coco_results.write_detections(tmp_path / "deep/instances.json", entries)
  truth = COCO(str(instances_json(tmp_path / "truth.json")))
  loaded = truth.loadRes(str(tmp_path / "deep/instances.json"))
  assert [loaded.anns[i]["score"] for i in (1, 2)] == [0.5, 0.25]
  np.testing.assert_array_equal(loaded.annToMask(loaded.anns[2]), WIDE)
  assert loaded.anns[1]["category_id"] == 3 and loaded.anns[1]["area"] == 600


def test_panoptic_results_hold_ids_and_categories(tmp_path):
  segment_map = np.full((30, 40), -1)
  segment_map[:, :10], segment_map[:, 10:20], segment_map[:, 30:] = 0, 299, 1
  categories = np.arange(300) + 50
  predictions = [
    coco_results.panoptic_prediction(7, "000007", segment_map, categories),
    coco_results.panoptic_prediction(9, "000009", np.full((4, 4), -1), []),
  ]
  coco_results.write_panoptic(tmp_path / "out/panoptic.json", predictions)
  first, second = json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"]
  assert first["image_id"] == 7 and first["file_name"] == "000007.png"
  assert first["segments_info"] == [
    {"id": 1, "category_id": 50},
    {"id": 2, "category_id": 51},
    {"id": 300, "category_id": 349},
  ]
  colours = np.asarray(Image.open(tmp_path / "out/panoptic/000007.png")).astype(int)
  np.testing.assert_array_equal(colours @ [1, 256, 65536], segment_map + 1)
  assert second["segments_info"] == []
  assert not np.asarray(Image.open(tmp_path / "out/panoptic/000009.png")).any()
