"""What a look at the data finds before a training begins."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from command import call
from PIL import Image

from effseg_jax import errors
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import inspection
from effseg_jax.input_pipeline.datasets import open_dataset
from effseg_jax.tasks.semantic import SemanticTask
from tests.trials import make


@pytest.fixture(autouse=True)
def every_warning(monkeypatch):
  monkeypatch.setattr(errors, "_warned", set())


def judged(root, name="folder", splits=("train", "val"), task="semantic", **options):
  reports = [
    inspection.look(open_dataset(name, root=root, split=split, **options)) for split in splits
  ]
  return *inspection.judge(reports, task, training=splits[0]), inspection.page(reports)


def test_a_sound_data_set(tmp_path):
  problems, odd, page = judged(make.folder(tmp_path))
  assert not problems and not odd
  assert "train: 2 examples, 64x96 to 64x96 pixels; 2 labels looked at" in page
  assert page.splitlines()[-1].split() == ["leaf", "50.00", "%", "2", "50.00", "%", "2"]


@pytest.mark.parametrize(
  ("trial", "change", "message"),
  [
    ("A1 0 and 255", lambda a: a * 255, "'leaf' occurs in no label, and 50 % .*labels=binary"),
    ("all 255", lambda a: a * 0 + 255, "no label has a class; 100 %"),
    ("only 0", lambda a: a * 0, "'background' is the only one in 2 labels"),
    ("a value", lambda a: a * 9, "2 of 2 labels .* the label value 9"),
    ("a size", lambda a: a[:, :40], "2 of 2 labels .*expected the same size"),
  ],
)
def test_what_cannot_be_right_stops_a_training(tmp_path, trial, change, message):
  root = make.relabel(make.folder(tmp_path), change)
  data = {"train": open_dataset("folder", root=root, split="train")}
  with pytest.raises(UserError, match=message) as caught:
    inspection.check(data, "semantic", training="train", on_error="raise")
  assert "data.check=off" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_broken_labels_may_be_skipped(tmp_path):
  root = make.folder(tmp_path)
  Image.fromarray(np.full((64, 96), 9, np.uint8)).save(root / "labels/train/1.png")
  data = {"train": open_dataset("folder", root=root, split="train")}
  (line,) = inspection.check(data, "semantic", training="train", on_error="skip")
  assert "1 of 2 labels" in line


def test_what_is_odd_is_a_line(tmp_path):
  root = make.folder(tmp_path, classes="background\nleaf\nstem\n")
  (root / "images/train/notes.npy").touch()
  exif = Image.Exif()
  exif[0x112] = 3
  picture = Image.open(root / "images/train/0.jpg")
  picture.load()
  picture.save(root / "images/train/0.jpg", exif=exif)
  problems, odd, _ = judged(root)
  assert not problems
  assert any("1 of 2 pictures are turned upright by their EXIF" in line for line in odd)
  assert any("1 of 3 classes occur in no label: stem" in line for line in odd)
  assert any("not read: 1 .npy" in line for line in odd)


def test_classes_that_differ_between_splits(tmp_path):
  for split, names in (("train", "ab"), ("val", "ba")):
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(names)]
    make.coco(tmp_path, split, [{}], categories)
  problems, _, _ = judged(tmp_path, "coco_instances", task="universal")
  assert problems == ["the classes of train and val differ in order: number 0 is 'a' and 'b'."]
  make.coco(tmp_path, "val", [{}], [{"id": 1, "name": "a"}])
  problems, _, _ = judged(tmp_path, "coco_instances", task="universal")
  assert problems == ["the classes of train and val differ: 2 and 1 (b in one only)."]


def test_objects_are_counted(tmp_path):
  for split in ("train", "val"):
    make.coco(tmp_path, split, [{}, {"iscrowd": 1}], count=2)
  problems, odd, page = judged(tmp_path, "coco_instances", task="universal", negatives=True)
  assert not problems and "1 of 2 pictures have no object" in odd[0]
  assert "objects per picture: 0 to 1" in page and "pixels of an object: 100 to 100" in page


def test_the_command_prints_a_page_and_draws_a_sheet(tmp_path, capsys):
  root = make.folder(tmp_path / "data")
  flags = ["--config=afformer/folder:tiny", f"--config.data.root={root}"]
  call("inspect", *flags, f"--output={tmp_path / 'sheet.png'}")
  assert "nothing odd was found" in capsys.readouterr().out
  assert Image.open(tmp_path / "sheet.png").size[0] > 96
  make.relabel(root, lambda a: a * 255)
  with pytest.raises(SystemExit) as caught:
    call("inspect", *flags)
  assert caught.value.code == 1 and "problem: split train" in capsys.readouterr().out


def test_negatives_left_out_are_told_by_the_command(tmp_path, capsys):
  for split in ("train", "val"):
    make.coco(tmp_path, split, [{}], count=3)
  flags = ["--config=proscale/coco_instances", f"--config.data.root={tmp_path}"]
  call("inspect", *flags, "--splits=train,val")
  assert "2 of 3 images have no object" in capsys.readouterr().out
  assert json.loads((tmp_path / "annotations/instances_val.json").read_text())["images"]


def test_a8_a_class_whose_value_is_ignored_is_neither_missing_nor_predicted(tmp_path):
  root = make.folder(tmp_path)
  problems, odd, _ = judged(root, ignore=0)
  assert not problems and any("'leaf' is the only class" in line for line in odd)
  data = open_dataset("folder", root=root, split="train", ignore=0)
  task = SemanticTask.for_dataset(data)
  assert task.unused == (0,)
  assert task.usable(jnp.array([[5.0, 1.0]])).argmax(-1).tolist() == [1]
  assert SemanticTask.for_dataset(open_dataset("folder", root=root, split="train")).unused == ()
