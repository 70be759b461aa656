"""What annotation tools export becomes a data set: the same masks, in every form."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command import call
from PIL import Image

from effseg_jax.input_pipeline.datasets import open_dataset

ROWS, COLS = 40, 60
# Two objects of each of two classes, (left, top, right, bottom) in pixels.
BOXES = (("apple", (2, 3, 12, 13)), ("pear", (20, 5, 30, 25)), ("apple", (40, 20, 55, 35)))


def corners(box):
  left, top, right, bottom = box
  return [left, top, right, top, right, bottom, left, bottom]


def mask(box):
  found = np.zeros((ROWS, COLS), bool)
  found[box[1] : box[3], box[0] : box[2]] = True
  return found


def picture(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((ROWS, COLS, 3), 90, np.uint8)).save(path)


def write_yolo(root):
  (root / "data.yaml").write_text("path: .\nnames:\n  0: pear\n  1: apple\nnc: 2\n")
  picture(root / "images/train/a.jpg")
  (root / "labels/train").mkdir(parents=True)
  lines = []
  for name, box in BOXES:
    shares = np.array(corners(box)).reshape(-1, 2) / (COLS, ROWS)
    lines.append(" ".join(map(str, [("pear", "apple").index(name), *shares.ravel().tolist()])))
  (root / "labels/train/a.txt").write_text("\n".join(lines))


def write_labelme(root):
  picture(root / "train/a.jpg")
  shapes = [
    {
      "label": name,
      "points": [[box[0], box[1]], [box[2], box[3]]],
      "shape_type": "rectangle",
      "group_id": None,
    }
    for name, box in BOXES[:1]
  ]
  shapes += [
    {"label": name, "points": np.reshape(corners(box), (-1, 2)).tolist(), "shape_type": "polygon"}
    for name, box in BOXES[1:]
  ]
  content = {"imagePath": "..\\train\\a.jpg", "shapes": shapes, "imageHeight": ROWS}
  (root / "train/a.json").write_text(json.dumps(content))


def write_voc(root):
  picture(root / "JPEGImages/a.jpg")
  (root / "labelmap.txt").write_text(
    "# label:color_rgb:parts:actions\nbackground:0,0,0::\napple:128,0,0::\npear:0,128,0::\n"
  )
  classes, objects = (np.zeros((ROWS, COLS, 3), np.uint8) for _ in range(2))
  for number, (name, box) in enumerate(BOXES, 1):
    classes[mask(box)] = (128, 0, 0) if name == "apple" else (0, 128, 0)
    objects[mask(box)] = (64 * number % 256, 7, number)
  for folder, array in (("SegmentationClass", classes), ("SegmentationObject", objects)):
    (root / folder).mkdir()
    Image.fromarray(array).save(root / folder / "a.png")
  (root / "ImageSets/Segmentation").mkdir(parents=True)
  (root / "ImageSets/Segmentation/train.txt").write_text("a\n")


def write_cvat(root):
  picture(root / "images/a.jpg")
  shapes = []
  for name, box in BOXES[:2]:
    points = ";".join(f"{x},{y}" for x, y in np.reshape(corners(box), (-1, 2)))
    shapes.append(f'<polygon label="{name}" points="{points}" occluded="0" z_order="0"/>')
  name, (left, top, right, bottom) = BOXES[2]
  rows, cols = bottom - top, right - left
  shapes.append(
    f'<mask label="{name}" rle="0, {rows * cols}" left="{left}" top="{top}" width="{cols}"'
    f' height="{rows}"/>'
  )
  (root / "annotations.xml").write_text(
    f'<?xml version="1.0"?><annotations><image id="0" name="a.jpg" width="{COLS}" height="{ROWS}">'
    f"{''.join(shapes)}</image></annotations>"
  )


def coco_content(file_name):
  return {
    "images": [{"id": 0, "file_name": file_name, "width": COLS, "height": ROWS}],
    "categories": [{"id": 0, "name": "apple"}, {"id": 1, "name": "pear"}],
    "annotations": [
      {
        "id": number,
        "image_id": 0,
        "category_id": ("apple", "pear").index(name),
        "segmentation": [corners(box)],
        "bbox": [],
        "iscrowd": 0,
      }
      for number, (name, box) in enumerate(BOXES)
    ],
  }


def write_roboflow(root):
  picture(root / "train/a.jpg")
  (root / "train/_annotations.coco.json").write_text(json.dumps(coco_content("a.jpg")))


def write_labelstudio(root):
  picture(root / "images/a.jpg")
  (root / "result.json").write_text(json.dumps(coco_content("images\\1\\a.jpg")))


WRITERS = {
  "yolo": write_yolo,
  "labelme": write_labelme,
  "voc": write_voc,
  "cvat": write_cvat,
  "roboflow": write_roboflow,
  "labelstudio": write_labelstudio,
}


@pytest.mark.parametrize("form", sorted(WRITERS))
def test_a_round_trip_keeps_every_mask(tmp_path, form, capsys):
  source, output = tmp_path / "export", tmp_path / "data"
  source.mkdir()
  WRITERS[form](source)
  call("import", f"--from={form}", f"--input={source}", f"--output={output}")
  said = capsys.readouterr().out
  assert "train: 1 pictures, 3 objects (2 apple, 1 pear)" in said
  assert Image.open(output / "sheet.png").size[0] > COLS
  data = open_dataset("coco_instances", root=output, split="train")
  assert sorted(data.classes) == ["apple", "pear"]
  truth = data.ground_truth(0)
  found = {
    (data.classes[label], one.tobytes())
    for label, one in zip(truth.labels, truth.masks(), strict=True)
  }
  assert found == {(name, mask(box).tobytes()) for name, box in BOXES}


@pytest.mark.parametrize(
  ("form", "change", "message"),
  [
    ("yolo", lambda r: (r / "labels/train/a.txt").write_text("0 .5 .5 .1 .1"), "a box; expected"),
    ("yolo", lambda r: (r / "labels/train/a.txt").write_text("7 0 0 1 0 1 1"), "a class of 2"),
    ("yolo", lambda r: (r / "data.yaml").unlink(), "no list of classes"),
    ("labelme", lambda r: (r / "train/a.json").write_text("{"), "is no json"),
    ("labelme", lambda r: (r / "train/a.jpg").unlink(), "is not beside it"),
    ("voc", lambda r: (r / "JPEGImages/a.jpg").unlink(), "has no picture a"),
    ("cvat", lambda r: (r / "annotations.xml").write_text("<a>"), "is no XML"),
    ("cvat", lambda r: (r / "annotations.xml").unlink(), "is missing; expected annotations.xml"),
    ("roboflow", lambda r: (r / "train/_annotations.coco.json").unlink(), "no annotated pictures"),
    ("labelstudio", lambda r: (r / "images/a.jpg").unlink(), "1 are missing"),
  ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path, form, change, message, capsys):
  WRITERS[form](tmp_path)
  change(tmp_path)
  with pytest.raises(SystemExit) as caught:
    call("import", f"--from={form}", f"--input={tmp_path}", f"--output={tmp_path / 'out'}")
  line = capsys.readouterr().err.strip()
  assert caught.value.code == 2 and message in line and len(line.splitlines()) == 1
