"""Your own images as people bring them: labels, class lists, names, hidden files, EXIF."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from effseg_jax import errors
from effseg_jax.errors import DataWarning, UserError
from effseg_jax.input_pipeline.datasets import class_list, open_dataset
from effseg_jax.input_pipeline.transforms import keep_ratio_size
from effseg_jax.input_pipeline.transforms_universal import shortest_edge_size
from tests.trials import make

COLOURED = "background 0 0 0\nleaf 255 0 0\n"


@pytest.fixture(autouse=True)
def every_warning(monkeypatch):
  monkeypatch.setattr(errors, "_warned", set())


def opened(root, **options):
  return open_dataset("folder", root=root, split="train", **options)


def values(root, **options):
  """Class of the left and of the right half of the first label."""
  label = opened(root, **options)[0]["label"]
  return int(label[0, 0]), int(label[0, -1])


def as_rgb(label, colour=(255, 0, 0)):
  return (label[..., None] * np.array(colour)).astype(np.uint8)


@pytest.mark.parametrize(
  ("trial", "change", "options", "classes", "expected"),
  [
    ("A1 binary", lambda a: a * 255, {"labels": "binary"}, "background\nleaf\n", (0, 1)),
    ("A1 0 and 1", lambda a: a, {"labels": "binary"}, "background\nleaf\n", (0, 1)),
    ("A1 one name", lambda a: a * 255, {"labels": "binary"}, "leaf\n", (0, 1)),
    ("A1 1 bit", lambda a: a.astype(bool), {"labels": "binary"}, "leaf\n", (0, 1)),
    ("A4 colours", as_rgb, {"labels": "colours"}, COLOURED, (0, 1)),
    ("A4 void", as_rgb, {"labels": "colours"}, "void 0 0 0\na 255 0 0\nb 1 1 1\n", (255, 0)),
    ("A8 from one", lambda a: a, {"labels": "from_one"}, "leaf\nstem\n", (255, 0)),
    ("A8 ignore 0", lambda a: a, {"ignore": 0}, "background\nleaf\n", (255, 1)),
    ("16 bits", lambda a: a.astype(np.uint16), {}, "background\nleaf\n", (0, 1)),
    ("grey as RGB", lambda a: as_rgb(a, (1, 1, 1)), {}, "background\nleaf\n", (0, 1)),
  ],
)
def test_labels_in_the_forms_that_tools_write(tmp_path, trial, change, options, classes, expected):
  root = make.relabel(make.folder(tmp_path, classes=classes), change)
  assert values(root, **options) == expected


@pytest.mark.parametrize(
  ("trial", "change", "options", "classes", "message"),
  [
    ("A2 one class", None, {}, "leaf\n", "lists one class, 'leaf'.* two classes.*background"),
    ("A8 one class", None, {"ignore": 0}, "leaf\n", "ignore=0 .*the value 1 has no class"),
    ("A4 colours", as_rgb, {}, COLOURED, "has 3 channels.*labels=colours"),
    (
      "A4 unknown",
      as_rgb,
      {"labels": "colours"},
      "a 0 0 0\nb 9 9 9\n",
      "255 0 0 at row 0, column 48",
    ),
    ("A4 no colour", as_rgb, {"labels": "colours"}, "a 0 0 0\nb\n", "gives no colour to 'b'"),
    ("A1 soft edge", lambda a: a * 77, {"labels": "binary"}, "a\nb\n", "label value"),
    ("binary", None, {"labels": "binary"}, "a\nb\nc\n", "lists 3 classes"),
    ("a word", None, {"labels": "colors"}, "a\nb\n", "Did you mean 'colours'"),
    ("a value", lambda a: a * 7, {}, "a\nb\n", "label value 7; expected 0 to 1"),
    ("16 bits", lambda a: a.astype(np.uint16) * 300, {}, "a\nb\n", "label value 300"),
  ],
)
def test_what_does_not_fit_is_one_line(tmp_path, trial, change, options, classes, message):
  root = make.folder(tmp_path, classes=classes)
  if change:
    make.relabel(root, change)
  with pytest.raises(UserError, match=message) as caught:
    opened(root, **options)[0]
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
  ("trial", "text", "expected"),
  [
    ("A15 mark", "background\r\nleaf\r\n".encode("utf-8-sig"), ("background", "leaf")),
    ("A15 UTF-16", "background\nleaf\n".encode("utf-16"), ("background", "leaf")),
    ("A16 numbers", "0 background\n1 leaf\n", ("background", "leaf")),
    ("A16 numbers", "0: background\n1: leaf\n", ("background", "leaf")),
    ("A16 a header", "name,r,g,b\nbackground,0,0,0\nleaf,0,255,0\n", ("background", "leaf")),
    ("A16 commas", "leaf,0,255,0\nstem,1,1,1\n", ("leaf", "stem")),
    ("A16 semicolons", "leaf;0;255;0\nstem;1;1;1\n", ("leaf", "stem")),
    ("A16 colours first", "0,0,0,background\n0,255,0,leaf\n", ("background", "leaf")),
    ("A16 CVAT", "# label:color_rgb:parts:actions\na:0,0,0::\nb:255,0,0::\n", ("a", "b")),
    ("A16 JSON", '["background","leaf"]', ("background", "leaf")),
    ("A16 JSON", '{"0": "background", "1": "leaf"}', ("background", "leaf")),
    ("hexadecimal", "a #000000\nb #00ff00\n", ("a", "b")),
    ("names with blanks", "traffic light 0 255 0\nwall, other\n", ("traffic light", "wall, other")),
    ("names with numbers", "4 wheeler\n2 wheeler\n", ("4 wheeler", "2 wheeler")),
  ],
)
def test_class_lists_of_other_tools(tmp_path, trial, text, expected):
  path = tmp_path / "classes.txt"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  names, palette = class_list.read_classes(path)
  assert names == expected
  if "0,255,0" in str(text) or "0;255;0" in str(text) or "00ff00" in str(text):
    assert [0, 255, 0] in palette.tolist()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("Strasse\nBäume\n".encode("cp1252"), r"classes\.txt is not encoded in UTF-8.* save it"),
    (b"1 leaf\n2 stem\n", "numbers its classes from 1"),
    (b"", "lists no class"),
    (b"a 0 0 300\nb\n", "beyond 255"),
    (b'[{"name": "a"}]', "no list of names"),
  ],
)
def test_class_lists_that_cannot_be_read(tmp_path, text, message):
  (tmp_path / "classes.txt").write_bytes(text)
  with pytest.raises(UserError, match=message):
    class_list.read_classes(tmp_path / "classes.txt")


def test_a11_every_suffix_is_read(tmp_path):
  root = make.folder(tmp_path)
  first = Image.open(root / "images/train/0.jpg")
  for suffix in ("tif", "jfif", "gif", "webp", "JPEG"):
    form = "JPEG" if suffix in ("jfif", "JPEG") else None
    first.save(root / f"images/train/x_{suffix}.{suffix}", form)
    shutil.copy(root / "labels/train/0.png", root / f"labels/train/x_{suffix}.png")
  Image.open(root / "labels/train/1.png").save(root / "labels/train/1.tif")
  (root / "labels/train/1.png").unlink()
  data = opened(root)
  assert len(data) == 7
  assert all(data[index]["image"].shape == (64, 96, 3) for index in range(7))


def test_a12_hidden_files_are_no_data(tmp_path):
  root = make.folder(tmp_path)
  for kind, suffix in (("images", "jpg"), ("labels", "png")):
    (root / kind / f"train/._0.{suffix}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (root / kind / "train/__MACOSX").mkdir()
    (root / kind / f"train/__MACOSX/9.{suffix}").touch()
  assert len(opened(root)) == 2


def test_a14_linked_folders_are_read(tmp_path):
  root, other = make.folder(tmp_path / "a"), make.folder(tmp_path / "b")
  for kind in ("images", "labels"):
    (root / kind / "train/site").symlink_to(other / kind / "train")
  assert len(opened(root)) == 4


@pytest.mark.parametrize(
  ("name", "hint"), [("0_mask.png", "0_mask"), ("0.PNG", "0.PNG"), ("0.jpg", "0.jpg")]
)
def test_a7_labels_of_other_names(tmp_path, name, hint):
  root = make.folder(tmp_path)
  (root / "labels/train/0.png").rename(root / "labels/train" / name)
  with pytest.raises(UserError, match=rf"0\.png is missing\. There is {hint}.*the name of the pic"):
    opened(root)


def test_a22_two_pictures_of_one_label(tmp_path):
  root = make.folder(tmp_path)
  Image.new("RGB", (96, 64)).save(root / "images/train/0.png")
  with pytest.raises(UserError, match=r"0\.jpg and .*0\.png have the same label"):
    opened(root)


def turn_by_exif(root, orientation):
  for path in (root / "images/train").glob("*.jpg"):
    exif = Image.Exif()
    exif[0x112] = orientation
    picture = Image.open(path)
    picture.load()
    picture.save(path, exif=exif, quality=95)


def test_a9_pictures_turned_by_exif(tmp_path):
  root = make.folder(tmp_path)
  turn_by_exif(root, 6)
  with pytest.raises(UserError, match=r"EXIF orientation \(6\).*options\.turn_labels=True"):
    opened(root)[0]
  for orientation in (3, 6):
    turn_by_exif(root, orientation)
    example = opened(root, turn_labels=True)[0]
    bright = example["image"].mean(-1)  # the class 1 is the dark half
    assert bright[example["label"] == 0].mean() > 2 * bright[example["label"] == 1].mean()


def test_a18_thin_pictures():
  assert keep_ratio_size((3, 9000), (2048, 512)) == (1, 2048)
  assert shortest_edge_size((1, 5000), 800, 1333) == (1, 1333)


def camvid(root, text, names=("train/x.png", "trainannot/x.png")):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(root / name)
  (root / "train.txt").write_bytes(text)
  return open_dataset("camvid", root=root, split="train")


def test_a17_a_list_of_files(tmp_path):
  for number, text in enumerate(
    (
      b"\xef\xbb\xbftrain/x.png trainannot/x.png\r\n",
      b"train\\x.png trainannot\\x.png\n",
      b'"train/x.png" "trainannot/x.png"\n',
    )
  ):
    assert len(camvid(tmp_path / str(number), text)) == 1
  blanks = ("train/my x.png", "trainannot/my x.png")
  for text in (b"train/my x.png\ttrainannot/my x.png\n", b"'train/my x.png' 'trainannot/my x.png'"):
    assert len(camvid(tmp_path / "blanks", text, blanks)) == 1
  with pytest.raises(UserError, match="with a tab between them"):
    camvid(tmp_path / "blanks", b"train/my x.png trainannot/my x.png\n", blanks)
  with pytest.raises(UserError, match=r"lists 2 files and 1 are missing; the first is .*y\.png"):
    camvid(tmp_path / "missing", b"train/y.png trainannot/x.png\n")


def test_a25_cityscapes_says_which_labels_it_reads(tmp_path):
  image = tmp_path / "leftImg8bit/train/a/a_0_leftImg8bit.png"
  labels = [tmp_path / f"gtFine/train/a/a_0_gtFine_label{kind}Ids.png" for kind in ("", "Train")]
  for path in (image, *labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)
  with pytest.warns(DataWarning, match="the first are read .*labels=train_ids reads the others"):
    open_dataset("cityscapes", root=tmp_path, split="train")


def test_a19_one_broken_example_can_be_skipped(tmp_path, monkeypatch):
  from effseg_jax.input_pipeline import codecs
  from effseg_jax.input_pipeline.loader import Tolerant

  root = make.folder(tmp_path)
  Image.new("RGB", (400, 300)).save(root / "images/train/0.jpg")
  monkeypatch.setattr(codecs, "MAX_PIXELS", 100_000)
  with pytest.raises(UserError, match="megapixels"):
    opened(root)[0]
  with pytest.warns(UserWarning, match="skipped"):
    assert Tolerant(opened(root), "skip")[0]["name"] == "1"
