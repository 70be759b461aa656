"""Data sets of segments: official layouts, crowds and void, and what a user reads of a mistake."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets import (
  ade20k_panoptic,
  cityscapes,
  cityscapes_panoptic,
  coco_instances,
  coco_json,
  coco_panoptic,
  open_dataset,
  panoptic,
)
from effseg_jax.input_pipeline.loader import Tolerant

SIZE = (6, 8)
# Stuff has the smaller id, so that "things first" shows.
CATEGORIES = [
  {"id": 5, "name": "grass", "isthing": 0},
  {"id": 9, "name": "dog", "isthing": 1},
  {"id": 7, "name": "cat", "isthing": 1},
]
DOG, CAT, GRASS = 70_000, 300, 9  # segment ids; the first fills three bytes, the second two


def write_image(path, size=SIZE, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(path)


def write_ids(path, ids):
  """A panoptic PNG."""
  path.parent.mkdir(parents=True, exist_ok=True)
  colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1)
  Image.fromarray(colours.astype(np.uint8)).save(path)


def segment_ids():
  """Grass with two animals, and two void columns."""
  ids = np.full(SIZE, GRASS)
  ids[:2, :4], ids[3:, :3], ids[:, 6:] = DOG, CAT, 0
  return ids


def segments_info(ids=None, crowd=()):
  ids = segment_ids() if ids is None else ids
  categories = {DOG: 9, CAT: 7, GRASS: 5}
  return [
    {
      "id": value,
      "category_id": categories[value],
      "area": int((ids == value).sum()),
      "iscrowd": int(value in crowd),
    }
    for value in categories
  ]


def write_json(path, infos, suffix="jpg", **more):
  """A panoptic json with an image for each list of segments."""
  names = [f"{number:06d}" for number in range(1, len(infos) + 1)]
  content = {
    "info": {"about": ["nothing", {"really": 1}]},
    "images": [
      {"id": number, "file_name": f"{name}.{suffix}", "height": SIZE[0], "width": SIZE[1]}
      for number, name in enumerate(names, 1)
    ],
    "annotations": [
      {"image_id": number, "file_name": f"{name}.png", "segments_info": info}
      for number, (name, info) in enumerate(zip(names, infos, strict=True), 1)
    ],
    "categories": CATEGORIES,
    **more,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def write_coco(root, infos=None, split="val2017", pngs="annotations/panoptic_val2017"):
  """A COCO panoptic tree with two images; returns its root."""
  infos = [segments_info(), segments_info(crowd=(CAT,))] if infos is None else infos
  write_json(root / f"annotations/panoptic_{split}.json", infos)
  for number in range(1, len(infos) + 1):
    write_image(root / split / f"{number:06d}.jpg", seed=number)
    write_ids(root / pngs / f"{number:06d}.png", segment_ids())
  return root


def opened(root, split="val2017", name="coco_panoptic", **options):
  return open_dataset(name, root=root, split=split, **options)


def check_example(dataset, index=0):
  """What holds for every data set of segments; returns example and ground truth."""
  example, truth = dataset[index], dataset.ground_truth(index)
  size = example["image"].shape[:2]
  assert example["image"].dtype == np.uint8 and dataset.image_size(index) == size
  assert tuple(example["valid_size"]) == size and example["valid_size"].dtype == np.int32
  assert example["segments"].dtype == np.uint8 and example["segments"].shape[1:] == size
  assert example["labels"].dtype == np.int32 and example["labels"].ndim == 1
  present = set(np.unique(example["segments"])) - {panoptic.NO_SEGMENT}
  assert present <= set(range(len(example["labels"])))
  assert truth.segments.dtype == np.int16 and truth.segments.shape[1:] == size
  assert len(truth.labels) == len(truth.crowd) == len(truth.areas)
  assert (truth.labels < dataset.num_classes).all() and example["name"] == truth.name
  np.testing.assert_array_equal(example["labels"], truth.labels[~truth.crowd])
  assert dataset.thing_mask.shape == dataset.class_ids.shape == (dataset.num_classes,)
  assert dataset.palette.shape == (dataset.num_classes, 3) and dataset.palette.dtype == np.uint8
  return example, truth


# COCO panoptic.


@pytest.mark.parametrize("pngs", ["annotations/panoptic_val2017", "panoptic_val2017"])
def test_things_come_first_and_void_is_no_segment(tmp_path, pngs):
  dataset = opened(write_coco(tmp_path, pngs=pngs))
  assert len(dataset) == 2 and dataset.classes == ("cat", "dog", "grass")
  assert dataset.thing_mask.tolist() == [True, True, False]
  assert dataset.class_ids.tolist() == [7, 9, 5]
  example, truth = check_example(dataset)
  ids, (segments,) = segment_ids(), example["segments"]
  assert example["labels"].tolist() == [1, 0, 2]  # dog, cat, grass, as in the json
  for place, value in enumerate((DOG, CAT, GRASS)):
    np.testing.assert_array_equal(segments == place, ids == value)
  assert (segments[:, 6:] == panoptic.NO_SEGMENT).all()
  assert truth.image_id == 1 and truth.name == "000001"
  semantic = truth.semantic_map()
  assert semantic[0, 0] == 1 and semantic[2, 0] == 2 and (semantic[:, 6:] == 255).all()
  assert truth.masks().sum(axis=(1, 2)).tolist() == truth.areas.tolist() == [8, 9, 19]


def test_a_crowd_is_in_the_truth_and_not_in_the_example(tmp_path):
  example, truth = check_example(opened(write_coco(tmp_path)), 1)
  assert truth.crowd.tolist() == [False, True, False] and truth.labels.tolist() == [1, 0, 2]
  assert example["labels"].tolist() == [1, 2]
  cat = segment_ids() == CAT
  assert (example["segments"][0][cat] == panoptic.NO_SEGMENT).all()
  assert (truth.segments[0][cat] == 1).all() and (truth.semantic_map()[cat] == 0).all()


def test_own_data_in_the_same_layout(tmp_path):
  root = write_coco(tmp_path, split="garden", pngs="panoptic_garden")
  assert len(opened(root, "garden")) == 2
  with pytest.raises(UserError, match="no split 'val2017'; expected one of garden"):
    opened(root)


def test_records_stay_small_in_a_worker(tmp_path):
  dataset = opened(write_coco(tmp_path))
  copied = pickle.loads(pickle.dumps(dataset))
  np.testing.assert_array_equal(copied[1]["segments"], dataset[1]["segments"])
  arrays = [value for value in vars(dataset).values() if isinstance(value, np.ndarray)]
  assert len(arrays) == 9 and all(array.dtype != object for array in arrays)


def test_official_annotations_are_found(tmp_path):
  root = write_coco(tmp_path)
  assert opened(root).instances_json is None
  (root / "annotations/instances_val2017.json").write_text("{}")
  assert opened(root).instances_json == root / "annotations/instances_val2017.json"


def test_the_largest_segments_are_kept_where_there_are_too_many():
  count = panoptic.NO_SEGMENT + 20
  segments = np.repeat(np.arange(count, dtype=np.int16), 2)  # two pixels each
  segments = np.concatenate([segments, np.arange(20, count, dtype=np.int16)])[None, None]
  areas = panoptic.segment_areas(segments, count)
  assert areas.tolist() == [2] * 20 + [3] * 255
  truth = panoptic.GroundTruth(
    segments, np.arange(count, dtype=np.int32), np.zeros(count, bool), areas, 0, "many"
  )
  example = panoptic.make_example(np.zeros((*segments.shape[1:], 3), np.uint8), truth)
  assert example["labels"].tolist() == list(range(20, count))
  assert example["dropped_segments"] == 20
  assert (example["segments"][0, 0, :40] == panoptic.NO_SEGMENT).all()
  assert example["segments"][0, 0, -1] == 254


def test_the_real_sample(shared):
  for split, count in (("train2017", 100), ("val2017", 50)):
    dataset = opened(shared / "data/coco_panoptic_sample", split)
    assert len(dataset) == count and dataset.table.names == coco_panoptic.CLASSES
    assert dataset.class_ids.tolist() == coco_panoptic.CLASS_TABLE.ids.tolist()
    assert dataset.thing_mask.sum() == 80 and dataset.thing_mask[:80].all()
    for index in range(0, count, 7):
      check_example(dataset, index)


def test_the_first_images_only(tmp_path):
  write_coco(tmp_path)
  everything, one = opened(tmp_path), opened(tmp_path, first=1)
  assert (len(everything), len(one), len(opened(tmp_path, first=9))) == (2, 1, 2)
  np.testing.assert_array_equal(one[0]["image"], everything[0]["image"])


# Mistakes in panoptic files.


def changed(info, segment, **fields):
  return [{**entry, **fields} if entry["id"] == segment else entry for entry in info]


@pytest.mark.parametrize(
  ("info", "message"),
  [
    (
      segments_info()[:2],
      r"000001\.png holds the segment id 9, which panoptic_val2017\.json does not list",
    ),
    ([], r"000001\.png holds the segment id"),
  ],
)
def test_png_and_json_that_disagree(tmp_path, info, message):
  dataset = opened(write_coco(tmp_path, [info, segments_info()]))
  for read in (dataset.__getitem__, dataset.ground_truth):
    with pytest.raises(UserError, match=message):
      read(0)
  tolerant = Tolerant(dataset, "skip")
  with pytest.warns(UserWarning, match="skipped a broken example"):
    assert tolerant[0]["name"] == "000002"


def test_areas_are_counted_and_segments_without_a_pixel_left_out(tmp_path):
  info = changed(changed(segments_info(), CAT, area=9.4), DOG, area="72")
  info.append({"id": 4, "category_id": 5, "iscrowd": 0, "area": 3})
  example, truth = check_example(opened(write_coco(tmp_path, [info])))
  assert truth.areas.tolist() == [8, 9, 19] and len(example["labels"]) == 3


def test_an_area_may_be_left_out(tmp_path):
  info = [{key: entry[key] for key in ("id", "category_id")} for entry in segments_info()]
  _, truth = check_example(opened(write_coco(tmp_path, [info])))
  assert truth.areas.tolist() == [8, 9, 19] and not truth.crowd.any()


def test_a_category_outside_the_table(tmp_path):
  infos = [segments_info(), changed(segments_info(), CAT, category_id=6)]
  with pytest.raises(UserError, match=r"val2017\.json: the category id 6 \(image 2\) is not one"):
    opened(write_coco(tmp_path, infos))


def test_an_image_of_another_size(tmp_path):
  root = write_coco(tmp_path)
  write_image(root / "val2017/000001.jpg", (6, 9))
  with pytest.raises(UserError, match=r"000001 is 6x9 and its annotation is 6x8"):
    opened(root)[0]


def test_missing_files_are_counted(tmp_path):
  root = write_coco(tmp_path)
  (root / "val2017/000002.jpg").unlink()
  with pytest.raises(UserError, match=r"lists 2 files and 1 are missing; .*000002\.jpg"):
    opened(root)
  write_image(root / "val2017/000002.jpg")
  (root / "annotations/panoptic_val2017/000001.png").unlink()
  with pytest.raises(UserError, match=r"1 are missing; .*000001\.png"):
    opened(root)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "is empty"),
    ('{"images": [{', "is no COCO json"),
    ("[1, 2]", "is no COCO json"),
    ('{"images": [], "categories": [{"id": 1, "name": "a"}]}', "is empty; nothing was found"),
    ('{"annotations": [{"image_id": 4}]}', "not in the COCO panoptic format.*file_name"),
    ('{"annotations": [7]}', "not in the COCO panoptic format"),
    ('{"annotations": []}', "has no categories"),
  ],
)
def test_a_broken_json(tmp_path, text, message):
  root = write_coco(tmp_path)
  (root / "annotations/panoptic_val2017.json").write_text(text)
  with pytest.raises(UserError, match=message) as caught:
    opened(root)
  assert "panoptic_val2017.json" in str(caught.value)


def test_annotations_of_unlisted_images(tmp_path):
  root = write_coco(tmp_path)
  write_json(root / "annotations/panoptic_val2017.json", [segments_info()], images=[])
  with pytest.raises(UserError, match=r"1 annotations of images that are not in its list.* id 1"):
    opened(root)


SPLITS = {
  "coco_panoptic": "val2017",
  "coco_instances": "val2017",
  "ade20k_panoptic": "validation",
  "cityscapes_panoptic": "val",
}


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_a_missing_folder_prints_the_tree(tmp_path, name):
  for root in (None, tmp_path / "nowhere", tmp_path):
    with pytest.raises(UserError, match=r"--config\.data\.root=DIR") as caught:
      opened(root, SPLITS[name], name)
    assert str(caught.value).startswith(name) and len(str(caught.value).splitlines()) > 2


# Records.


def test_positions_in_a_json_count_bytes(tmp_path):
  values = [{"name": "Straße"}, {"name": "日本"}, [1, {"x": "é"}], 5, "a"]
  path = tmp_path / "a.json"
  path.write_text(
    json.dumps({"ü": values, "n": {"é": []}, "b": [], "c": ["ñ"]}, ensure_ascii=False, indent=1),
    encoding="utf-8",
  )
  found = list(coco_json.records(path))
  assert [record.value for record in found] == [*values, "ñ"]
  assert [record.part for record in found] == ["ü"] * 5 + ["c"]
  content = path.read_bytes()
  for record in found:
    text = content[record.begin : record.begin + record.size]
    assert json.loads(text.decode()) == record.value


# COCO instances.


def square(left, top, side):
  return [left, top, left + side, top, left + side, top + side, left, top + side]


def write_instances(root, split="val2017", annotations=None, ids=(1, 2, 3)):
  """Image 1: two overlapping squares and one apart; image 2: a crowd; image 3: nothing."""
  common = {"iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
  if annotations is None:
    annotations = [
      {"id": 1, "image_id": 1, "category_id": 9, "segmentation": [square(0, 0, 3)]} | common,
      {"id": 2, "image_id": 2, "category_id": 7, "iscrowd": 1, "area": 12}
      | {"segmentation": {"size": [6, 8], "counts": [0, 12, 36]}},
      {"id": 3, "image_id": 1, "category_id": 7, "segmentation": [square(2, 2, 4)]} | common,
      {"id": 4, "image_id": 1, "category_id": 9, "segmentation": [square(6, 0, 1), [1, 2]]}
      | common,
    ]
  path = root / f"annotations/instances_{split}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  images = [
    {"id": number, "file_name": f"{number:06d}.jpg", "height": SIZE[0], "width": SIZE[1]}
    for number in ids
  ]
  categories = [{"id": 9, "name": "dog"}, {"id": 7, "name": "Kätzchen"}]
  content = {"images": images, "annotations": annotations, "categories": categories}
  path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
  for number in ids:
    write_image(root / split / f"{number:06d}.jpg")
  return root


def test_overlapping_instances_lie_in_layers(tmp_path):
  dataset = opened(write_instances(tmp_path), name="coco_instances")
  assert len(dataset) == 3 and dataset.classes == ("Kätzchen", "dog")
  assert dataset.thing_mask.all() and dataset.class_ids.tolist() == [7, 9]
  example, truth = check_example(dataset)
  assert truth.areas.tolist() == [16, 9, 1] and truth.labels.tolist() == [0, 1, 1]
  assert example["segments"].shape == (2, *SIZE)
  masks = truth.masks()
  expected = np.zeros((3, *SIZE), bool)
  expected[0, 2:6, 2:6] = expected[1, 0:3, 0:3] = expected[2, 0, 6] = True
  np.testing.assert_array_equal(masks, expected)
  assert (truth.segments[0] >= 0).sum() == 17  # the small one fits beside the largest


def test_crowds_and_images_without_instances(tmp_path):
  dataset = opened(write_instances(tmp_path), name="coco_instances")
  example, truth = check_example(dataset, 1)
  assert truth.crowd.tolist() == [True] and not len(example["labels"])
  assert truth.masks()[0][:, :2].all() and truth.areas.tolist() == [12]
  example, _ = check_example(dataset, 2)
  assert not len(example["labels"]) and (example["segments"] == panoptic.NO_SEGMENT).all()
  train = opened(write_instances(tmp_path, "train2017"), "train2017", "coco_instances")
  assert [train[index]["name"] for index in range(len(train))] == ["000001"]
  assert len(pickle.loads(pickle.dumps(train))[0]["labels"]) == 3


def test_mistakes_in_instances(tmp_path):
  common = {"iscrowd": 0, "image_id": 1, "id": 31}
  polygon = [square(0, 0, 3)]
  wrong = [{**common, "category_id": 8, "segmentation": polygon}]
  with pytest.raises(UserError, match=r"category id 8 \(image 1\) is not one of its 2"):
    opened(write_instances(tmp_path, annotations=wrong), name="coco_instances")
  wrong = [{**common, "category_id": 9, "image_id": 4, "segmentation": polygon}]
  with pytest.raises(UserError, match=r"1 annotations of images that are not in its list.* id 4"):
    opened(write_instances(tmp_path, annotations=wrong), name="coco_instances")
  for segmentation in ({"size": [3, 3], "counts": [0, 9]}, [["a"] * 6], {"counts": [3]}):
    wrong = [{**common, "category_id": 9, "segmentation": segmentation}]
    write_instances(tmp_path, annotations=wrong)
    with pytest.raises(UserError, match=r"annotation 31 of image 1 has a segmentation .* cannot"):
      opened(tmp_path, name="coco_instances")[0]
  write_instances(tmp_path)
  (tmp_path / "val2017/000003.jpg").unlink()
  with pytest.raises(UserError, match=r"1 are missing; .*000003\.jpg"):
    opened(tmp_path, name="coco_instances")
  dataset = opened(write_instances(tmp_path), name="coco_instances")
  dataset.json_path.write_text("x" * 2000)
  with pytest.raises(UserError, match=r"instances_val2017\.json has changed"):
    dataset[0]


# ADE20K.


def write_ade(root, info):
  write_json(root / "ade20k_panoptic_val.json", [info])
  write_image(root / "images/validation/000001.jpg")
  write_ids(root / "ade20k_panoptic_val/000001.png", segment_ids())
  return root


def test_ade20k_keeps_its_order_and_stuff_may_be_covered(tmp_path):
  info = changed(segments_info(), GRASS, area=25)
  hidden = {"id": 4, "category_id": 5, "iscrowd": 0, "area": 6}  # nothing of it is left
  dataset = opened(write_ade(tmp_path, [*info, hidden]), "validation", "ade20k_panoptic")
  assert dataset.classes == ("grass", "cat", "dog")
  _, truth = check_example(dataset)
  assert truth.areas.tolist() == [8, 9, 25, 6] and truth.labels.tolist() == [2, 1, 0, 0]


def test_tables_are_complete():
  for module, classes, things in (
    (coco_panoptic, 133, 80),
    (coco_instances, 80, 80),
    (ade20k_panoptic, 150, 100),
    (cityscapes_panoptic, 19, 8),
  ):
    table = module.CLASS_TABLE
    assert len(set(table.names)) == len(table.ids) == len(set(table.ids)) == classes
    assert table.palette.shape == (classes, 3) and table.things.sum() == things
  assert cityscapes_panoptic.CLASS_TABLE.ids.tolist()[::9] == [7, 22, 33]
  assert coco_panoptic.CLASS_TABLE.ids[[0, 79, 80, 132]].tolist() == [1, 90, 92, 200]


# Cityscapes.


def write_cityscapes(root, ids, split="val", city="ulm"):
  stem = f"{split}/{city}/{city}_000000_000019"
  write_image(root / f"leftImg8bit/{stem}_leftImg8bit.png", ids.shape)
  path = root / f"gtFine/{stem}_gtFine_instanceIds.png"
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(ids.astype(np.uint16)).save(path)
  return root


def cityscapes_ids():
  ids = np.full(SIZE, 7)  # road
  ids[0], ids[1, :3], ids[1, 3:], ids[2, :2], ids[3, :2] = 4, 26001, 26000, 26, 24002
  return ids


def test_cityscapes_reads_instance_ids(tmp_path):
  dataset = opened(write_cityscapes(tmp_path, cityscapes_ids()), "val", "cityscapes_panoptic")
  example, truth = check_example(dataset)
  assert [dataset.classes[k] for k in truth.labels] == ["road", "car", "person", "car", "car"]
  assert truth.crowd.tolist() == [False, True, False, False, False]  # the group of cars
  assert [dataset.classes[k] for k in example["labels"]] == ["road", "person", "car", "car"]
  assert (truth.segments[0, 0] == -1).all()  # id 4 is not evaluated
  assert truth.image_id == "ulm_000000_000019"


def test_cityscapes_reads_what_its_scripts_prepare(tmp_path):
  ids = cityscapes_ids()
  direct = opened(write_cityscapes(tmp_path, ids), "val", "cityscapes_panoptic")
  expected = check_example(direct)
  stem = "ulm_000000_000019"
  segments = [
    {
      "id": value,
      "category_id": value if value < 1000 else value // 1000,
      "area": int((ids == value).sum()),
      "iscrowd": int(value == 26),
    }
    for value in (7, 26, 24002, 26000, 26001)
  ]
  name = f"{stem}_gtFine_panoptic.png"
  content = {
    "images": [{"id": stem, "file_name": "ignored.png", "height": SIZE[0], "width": SIZE[1]}],
    "annotations": [{"image_id": stem, "file_name": name, "segments_info": segments}],
    "categories": [
      {"id": int(stored), "name": label, "isthing": int(thing)}
      for stored, label, thing in zip(
        direct.class_ids, direct.classes, direct.thing_mask, strict=True
      )
    ],
  }
  (tmp_path / "gtFine/cityscapes_panoptic_val.json").write_text(json.dumps(content))
  write_ids(tmp_path / "gtFine/cityscapes_panoptic_val" / name, np.where(ids == 4, 0, ids))
  assert isinstance(
    opened(tmp_path, "val", "cityscapes_panoptic"), cityscapes_panoptic.CityscapesInstances
  )
  (tmp_path / f"gtFine/val/ulm/{stem}_gtFine_instanceIds.png").unlink()
  dataset = opened(tmp_path, "val", "cityscapes_panoptic")
  assert isinstance(dataset, panoptic.PanopticFiles) and dataset.classes == direct.classes
  for found, wanted in zip(check_example(dataset), expected, strict=True):
    found, wanted = (x if isinstance(x, dict) else vars(x) for x in (found, wanted))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
      np.testing.assert_array_equal(found[key], value)


def test_mistakes_in_cityscapes(tmp_path):
  for value in (34, 999, 34001):
    dataset = opened(write_cityscapes(tmp_path, np.full(SIZE, value)), "val", "cityscapes_panoptic")
    with pytest.raises(UserError, match=f"instanceIds.png holds the instance id {value}"):
      dataset[0]
  dataset = opened(write_cityscapes(tmp_path, np.full(SIZE, 4)), "val", "cityscapes_panoptic")
  with pytest.raises(UserError, match=r"instanceIds\.png has no segments"):
    dataset[0]
  (tmp_path / "gtFine/val/ulm/ulm_000000_000019_gtFine_instanceIds.png").unlink()
  with pytest.raises(UserError, match="1 of 1 images have no label"):
    opened(tmp_path, "val", "cityscapes_panoptic")


def test_cityscapes_sample_has_the_semantic_labels(shared):
  root = shared / "data/layout_samples/cityscapes"
  for split in ("train", "val"):
    dataset = opened(root, split, "cityscapes_panoptic")
    semantic = cityscapes.open_split(root, split)
    for index in range(len(dataset)):
      _, truth = check_example(dataset, index)
      np.testing.assert_array_equal(truth.semantic_map(), semantic[index]["label"])


# Scenes and class maps.


def test_scenes_with_instances():
  dataset, scenes = (open_dataset(f"synthetic{x}", split="val") for x in ("_instances", ""))
  several = 0
  for index in range(12):
    example, truth = check_example(dataset, index)
    np.testing.assert_array_equal(example["image"], scenes[index]["image"])
    semantic, label = truth.semantic_map(), scenes[index]["label"]
    changed_pixels = semantic != label
    assert (semantic[changed_pixels] == 255).all() and changed_pixels.mean() < 0.01
    assert (truth.areas >= 16).all()
    things = truth.labels[dataset.thing_mask[truth.labels]]
    stuff = truth.labels[~dataset.thing_mask[truth.labels]]
    assert len(set(stuff)) == len(stuff)  # one segment each
    several += len(set(things)) < len(things)
  assert several > 6 and dataset.image_size(0) == (128, 128)
  again = pickle.loads(pickle.dumps(dataset))
  np.testing.assert_array_equal(again[3]["segments"], dataset[3]["segments"])
  with pytest.raises(IndexError):
    dataset[len(dataset)]


def test_class_maps_become_a_segment_per_class():
  scenes = open_dataset("synthetic", split="val", size=(48, 64))
  dataset = panoptic.as_universal(scenes)
  assert panoptic.as_universal(dataset) is dataset and not dataset.thing_mask.any()
  for index in (0, 5):
    example, truth = check_example(dataset, index)
    label = scenes[index]["label"]
    np.testing.assert_array_equal(truth.semantic_map(), label)
    assert example["labels"].tolist() == sorted(set(np.unique(label)) - {255})
    (segments,) = example["segments"]
    assert (segments[label == 255] == panoptic.NO_SEGMENT).all()


def test_classification_has_no_segments(tmp_path):
  for split in ("train", "val"):
    write_image(tmp_path / split / "n01/a.jpg")
  with pytest.raises(UserError, match="imagenet is labelled with a class per image"):
    panoptic.as_universal(open_dataset("imagenet", root=tmp_path, split="val"))
