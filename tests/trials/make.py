"""Small data sets as people bring them; each trial breaks one of them in one way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]


def folder(root, count=2, size=(64, 96), classes="background\nleaf\n", splits=("train", "val")):
  """A sound data set for `folder`: the left half of each picture is 0, the right half 1."""
  root = Path(root)
  shutil.rmtree(root, ignore_errors=True)
  rng = np.random.default_rng(0)
  for split in splits:
    for kind in ("images", "labels"):
      (root / kind / split).mkdir(parents=True)
    for number in range(count):
      picture = rng.integers(0, 256, (*size, 3), np.uint8)
      label = np.zeros(size, np.uint8)
      label[:, size[1] // 2 :] = 1
      picture[:, size[1] // 2 :] //= 3
      Image.fromarray(picture).save(root / "images" / split / f"{number}.jpg")
      Image.fromarray(label).save(root / "labels" / split / f"{number}.png")
  (root / "classes.txt").write_bytes(classes if isinstance(classes, bytes) else classes.encode())
  return root


def relabel(root, change, split="*"):
  """Rewrites each label of a `folder` as `change(array)`."""
  for path in sorted(Path(root).glob(f"labels/{split}/*.png")):
    Image.fromarray(change(np.asarray(Image.open(path)))).save(path)
  return root


def coco(
  root, split, annotations, categories=({"id": 1, "name": "apple"},), size=(20, 24), count=1
):
  """An instances json and its pictures; an annotation says what differs from a sound one."""
  root = Path(root)
  (root / "annotations").mkdir(parents=True, exist_ok=True)
  (root / split).mkdir(exist_ok=True)
  images = [
    {"id": n + 1, "file_name": f"{n}.jpg", "height": size[0], "width": size[1]}
    for n in range(count)
  ]
  for image in images:
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(root / split / image["file_name"])
  sound = {
    **{"image_id": 1, "category_id": 1, "segmentation": SQUARE},
    **{"area": 100, "iscrowd": 0, "bbox": [2, 2, 10, 10]},
  }
  full = [
    {key: value for key, value in {"id": n + 1, **sound, **given}.items() if value != "absent"}
    for n, given in enumerate(annotations)
  ]
  content = {"images": images, "categories": list(categories), "annotations": full}
  (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
  return root


def edit_json(path, change):
  """Rewrites a json after `change(content)`."""
  content = json.loads(Path(path).read_text())
  change(content)
  Path(path).write_text(json.dumps(content))


def panoptic(root, ids, segments, categories=None, png=None):
  """A panoptic json of one picture; `png` writes the ids (path, ids)."""
  root = Path(root)
  (root / "annotations/panoptic_val").mkdir(parents=True, exist_ok=True)
  (root / "val").mkdir(exist_ok=True)
  rows, cols = ids.shape
  Image.fromarray(np.zeros((rows, cols, 3), np.uint8)).save(root / "val/a.jpg")
  path = root / "annotations/panoptic_val/a.png"
  if png is None:
    Image.fromarray(as_rgb(ids)).save(path)
  else:
    png(path, ids)
  content = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": rows, "width": cols}],
    "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
    "categories": categories or [{"id": 1, "name": "x", "isthing": 1}],
  }
  (root / "annotations/panoptic_val.json").write_text(json.dumps(content))
  return root


def as_rgb(ids):
  """Segment ids as the three channels of a panoptic PNG."""
  return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
