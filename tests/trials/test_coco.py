"""COCO jsons that are not COCO's: a perfect prediction scores 1, or one line says what is wrong.

Each row is a trial: its letter and number, what differs from a sound file, and the right outcome.
"""

from __future__ import annotations

import json
import tracemalloc
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from effseg_jax import errors
from effseg_jax.errors import DataWarning, UserError
from effseg_jax.input_pipeline import pipelines
from effseg_jax.input_pipeline.datasets import open_dataset
from effseg_jax.metrics.average_precision import AveragePrecision
from tests.trials import make

RUNS = {"size": [20, 24], "counts": [42, 10, 10, 10, 408]}
APPLE = {"id": 1, "name": "apple"}


@pytest.fixture(autouse=True)
def every_warning(monkeypatch):
  """Warnings that are given once a process are given in every test."""
  monkeypatch.setattr(errors, "_warned", set())


def perfect_ap(root, split="val"):
  """AP of the truth itself, and the number of objects that training sees."""
  data = open_dataset("coco_instances", root=root, split=split)
  score = AveragePrecision(data.class_ids, data.thing_mask, data.instances_json)
  targets = 0
  for index in range(len(data)):
    truth, example = data.ground_truth(index), data[index]
    targets += len(example["labels"])
    keep = ~truth.crowd
    score.update(truth.image_id, truth.masks()[keep], truth.labels[keep], np.ones(keep.sum()))
  return score.result()[0].get("AP"), targets


@pytest.mark.parametrize(
  ("trial", "annotation"),
  [
    ("B2 no area", {"area": "absent"}),
    ("B2 no iscrowd", {"iscrowd": "absent"}),
    ("B2 no bbox", {"bbox": "absent"}),
    ("B2 null", {"area": None, "iscrowd": None, "bbox": None}),
    ("B2 texts", {"area": "100", "iscrowd": "0", "category_id": "1", "image_id": "1"}),
    ("B2 booleans", {"iscrowd": False}),
    ("B2 floats", {"iscrowd": 0.0, "category_id": 1.0, "image_id": 1.0}),
    ("B2 absurd area", {"area": 1e12}),
    ("B2 negative area", {"area": -5}),
    ("B2 no number", {"area": float("nan")}),
    ("B3 id 0", {"id": 0}),
    ("B3 no id", {"id": "absent"}),
    ("B3 text", {"id": "a7"}),
    ("B3 negative", {"id": -1}),
    ("B3 repeated", {"id": 2}),
    ("B6 a stray box", {"segmentation": [make.SQUARE[0], [3, 3, 9, 9]]}),
    ("B6 an empty polygon", {"segmentation": [make.SQUARE[0], []]}),
    ("run lengths", {"segmentation": RUNS}),
    ("beyond the edge", {"segmentation": [[-9, -9, 90, -9, 90, 90, -9, 90]]}),
  ],
)
def test_a_perfect_prediction_scores_one(tmp_path, trial, annotation):
  other = {"id": 2, "category_id": 1, "segmentation": [[14, 14, 20, 14, 20, 19, 14, 19]]}
  make.coco(tmp_path, "val", [annotation, other])
  assert perfect_ap(tmp_path) == (pytest.approx(1.0), 2)


@pytest.mark.parametrize(
  ("trial", "annotation", "warns"),
  [
    ("B5 empty", {"segmentation": []}, True),
    ("B5 null", {"segmentation": None}, True),
    ("B5 no such key", {"segmentation": "absent"}, True),
    ("B5 empty lists", {"segmentation": [[], []]}, True),
    ("B6 a point", {"segmentation": [[3, 3]]}, True),
    ("B6 a box", {"segmentation": [[3, 3, 9, 9]]}, True),
    ("B6 no width", {"segmentation": [[3, 3, 3, 3, 3, 3]]}, False),
    ("outside the image", {"segmentation": [[50, 50, 60, 50, 60, 60, 50, 60]]}, False),
    ("no pixel", {"segmentation": {"size": [20, 24], "counts": [480]}}, False),
  ],
)
def test_objects_without_a_mask_are_left_out_of_training_and_evaluation(
  tmp_path, trial, annotation, warns
):
  make.coco(tmp_path, "val", [annotation, {}])
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    assert perfect_ap(tmp_path) == (pytest.approx(1.0), 1)
  said = [str(entry.message) for entry in told if entry.category is DataWarning]
  assert bool(said) == warns
  assert not warns or "1 of 2 objects have no mask and are left out" in said[0]


@pytest.mark.parametrize(
  ("trial", "annotations", "message"),
  [
    ("B5 boxes only", [{"segmentation": []}] * 2, "all 2 objects lack a mask"),
    ("B6 five numbers", [{"segmentation": [[3, 3, 9, 9, 5]]}], "polygon of 5 numbers"),
    ("B8 a flat list", [{"segmentation": make.SQUARE[0]}], "one flat list of numbers"),
    ("B8 points", [{"segmentation": [[{"x": 2, "y": 2}] * 4]}], r"begins with \{'x'"),
    ("B8 points", [{"segmentation": [{"x": 2, "y": 2}]}], r"holds \{'x'"),
    ("B8 texts", [{"segmentation": [["1", "2", "3", "4", "5", "6"]]}], "begins with '1'"),
    ("B8 text", [{"segmentation": "polygon"}], "is 'polygon'"),
    ("absurd", [{"segmentation": [[0, 0, 1e300, 0, 5, 5]]}], r"coordinate 1e\+300"),
    ("absurd", [{"segmentation": [[0, 0, 2e9, 0, 5, 5]]}], r"coordinate 2e\+09"),
    ("no number", [{"segmentation": [[0, 0, float("nan"), 0, 5, 5]]}], "coordinate"),
    ("runs", [{"segmentation": {"size": [20, 24], "counts": [3, 9]}}], "12 pixels, not 480"),
    ("runs", [{"segmentation": {"size": [3, 3], "counts": [0, 9]}}], "size 3x3"),
    ("runs", [{"segmentation": {"size": [20, 24], "counts": "zzzz"}}], "run lengths of"),
    ("runs", [{"segmentation": {"counts": [480]}}], "run lengths of the size None"),
    ("runs", [{"segmentation": {"size": [20, 24], "counts": [-5, 485]}}], "has the counts"),
    ("B9 crowds only", [{"iscrowd": 1}] * 3, r"all 3 objects are crowds .* set iscrowd to 0"),
    ("crowd", [{"iscrowd": 7}], "iscrowd 7; expected 0 or 1"),
    ("category", [{"category_id": "apple"}], "category_id 'apple'; expected a number"),
    ("image", [{"image_id": None}], "image_id None; expected the id of an image"),
    ("image", [{"image_id": 7}], "not in its list of images; the first is of the id 7"),
  ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_cannot_be_drawn_is_one_line(tmp_path, trial, annotations, message, split):
  make.coco(tmp_path, split, annotations)
  with pytest.raises(UserError, match=message) as caught:
    perfect_ap(tmp_path, split)
  assert len(str(caught.value).splitlines()) == 1


def test_b10_categories_of_one_name(tmp_path):
  root = {"id": 0, "name": "fruit", "supercategory": "none"}
  apple = {**APPLE, "supercategory": "fruit"}
  for categories in ([{"id": 0, "name": "apple"}, APPLE], [root, apple]):
    make.coco(tmp_path, "val", [{}], categories)
    assert open_dataset("coco_instances", root=tmp_path, split="val").classes == ("apple",)
  make.coco(tmp_path, "val", [{}, {"category_id": 2}], [APPLE, {"id": 2, "name": "apple"}])
  with pytest.raises(UserError, match="categories 1, 2 have the same name 'apple'"):
    open_dataset("coco_instances", root=tmp_path, split="val")
  make.coco(tmp_path, "val", [{}], [APPLE, APPLE])
  with pytest.raises(UserError, match="lists the category id 1 twice"):
    open_dataset("coco_instances", root=tmp_path, split="val")


def test_b10_annotations_beside_the_pictures(tmp_path):
  make.coco(tmp_path, "valid", [{}])
  beside = tmp_path / "valid/_annotations.coco.json"
  (tmp_path / "annotations/instances_valid.json").rename(beside)
  assert perfect_ap(tmp_path, "valid") == (pytest.approx(1.0), 1)
  with pytest.raises(UserError, match="expected one of valid"):
    open_dataset("coco_instances", root=tmp_path, split="val")


def test_b13_pictures_without_an_object(tmp_path):
  make.coco(tmp_path, "train", [{}], count=5)
  make.coco(tmp_path, "val", [{}], count=5)
  with pytest.warns(DataWarning, match="4 of 5 images have no object and are not trained on"):
    assert len(open_dataset("coco_instances", root=tmp_path, split="train")) == 1
  kept = open_dataset("coco_instances", root=tmp_path, split="train", negatives=True)
  assert len(kept) == 5 and not len(kept[3]["labels"])
  assert perfect_ap(tmp_path) == (pytest.approx(1.0), 1)


def _rename(content, image_id):
  content["images"][0]["id"] = content["annotations"][0]["image_id"] = image_id


def change_image(**fields):
  return lambda content: content["images"][0].update(fields)


@pytest.mark.parametrize(
  ("trial", "change", "outcome"),
  [
    ("B11 null sizes", change_image(height=None, width=None), None),
    ("B11 texts", change_image(height="20", width="24"), None),
    ("B11 no sizes", lambda c: [c["images"][0].pop(k) for k in ("height", "width")], None),
    ("B11 text ids", lambda c: _rename(c, "b2"), None),
    ("B11 a text id", change_image(id="1"), None),
    ("B11 mixed ids", lambda c: c["images"].append({**c["images"][0], "id": "b2"}), None),
    ("one id twice", lambda c: c["images"].append(c["images"][0]), "gives the id 1 to two images"),
    ("an id", change_image(id=None), "id None; expected a number or text"),
    ("a name", change_image(file_name=3), "file_name 3; expected the name"),
    ("B15 backslashes", change_image(file_name="val\\0.jpg"), None),
    ("B15 the folder", change_image(file_name="val/0.jpg"), None),
    ("B15 an address", change_image(file_name="/data/local-files/?d=val/0.jpg"), None),
    ("B15 an address", change_image(file_name="http://host/upload/1/0.jpg"), None),
    ("B15 upwards", change_image(file_name="../val/0.jpg"), None),
    ("B15 missing", change_image(file_name="O.jpg"), r"path below .*val\. .*0\.jpg is there"),
    ("no categories", lambda c: c.update(categories=[]), "has no categories"),
    ("no fields", lambda c: c["annotations"][0].pop("image_id"), "COCO instances format"),
  ],
)
def test_b11_b15_lists_of_images(tmp_path, trial, change, outcome):
  make.coco(tmp_path, "val", [{}])
  make.edit_json(tmp_path / "annotations/instances_val.json", change)
  if outcome is None:
    assert perfect_ap(tmp_path) == (pytest.approx(1.0), 1)
  else:
    with pytest.raises(UserError, match=outcome):
      perfect_ap(tmp_path)


def test_b17_encodings(tmp_path):
  make.coco(tmp_path, "val", [{}], [{"id": 1, "name": "Äpfel"}])
  path = tmp_path / "annotations/instances_val.json"
  text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
  path.write_bytes(text.encode("utf-8-sig"))
  assert perfect_ap(tmp_path) == (pytest.approx(1.0), 1)
  for encoding, message in (("utf-16", "UTF-16"), ("utf-32-le", "UTF-16"), ("cp1252", "UTF-8")):
    path.write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=message):
      perfect_ap(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"images": 1}', "[" * 9999, '{"images": [{"id": '])
def test_what_is_no_json(tmp_path, content):
  make.coco(tmp_path, "val", [{}])
  (tmp_path / "annotations/instances_val.json").write_text(content)
  with pytest.raises(UserError):
    perfect_ap(tmp_path)


def test_b14_memory_does_not_grow_with_objects(tmp_path):
  """20 objects on 12 megapixels, each half of the picture: 240 MB as binary masks."""
  whole = {"segmentation": [[2, 2, 3000, 2, 3000, 2000, 2, 2000]]}
  make.coco(tmp_path, "train", [{"id": n + 1, **whole} for n in range(20)], size=(3024, 4032))
  data = open_dataset("coco_instances", root=tmp_path, split="train")
  steps = pipelines.train_transforms(
    "universal", kind="lsj", crop=(128, 128), max_segments=100, layers=4, scale=(0.9, 1.1)
  )
  tracemalloc.start()
  example, rng = data[0], np.random.default_rng(0)
  assert len(example["labels"]) == 20
  for step in steps:
    example = step(example, rng)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 150e6, f"{peak / 1e6:.0f} MB"
  assert example["segments"].shape == (4, 128, 128) and (example["labels"] >= 0).sum() == 4
  assert example["dropped_segments"] == 16


def test_masks_as_run_lengths_are_the_same_masks(tmp_path, monkeypatch):
  from effseg_jax.input_pipeline.datasets import coco_instances

  rng = np.random.default_rng(0)
  corners = [rng.integers(0, 14, 2) for _ in range(6)]
  squares = [
    {"segmentation": [[x, y, x + 9, y, x + 9, y + 7, x, y + 7]]}
    for x, y in np.array(corners).tolist()
  ]
  make.coco(tmp_path, "train", squares)
  data = open_dataset("coco_instances", root=tmp_path, split="train")
  steps = pipelines.train_transforms(
    "universal", kind="lsj", crop=(32, 32), max_segments=8, layers=8, scale=(0.5, 2.0)
  )

  def sets(seed):
    """Label and mask of each target of an augmented example."""
    example, rng = data[0], np.random.default_rng(seed)
    for step in steps:
      example = step(example, rng)
    rows = range(int((example["labels"] >= 0).sum()))
    masks = [(example["segments"] == row).any(0) for row in rows]
    return example["image"], sorted(mask.tobytes() for mask in masks)

  arrays = [sets(seed) for seed in range(8)]
  truth = data.ground_truth(0)
  monkeypatch.setattr(coco_instances, "_MOST_PIXELS", 0)
  for seed, (image, masks) in enumerate(arrays):
    found_image, found = sets(seed)
    np.testing.assert_array_equal(found_image, image)
    assert found == masks
  runs = data.ground_truth(0)
  np.testing.assert_array_equal(np.asarray(runs.segments), truth.segments)
  np.testing.assert_array_equal(runs.flat_map(), truth.flat_map())
  np.testing.assert_array_equal(np.asarray(data[0]["segments"] < 255), truth.segments >= 0)
  assert runs.overlaps() and truth.overlaps()


# Panoptic PNGs and jsons.

IDS = np.kron(np.array([[1, 2], [2, 0]]), np.ones((4, 4), int)).astype(np.int32)
INFO = [{"id": 1, "category_id": 1, "area": 16}, {"id": 2, "category_id": 1, "area": 32}]


def opened_panoptic(root):
  return open_dataset("coco_panoptic", root=root, split="val")


@pytest.mark.parametrize("area", [31.9, 64, "32", None, -1, 1e20])
def test_b12_areas_are_counted(tmp_path, area):
  make.panoptic(tmp_path, IDS, [INFO[0], {**INFO[1], "area": area}])
  data = opened_panoptic(tmp_path)
  assert data.ground_truth(0).areas.tolist() == [16, 32]
  assert data[0]["labels"].tolist() == [0, 0]


@pytest.mark.parametrize(
  ("trial", "png", "message"),
  [
    ("grey", lambda path, ids: Image.fromarray(ids.astype(np.uint8)).save(path), "has 1 channel"),
    ("16 bits", lambda path, ids: Image.fromarray(ids.astype(np.uint16)).save(path), "1 channel"),
    ("BGR", lambda path, ids: cv2.imwrite(str(path), make.as_rgb(ids)), "as BGR"),
    ("sound", None, None),
    ("palette", lambda path, ids: Image.fromarray(make.as_rgb(ids)).quantize(8).save(path), None),
    ("alpha", lambda path, ids: Image.fromarray(make.as_rgb(ids)).convert("RGBA").save(path), None),
  ],
)
def test_b16_png_of_segment_ids(tmp_path, trial, png, message):
  data = opened_panoptic(make.panoptic(tmp_path, IDS, INFO, png=png))
  if message is None:
    assert data.ground_truth(0).areas.tolist() == [16, 32]
  else:
    with pytest.raises(UserError, match=message):
      data[0]


def test_b13_an_empty_panoptic_annotation(tmp_path):
  data = opened_panoptic(make.panoptic(tmp_path, np.zeros((4, 4), np.int32), []))
  assert not len(data[0]["labels"]) and (data[0]["segments"] == 255).all()


@pytest.mark.parametrize(
  ("isthing", "thing"), [("0", False), ("1", True), (0, False), (True, True), (None, False)]
)
def test_b11_things(tmp_path, isthing, thing):
  categories = [{"id": "1", "name": "x", "isthing": isthing}]
  data = opened_panoptic(make.panoptic(tmp_path, IDS, INFO, categories))
  assert data.thing_mask.tolist() == [thing]


@pytest.mark.parametrize(
  ("trial", "segments", "message"),
  [
    ("id twice", [INFO[0], INFO[0]], "segment id 1 twice"),
    ("id 0", [{**INFO[0], "id": 0}], "segment id 0;"),
    ("a text", [{**INFO[0], "id": "a"}], "segment id 'a'"),
    ("no list", {"id": 1}, "expected a list"),
    ("category", [{**INFO[0], "category_id": None}], "category_id None"),
    ("unknown", [{**INFO[0], "category_id": 4}], "category id 4"),
  ],
)
def test_segments_that_make_no_sense(tmp_path, trial, segments, message):
  with pytest.raises(UserError, match=message):
    opened_panoptic(make.panoptic(tmp_path, IDS, segments))
