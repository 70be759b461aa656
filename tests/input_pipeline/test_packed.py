"""Packed data sets: the same examples, whole or not at all."""

from __future__ import annotations

import dataclasses
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import packed, pipelines, records
from effseg_jax.input_pipeline.datasets import open_dataset
from effseg_jax.input_pipeline.loader import train_batches
from effseg_jax.metrics.average_precision import AveragePrecision


def make_folder(root, count=7):
  """Your own images, of several sizes; one JPEG is to be turned upright."""
  root.mkdir(exist_ok=True)
  (root / "classes.txt").write_text("a 10 20 30\nb\nc\n")
  rng = np.random.default_rng(0)
  for kind in ("images", "labels"):
    (root / kind / "train").mkdir(parents=True)
  for index in range(count):
    size = (20 + index, 30)
    image = cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), size[::-1])
    exif = Image.Exif()
    exif[0x0112] = 6 if index == 3 else 1
    shape = size[::-1] if index == 3 else size
    Image.fromarray(image).save(root / "images" / "train" / f"{index}.jpg", exif=exif)
    label = rng.choice(np.array([0, 1, 2, 255], np.uint8), shape)
    Image.fromarray(label).save(root / "labels" / "train" / f"{index}.png")
  return root


def make_classes(root):
  """ImageNet's layout."""
  rng = np.random.default_rng(0)
  for name in ("n01", "n02"):
    (root / "train" / name).mkdir(parents=True)
    for index in range(2):
      picture = Image.fromarray(rng.integers(0, 256, (12, 15, 3), np.uint8))
      picture.save(root / "train" / name / f"{index}.JPEG")
  return root


def assert_same(one, other):
  """Two values of examples or attributes."""
  if isinstance(one, dict):
    assert one.keys() == other.keys()
    for key, value in one.items():
      assert_same(value, other[key])
  elif isinstance(one, np.ndarray | np.generic):
    assert np.asarray(one).dtype == np.asarray(other).dtype
    np.testing.assert_array_equal(one, other)
  else:
    assert type(one) is type(other)
    assert one == other


def assert_same_dataset(original, found, count):
  assert len(found) == len(original)
  for index in range(count):
    assert_same(original[index], found[index])
    if hasattr(original, "image_size"):
      assert original.image_size(index) == found.image_size(index)
    if hasattr(original, "ground_truth"):
      truths = [dataclasses.asdict(dataset.ground_truth(index)) for dataset in (original, found)]
      assert_same(*truths)
      assert_same(original.image(index), found.image(index))
    if hasattr(original, "num_frames"):
      assert original.group(index) == found.group(index)
      assert original.prediction_path(index, 1) == found.prediction_path(index, 1)
  attributes = ("name", "split", "classes", "num_classes", "palette", "ignore_label", "num_frames")
  attributes += ("thing_mask", "class_ids", "prediction_size")
  for attribute in attributes:
    assert hasattr(original, attribute) == hasattr(found, attribute)
    if hasattr(original, attribute):
      assert_same(getattr(original, attribute), getattr(found, attribute))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("folder"))


def open_folder(root):
  return open_dataset("folder", root=root, split="train", ignore=255)


def pack_folder(folder, root, **how):
  settings = {"examples_per_shard": 3, "options": {"ignore": 255}, **how}
  return packed.pack(open_folder(folder), root, name="folder", **settings)


def test_your_own_images(folder, tmp_path):
  entry = pack_folder(folder, tmp_path)
  assert entry["examples"] == 7
  assert [shard["examples"] for shard in entry["shards"]] == [3, 3, 1]
  assert_same_dataset(open_folder(folder), open_folder(tmp_path), 7)
  record = records.Records(tmp_path, "train")[2]
  assert record["image"] == (folder / "images" / "train" / "2.jpg").read_bytes()
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  assert manifest["classes"] == ["a", "b", "c"]
  assert manifest["palette"][0] == [10, 20, 30]


def test_one_class_per_image(tmp_path):
  original = open_dataset("imagenet", root=make_classes(tmp_path / "files"), split="train")
  packed.pack(original, tmp_path / "packed", name="imagenet", options={})
  found = open_dataset("imagenet", root=tmp_path / "packed", split="train")
  assert_same_dataset(original, found, 4)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("synthetic", {"size": (32, 48)}),
    ("synthetic_instances", {"size": (32, 48)}),
    ("synthetic_av", {"size": (32, 32), "num_frames": 2, "semantic": True}),
  ],
)
def test_drawn_data_sets_of_every_kind(tmp_path, name, options):
  original = open_dataset(name, split="val", **options)
  packed.pack(original, tmp_path, name=name, options=options)
  found = open_dataset(name, root=tmp_path, split="val", **options)
  assert_same_dataset(original, found, 5)


@pytest.mark.parametrize(
  ("name", "path", "split"),
  [
    ("coco_panoptic", "coco_panoptic_sample", "val2017"),
    ("cityscapes", "layout_samples/cityscapes", "train"),
    ("coco_stuff_164k", "layout_samples/coco_stuff", "val2017"),
  ],
)
def test_official_layouts(shared, tmp_path, name, path, split):
  original = open_dataset(name, root=shared / "data" / path, split=split)
  packed.pack(original, tmp_path, name=name, options={})
  assert_same_dataset(original, open_dataset(name, root=tmp_path, split=split), 2)


def test_training_batches_are_the_same(folder, tmp_path):
  pack_folder(folder, tmp_path)
  steps = pipelines.train_transforms(
    "semantic",
    scale=(32, 32),
    ratio=(0.5, 2.0),
    crop=(24, 24),
    max_class_share=0.75,
    flip=0.5,
    photometric=True,
  )
  streams = [
    train_batches(open_folder(root), steps, batch_size=4, seed=1) for root in (folder, tmp_path)
  ]
  for _ in range(4):
    assert_same(*(next(stream) for stream in streams))
  for stream in streams:
    stream.close()


def test_what_an_interrupted_call_has_finished_is_not_done_again(folder, tmp_path, monkeypatch):
  read = []
  encode = packed._encode_image

  def count(dataset, index):
    if index == 5 and len(read) < 6:
      raise KeyboardInterrupt
    read.append(index)
    return encode(dataset, index)

  monkeypatch.setattr(packed, "_encode_image", count)
  with pytest.raises(KeyboardInterrupt):
    pack_folder(folder, tmp_path, num_threads=1)
  assert not records.is_packed(tmp_path)
  begun = len(read)
  with pytest.raises(UserError, match="begun with another number of shards"):
    pack_folder(folder, tmp_path, examples_per_shard=2)
  read += [None] * 6  # no interruption any more
  pack_folder(folder, tmp_path)
  assert read[begun + 6 :] == [3, 4, 5, 6]
  assert_same_dataset(open_folder(folder), open_folder(tmp_path), 7)
  assert {path.suffix for path in (tmp_path / "train").iterdir()} == {".array_record", ".npz"}


def test_damage_is_found(folder, tmp_path):
  pack_folder(folder, tmp_path)
  shard = tmp_path / "train" / "00001-of-00003.array_record"
  content = bytearray(shard.read_bytes())
  place = content.find((folder / "images" / "train" / "4.jpg").read_bytes())
  content[place + 100] ^= 255
  shard.write_bytes(content)
  assert dict(records.verify(tmp_path, "train")) == {
    "00000-of-00003.array_record": True,
    "00001-of-00003.array_record": False,
    "00002-of-00003.array_record": True,
  }
  with pytest.raises(UserError, match=r"record 4 in .*train is damaged"):
    open_folder(tmp_path)[4]
  shard.write_bytes(content[:-1])
  with pytest.raises(UserError, match="bytes; expected"):
    open_folder(tmp_path)


def test_broken_examples_stop_or_are_left_out(tmp_path):
  files = make_folder(tmp_path / "files")
  (files / "images" / "train" / "1.jpg").write_bytes(b"nothing")
  with pytest.raises(UserError, match=r"1\.jpg cannot be decoded"):
    pack_folder(files, tmp_path / "packed")
  entry = pack_folder(files, tmp_path / "packed", on_error="skip")
  assert entry["examples"] == 6
  assert "1.jpg cannot be decoded" in entry["skipped"][0]
  assert [open_folder(tmp_path / "packed")[index]["name"] for index in range(2)] == ["0", "2"]


def test_what_was_not_packed_is_explained(folder, tmp_path):
  pack_folder(folder, tmp_path)
  with pytest.raises(UserError, match=r"holds folder, packed; expected camvid"):
    open_dataset("camvid", root=tmp_path, split="train")
  with pytest.raises(UserError, match=r"has no packed split 'val'; it holds train"):
    open_dataset("folder", root=tmp_path, split="val")
  with pytest.raises(UserError, match=r"packed with data\.options\.ignore=255; 0 needs"):
    open_dataset("folder", root=tmp_path, split="train", ignore=0)
  with pytest.raises(UserError, match="packed with another options"):
    pack_folder(folder, tmp_path, options={"ignore": 0})
  (tmp_path / "manifest.json").write_text("{}")
  with pytest.raises(UserError, match="is no manifest"):
    open_folder(tmp_path)


def make_instances(root):
  """Two pictures in COCO's form; the second one is broken."""
  (root / "annotations").mkdir(parents=True)
  (root / "val2017").mkdir()
  square = [[1, 1, 20, 1, 20, 20, 1, 20]]
  annotations = [
    {"id": n, "image_id": n, "category_id": 1, "iscrowd": 0, "area": 7.5, "segmentation": square}
    for n in (1, 2)
  ]
  images = [{"id": n, "file_name": f"{n}.jpg", "height": 40, "width": 50} for n in (1, 2)]
  for image in images:
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(root / "val2017" / image["file_name"])
  (root / "val2017" / "2.jpg").write_bytes(b"nothing")
  text = json.dumps(
    {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": annotations}
  )
  (root / "annotations" / "instances_val2017.json").write_text(text)
  return root


def test_the_official_annotations_stay_beside_the_shards(tmp_path):
  root, target = make_instances(tmp_path / "files"), tmp_path / "packed"
  original = open_dataset("coco_instances", root=root, split="val2017")
  packed.pack(original, target, name="coco_instances", options={}, on_error="skip")
  found = open_dataset("coco_instances", root=target, split="val2017")
  assert found.instances_json.read_bytes() == original.instances_json.read_bytes()
  assert dict(records.verify(target, "val2017"))["instances.json"]
  # The broken picture is in the annotations and not among the examples: it is not counted.
  score = AveragePrecision(found.class_ids, found.thing_mask, found.instances_json)
  truth = found.ground_truth(0)
  score.update(truth.image_id, truth.masks(), truth.labels, np.ones(1))
  assert score.result()[0]["AP"] == pytest.approx(1.0)
  found.instances_json.write_text("{}")
  assert not dict(records.verify(target, "val2017"))["instances.json"]


def test_an_option_left_out_has_its_default(folder, tmp_path):
  packed.pack(open_folder(folder), tmp_path, name="folder", options={})
  assert len(open_folder(tmp_path)) == 7
  with pytest.raises(UserError, match=r"packed with data\.options\.ignore=255; 0 needs"):
    open_dataset("folder", root=tmp_path, split="train", ignore=0)
  other = tmp_path / "other"
  dataset = open_dataset("folder", root=folder, split="train", ignore=0)
  packed.pack(dataset, other, name="folder", options={"ignore": 0})
  with pytest.raises(UserError, match=r"packed with data\.options\.ignore=0; 255 needs"):
    open_dataset("folder", root=other, split="train")


def test_an_interrupted_packing_does_not_go_on_with_other_options(folder, tmp_path):
  def stop(done):
    if done > 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    pack_folder(folder, tmp_path, num_threads=1, on_example=stop)
  with pytest.raises(UserError, match="begun with other options"):
    pack_folder(folder, tmp_path, options={"ignore": 0})
  assert pack_folder(folder, tmp_path)["examples"] == 7
