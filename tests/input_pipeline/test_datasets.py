"""The data sets: official folder trees, label rules, and what a user reads of a mistake."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import (
  DATASETS,
  ade20k,
  cityscapes,
  coco_stuff,
  files,
  open_dataset,
)
from effseg_jax.input_pipeline.datasets.folder import read_classes

SIZE = (6, 8)


def write_image(path, size=SIZE, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(path)


def write_label(path, values, size=SIZE):
  """Fills a label with values, one after the other; returns it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  label = np.resize(np.array(values, np.uint8), size)
  Image.fromarray(label).save(path)
  return label


def write_folder(root, splits=("train", "val"), values=(0, 1, 2, 255)):
  """A data set of own images; returns the root."""
  root.mkdir(exist_ok=True)
  (root / "classes.txt").write_text("background\n\nbig leaf 60 180 75\nfruit\n")
  for split in splits:
    for name in ("a", "b"):
      write_image(root / "images" / split / f"{name}.jpg")
      write_label(root / "labels" / split / f"{name}.png", values)
  return root


def check_example(dataset, index=0):
  """What every example of segmentation has; returns its label."""
  example = dataset[index]
  assert example["image"].dtype == np.uint8 and example["image"].shape[2] == 3
  assert example["label"].dtype == np.uint8 and example["label"].shape == example["image"].shape[:2]
  assert tuple(example["valid_size"]) == example["label"].shape == dataset.image_size(index)
  assert example["valid_size"].dtype == np.int32
  assert dataset.palette.shape == (dataset.num_classes, 3) and dataset.palette.dtype == np.uint8
  values = np.unique(example["label"])
  assert all(value < dataset.num_classes or value == dataset.ignore_label for value in values)
  return example["label"]


# Official folder trees.


def test_ade20k_counts_from_one(tmp_path):
  for split in ("training", "validation"):
    write_image(tmp_path / f"images/{split}/ADE_x_00000001.jpg")
    write_label(tmp_path / f"annotations/{split}/ADE_x_00000001.png", (0, 1, 150))
  dataset = open_dataset("ade20k", root=tmp_path, split="validation")
  assert (len(dataset), dataset.num_classes, dataset[0]["name"]) == (1, 150, "ADE_x_00000001")
  assert list(check_example(dataset).ravel()[:3]) == [255, 0, 149]


def test_ade20k_rejects_a_value_beyond_its_classes(tmp_path):
  write_image(tmp_path / "images/training/a.jpg")
  write_label(tmp_path / "annotations/training/a.png", (151,))
  with pytest.raises(UserError, match=r"a\.png holds the label value 150; expected 0 to 149"):
    open_dataset("ade20k", root=tmp_path, split="training")[0]


def cityscapes_tree(root, kinds=("labelIds", "labelTrainIds")):
  for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "frankfurt")):
    stem = f"{split}/{city}/{city}_000000_000019"
    write_image(root / f"leftImg8bit/{stem}_leftImg8bit.png")
    if "labelIds" in kinds:
      write_label(root / f"gtFine/{stem}_gtFine_labelIds.png", (0, 7, 8, 9, 33, 255))
    if "labelTrainIds" in kinds:
      write_label(root / f"gtFine/{stem}_gtFine_labelTrainIds.png", (255, 0, 1, 255, 18, 255))
  return root


def test_cityscapes_maps_ids(tmp_path):
  cityscapes_tree(tmp_path)
  sizes = [len(open_dataset("cityscapes", root=tmp_path, split=s)) for s in ("train", "trainval")]
  assert sizes == [2, 3]
  expected = [255, 0, 1, 255, 18, 255]
  for labels in ("auto", "ids", "train_ids"):
    dataset = open_dataset("cityscapes", root=tmp_path, split="train", labels=labels)
    assert list(check_example(dataset).ravel()[:6]) == expected


def test_cityscapes_takes_ready_train_ids(tmp_path):
  cityscapes_tree(tmp_path, kinds=("labelTrainIds",))
  label = open_dataset("cityscapes", root=tmp_path, split="val")[0]["label"]
  assert list(label.ravel()[:6]) == [255, 0, 1, 255, 18, 255]
  with pytest.raises(UserError, match=r"1 of 1 images have no label; .*labelIds.png is missing"):
    open_dataset("cityscapes", root=tmp_path, split="val", labels="ids")
  with pytest.raises(UserError, match="expected auto, ids, train_ids"):
    open_dataset("cityscapes", root=tmp_path, split="val", labels="polygons")


def test_coco_stuff_164k_in_both_forms(tmp_path):
  write_image(tmp_path / "raw/images/val2017/1.jpg")
  write_label(tmp_path / "raw/annotations/val2017/1.png", (0, 10, 12, 181, 255))
  dataset = open_dataset("coco_stuff_164k", root=tmp_path / "raw", split="val2017")
  assert list(check_example(dataset).ravel()[:5]) == [0, 10, 11, 170, 255]
  write_image(tmp_path / "ready/images/val2017/1.jpg")
  write_label(tmp_path / "ready/annotations/val2017/1_labelTrainIds.png", (0, 10, 11, 170, 255))
  ready = open_dataset("coco_stuff_164k", root=tmp_path / "ready", split="val2017")
  np.testing.assert_array_equal(ready[0]["label"], dataset[0]["label"])


def test_coco_stuff_10k_in_both_forms(tmp_path):
  write_image(tmp_path / "ready/images/test2014/1.jpg")
  write_label(tmp_path / "ready/annotations/test2014/1_labelTrainIds.png", (0, 1, 171))
  dataset = open_dataset("coco_stuff_10k", root=tmp_path / "ready", split="test2014")
  assert list(check_example(dataset).ravel()[:3]) == [255, 0, 170]

  official = tmp_path / "official"
  write_image(official / "images/1.jpg")
  (official / "annotations").mkdir()
  stored = np.resize(np.array((0, 1, 182), np.uint16), SIZE)
  savemat(official / "annotations/1.mat", {"S": stored, "names": 0})
  (official / "imageLists").mkdir()
  (official / "imageLists/test.txt").write_text("1\n")
  dataset = open_dataset("coco_stuff_10k", root=official, split="test2014")
  assert list(check_example(dataset).ravel()[:3]) == [255, 0, 170]
  (official / "annotations/1.mat").write_bytes(b"no matrix" * 40)
  with pytest.raises(UserError, match=r"1\.mat is no COCO-Stuff annotation"):
    dataset[0]


def test_imagenet_has_one_folder_per_class(tmp_path):
  for name in ("n02", "n01", "n03"):
    write_image(tmp_path / f"train/{name}/{name}_1.JPEG")
  write_image(tmp_path / "val/n03/x.JPEG")
  Image.new("CMYK", (5, 4)).save(tmp_path / "val/n03/y.JPEG", "JPEG")
  dataset = open_dataset("imagenet", root=tmp_path, split="val")
  assert dataset.classes == ("n01", "n02", "n03") and len(dataset) == 2
  example = dataset[0]
  assert example["label"] == 2 and example["label"].dtype == np.int32
  assert np.ndim(example["label"]) == 0
  assert example["image"].shape == (*SIZE, 3) and dataset.image_size(0) == SIZE
  assert dataset[1]["image"].shape == (4, 5, 3)  # some of ImageNet's photographs are CMYK


def test_imagenet_explains_unsorted_pictures(tmp_path):
  write_image(tmp_path / "train/n01/a.JPEG")
  write_image(tmp_path / "val/ILSVRC2012_val_00000001.JPEG")
  with pytest.raises(UserError, match="not in class folders"):
    open_dataset("imagenet", root=tmp_path, split="val")
  write_image(tmp_path / "val/n09/a.JPEG")
  with pytest.raises(UserError, match=r"n09 is a class that .*train does not have"):
    open_dataset("imagenet", root=tmp_path, split="val")


def test_camvid_reads_its_lists(tmp_path):
  write_image(tmp_path / "val/a.png")
  write_label(tmp_path / "valannot/a.png", (0, 10, 11))
  (tmp_path / "val.txt").write_text("val/a.png valannot/a.png\n\n")
  dataset = open_dataset("camvid", root=tmp_path, split="val")
  assert list(check_example(dataset).ravel()[:3]) == [0, 10, 255]
  (tmp_path / "val.txt").write_text("val/a.png\n")
  with pytest.raises(UserError, match=r"val\.txt, line 1"):
    open_dataset("camvid", root=tmp_path, split="val")


def test_camvid_leaves_sequences_out(tmp_path):
  names = ("0001TP_1", "0006R0_1", "0006R0_2", "0016E5_1")
  for name in names:
    write_image(tmp_path / f"train/{name}.png")
    write_label(tmp_path / f"trainannot/{name}.png", (0, 10, 11))
  lines = [f"train/{name}.png trainannot/{name}.png" for name in names]
  (tmp_path / "train.txt").write_text("\n".join(lines))

  def found(split, sequences):
    dataset = open_dataset("camvid", root=tmp_path, split=split, sequences=sequences)
    return [dataset[index]["name"] for index in range(len(dataset))]

  assert len(found("train", "")) == 4
  kept, rest = found("train", "0001TP, 0006R0"), found("rest", "0001TP,0006R0")
  assert [name[-8:] for name in kept] == ["0001TP_1", "0006R0_1", "0006R0_2"]
  assert [name[-8:] for name in rest] == ["0016E5_1"]
  with pytest.raises(UserError, match=r"'0006R1' is not one of 0001TP, 0006R0, 0016E5"):
    found("train", "0006R1")
  with pytest.raises(UserError, match=r"needs data\.options\.sequences"):
    found("rest", "")


# Own images.


def test_folder_reads_classes_and_colours(tmp_path):
  dataset = open_dataset("folder", root=write_folder(tmp_path), split="train")
  assert dataset.classes == ("background", "big leaf", "fruit")
  assert tuple(dataset.palette[1]) == (60, 180, 75)
  assert list(check_example(dataset).ravel()[:4]) == [0, 1, 2, 255]


def test_folder_ignores_a_value_and_reads_subfolders(tmp_path):
  root = write_folder(tmp_path, values=(0, 1, 200))
  write_image(root / "images/val/more/c.png")
  write_label(root / "labels/val/more/c.png", (2, 200))
  dataset = open_dataset("folder", root=root, split="val", ignore=200)
  assert len(dataset) == 3
  assert list(check_example(dataset, 2).ravel()[:2]) == [2, 255]


def test_folder_reads_one_bit_and_palette_labels(tmp_path):
  root = write_folder(tmp_path)
  Image.fromarray(np.eye(6, 8, dtype=bool)).save(root / "labels/train/a.png")
  indexed = Image.fromarray(np.full(SIZE, 2, np.uint8), "L").convert("P")
  indexed.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0])
  indexed.save(root / "labels/train/b.png")
  dataset = open_dataset("folder", root=root, split="train")
  np.testing.assert_array_equal(check_example(dataset, 0), np.eye(6, 8))
  assert (check_example(dataset, 1) == 2).all()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "lists no class"),
    ("a\nb\na\n", "line 3: the class 'a' is listed twice"),
    ("a 0 0 256\n", "goes beyond 255"),
    ("\n".join(map(str, range(256))), "256 classes"),
  ],
)
def test_a_broken_class_list_says_where(tmp_path, text, message):
  (tmp_path / "classes.txt").write_text(text)
  with pytest.raises(UserError, match=message):
    read_classes(tmp_path / "classes.txt")


# What a user reads when something is off.

SPLITS = {
  "folder": "train",
  "camvid": "train",
  "ade20k": "training",
  "cityscapes": "train",
  "coco_stuff_10k": "train2014",
  "coco_stuff_164k": "train2017",
  "imagenet": "train",
}


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_a_missing_folder_prints_the_tree(tmp_path, name):
  for root in (None, tmp_path / "nowhere", tmp_path):
    with pytest.raises(UserError, match=r"--config\.data\.root=DIR") as caught:
      open_dataset(name, root=root, split=SPLITS[name])
    assert str(caught.value).startswith(name) and len(str(caught.value).splitlines()) > 2


# The splits of these are known only from their folders.
@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("folder", "tfds")])
def test_an_unknown_split_lists_the_known_ones(tmp_path, name):
  with pytest.raises(UserError, match="has no split 'dev'; expected one of"):
    open_dataset(name, root=tmp_path, split="dev")


def test_folder_lists_its_splits(tmp_path):
  with pytest.raises(UserError, match="no split 'dev'; expected one of train, val"):
    open_dataset("folder", root=write_folder(tmp_path), split="dev")


@pytest.mark.parametrize(
  ("name", "folder"),
  [
    ("ade20k", "images/training"),
    ("cityscapes", "leftImg8bit/train"),
    ("coco_stuff_10k", "images/train2014"),
    ("coco_stuff_164k", "images/train2017"),
    ("imagenet", "train/n01"),
  ],
)
def test_an_empty_split_says_so(tmp_path, name, folder):
  (tmp_path / folder).mkdir(parents=True)
  with pytest.raises(UserError, match="is empty; nothing was found in"):
    open_dataset(name, root=tmp_path, split=SPLITS[name])


def test_names_and_options_are_suggested():
  with pytest.raises(UserError, match="Did you mean 'cityscapes'"):
    open_dataset("cityscape", split="train")
  with pytest.raises(UserError, match=r"data\.options\.sizes means nothing.* Did you mean 'size'"):
    open_dataset("synthetic", split="train", sizes=(64, 64))


def test_images_without_a_label_are_counted(tmp_path):
  root = write_folder(tmp_path)
  (root / "labels/train/b.png").unlink()
  with pytest.raises(UserError, match=r"1 of 2 images have no label; .*b\.jpg.*b\.png is missing"):
    open_dataset("folder", root=root, split="train")


def test_broken_files_are_named(tmp_path):
  root = write_folder(tmp_path)
  dataset = open_dataset("folder", root=root, split="train")
  image, label = dataset.pairs[0]

  write_label(label, (0,), size=(6, 9))
  with pytest.raises(UserError, match=r"a\.png is 6x9 and its image .*a\.jpg is 6x8"):
    dataset[0]
  write_label(label, (0, 7))
  with pytest.raises(UserError, match=r"a\.png holds the label value 7; expected 0 to 2, or 255"):
    dataset[0]
  Image.fromarray(np.full(SIZE, 700, np.uint16)).save(label)
  with pytest.raises(UserError, match=r"a\.png holds the label value 700"):
    dataset[0]
  write_image(label)
  with pytest.raises(UserError, match=r"a\.png has 3 channels"):
    dataset[0]
  write_label(label, (0,))
  label.write_bytes(label.read_bytes()[:40])
  with pytest.raises(UserError, match=r"a\.png cannot be decoded"):
    dataset[0]

  image.write_bytes(b"\xff\xd8 no picture")
  for read in (codecs.read_image, codecs.image_size):
    with pytest.raises(UserError, match=r"a\.jpg"):
      read(image)
  image.write_bytes(b"")
  with pytest.raises(UserError, match=r"a\.jpg is empty"):
    codecs.read_image(image)
  image.unlink()
  with pytest.raises(UserError, match=r"a\.jpg is missing"):
    dataset[0]


# Tables.


def test_tables_are_complete():
  for module, count in ((ade20k, 150), (cityscapes, 19), (coco_stuff, 171)):
    assert len(module.CLASSES) == len(module.PALETTE) == count
  assert len(set(cityscapes.CLASSES)) == 19 and len(set(coco_stuff.CLASSES)) == 171
  assert len(np.unique(coco_stuff.PALETTE, axis=0)) == 171
  every = np.arange(256, dtype=np.uint8)
  for rule, count in ((cityscapes.ids_to_classes, 19), (coco_stuff.ids_to_classes, 171)):
    mapped = rule(every)
    assert sorted(set(mapped[: 182 if count == 171 else 34]) - {255}) == list(range(count))
  assert ade20k.zero_to_ignored(every)[[0, 1, 150, 255]].tolist() == [255, 0, 149, 255]


def test_generated_colours_never_change():
  palette = files.distinct_palette(60)
  np.testing.assert_array_equal(palette[:30], files.distinct_palette(30))
  assert len(np.unique(palette, axis=0)) == 60


# Synthetic scenes.


def test_a_scene_is_a_function_of_its_number():
  train, again = (open_dataset("synthetic", split="train", size=(48, 64)) for _ in range(2))
  _ = again[3]
  np.testing.assert_array_equal(train[7]["image"], again[7]["image"])
  np.testing.assert_array_equal(train[7]["label"], pickle.loads(pickle.dumps(again))[7]["label"])
  others = [
    train[8],
    open_dataset("synthetic", split="val", size=(48, 64))[7],
    open_dataset("synthetic", split="train", size=(48, 64), seed=1)[7],
  ]
  assert all(not np.array_equal(train[7]["image"], other["image"]) for other in others)


def test_scenes_show_every_class():
  dataset = open_dataset("synthetic", split="val")
  labels = [check_example(dataset, index) for index in range(40)]
  counts = np.bincount(np.concatenate(labels, axis=None), minlength=256)
  assert (counts[: dataset.num_classes] > 0.02 * counts.sum()).all()
  assert 0.01 < counts[dataset.ignore_label] / counts.sum() < 0.06
  assert counts.max() / counts[:255].sum() < 0.4
  with pytest.raises(IndexError):
    dataset[len(dataset)]


@pytest.mark.parametrize("size", [(16, 128), (64,), (64, 64, 3)])
def test_scenes_of_an_impossible_size_are_refused(size):
  with pytest.raises(UserError, match=r"data\.options\.size is"):
    open_dataset("synthetic", split="val", size=size)


def test_scenes_can_be_narrow():
  for size in ((32, 200), (200, 32)):
    dataset = open_dataset("synthetic", split="train", size=size)
    assert all(check_example(dataset, index).shape == size for index in range(10))


# The sheet of examples.

ROOT = Path(__file__).resolve().parents[2]


def browse(*options):
  command = [sys.executable, "-m", "effseg_jax", "browse", *options]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_sheet_shows_examples(tmp_path):
  sheet = tmp_path / "new" / "sheet.png"
  done = browse("--config=configs/afformer/synthetic.py", f"--output={sheet}", "--count=3")
  assert done.returncode == 0, done.stderr
  assert "3 of 2,048 examples of synthetic, split train" in done.stdout
  with Image.open(sheet) as picture:
    assert np.asarray(picture).std() > 20


def test_a_sheet_shows_classes(tmp_path):
  for name in ("cat", "dog"):
    write_image(tmp_path / f"train/{name}/1.jpg")
  sheet = tmp_path / "sheet.png"
  done = browse(
    "--config=configs/afformer/imagenet.py", f"--config.data.root={tmp_path}", f"--output={sheet}"
  )
  assert "2 of 2 examples of imagenet" in done.stdout, done.stderr
  assert sheet.is_file()


def test_a_sheet_of_nothing_is_one_error():
  done = browse("--config=configs/afformer/ade20k.py", "--config.data.root=nowhere")
  assert done.returncode == 2
  assert done.stderr.startswith("error: ade20k: nowhere does not exist. Expected")


# Real files.


@pytest.mark.parametrize(
  ("name", "folder", "split", "count", "expected"),
  [
    ("ade20k", "ade20k/ADEChallengeData2016", "training", 1, "sky"),
    ("ade20k", "ade20k/ADEChallengeData2016", "validation", 2, "road"),
    ("cityscapes", "cityscapes", "train", 2, "road"),
    ("cityscapes", "cityscapes", "val", 1, "building"),
    ("coco_stuff_164k", "coco_stuff", "train2017", 13, "person"),
    ("coco_stuff_164k", "coco_stuff", "val2017", 8, "snow"),
  ],
)
def test_official_samples(shared, name, folder, split, count, expected):
  root = shared / "data" / "layout_samples" / folder
  if not root.is_dir():
    pytest.skip("needs the samples of official layouts")
  dataset = open_dataset(name, root=root, split=split)
  assert len(dataset) == count
  labels = [check_example(dataset, index) for index in range(min(count, 8))]
  counts = np.bincount(np.concatenate(labels, axis=None), minlength=256)[: dataset.num_classes]
  assert expected in [dataset.classes[index] for index in np.argsort(-counts)[:6]]


def test_official_tables_agree(shared):
  samples = shared / "data" / "layout_samples"
  if not samples.is_dir():
    pytest.skip("needs the samples of official layouts")
  root = samples / "cityscapes"
  ours = open_dataset("cityscapes", root=root, split="train", labels="ids")
  ready = open_dataset("cityscapes", root=root, split="train", labels="train_ids")
  for index in range(len(ours)):
    np.testing.assert_array_equal(ours[index]["label"], ready[index]["label"])

  names = [line.split(": ")[1] for line in (samples / "coco_stuff/labels.txt").open()]
  names = [name.strip() for name in names][1:]  # the first is `unlabeled`
  mapped = coco_stuff.ids_to_classes(np.arange(182, dtype=np.uint8))
  for stored, index in enumerate(mapped):
    assert index == 255 or coco_stuff.CLASSES[index] == names[stored]


def test_the_pipeline_imports_no_jax():
  names = "effseg_jax.input_pipeline.datasets, input_pipeline.transforms_classification, sys"
  code = f"import {names}; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_function_of_your_own_opens_a_data_set():
  name = "effseg_jax.input_pipeline.datasets.synthetic:open_split"
  assert open_dataset(name, split="val", size=(32, 48)).image_size(0) == (32, 48)
  for wrong in ("no_module_of_mine:open_split", "effseg_jax.errors:open_split", ":f"):
    with pytest.raises(UserError, match="expected module:function"):
      open_dataset(wrong, split="val")
