"""A universal model from files to files: a few steps of training, an evaluation, a prediction."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command import succeed
from PIL import Image

from effseg_jax.input_pipeline.datasets import open_dataset

CLASSES = [
  {"id": 4, "name": "ball", "isthing": 1},
  {"id": 9, "name": "ring", "isthing": 1},
  {"id": 40, "name": "ground", "isthing": 0},
]
CONFIG = "--config=tests/small_universal_config.py"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
  """Three pictures in COCO's panoptic form, the last one without a thing."""
  root = tmp_path_factory.mktemp("coco")
  scenes = open_dataset("synthetic_instances", split="val", size=(48, 64))
  images, annotations = [], []
  (root / "val2017").mkdir()
  (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
  for number in range(3):
    truth, name = scenes.ground_truth(number), f"{number:012d}"
    # Surfaces are ground, objects balls and rings by turns.
    kinds = np.where(truth.labels < 3, 40, np.where(np.arange(len(truth.labels)) % 2, 4, 9))
    if number == 2:
      kinds[:] = 40
    ids = 1000 * (truth.segments[0].astype(np.int32) + 1)
    coded = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    Image.fromarray(coded).save(root / "annotations" / "panoptic_val2017" / f"{name}.png")
    Image.fromarray(scenes.image(number)).save(root / "val2017" / f"{name}.jpg", quality=95)
    images.append({"id": number, "file_name": f"{name}.jpg", "height": 48, "width": 64})
    segments = [
      {"id": 1000 * (i + 1), "category_id": int(kinds[i]), "area": int(area), "iscrowd": 0}
      for i, area in enumerate(truth.areas)
    ]
    annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
  text = json.dumps({"images": images, "annotations": annotations, "categories": CLASSES})
  (root / "annotations" / "panoptic_val2017.json").write_text(text)
  return root


@pytest.fixture(scope="module")
def run(coco, tmp_path_factory):
  """A finished run."""
  workdir = tmp_path_factory.mktemp("runs") / "coco"
  said = succeed("train.py", CONFIG, f"--workdir={workdir}", f"--config.data.root={coco}")
  assert "step 4/4" in said and "things" in said and "mIoU" in said
  return workdir


def test_training_is_logged(run):
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  train = [line for line in lines if "train/loss" in line]
  assert train[-1]["step"] == 4
  assert {"train/loss_class", "train/loss_mask", "train/loss_dice", "train/targets"} <= set(
    train[0]
  )
  # More segments than room: the largest are kept, and the others counted.
  assert sum(line["train/dropped_segments"] for line in train) > 0
  assert {"eval/PQ", "eval/AP", "eval/mIoU"} <= set(lines[-1])


def test_evaluation_writes_the_official_formats(run, coco):
  said = succeed(
    "eval.py", CONFIG, f"--workdir={run}", f"--config.data.root={coco}", "--predictions"
  )
  assert "3 images" in said
  metrics = json.loads((run / "eval_val2017" / "metrics.json").read_text())
  assert {"PQ", "SQ", "RQ", "AP", "mIoU", "panoptic", "instance", "semantic"} <= set(metrics)
  folder = run / "eval_val2017" / "predictions"
  panoptic = json.loads((folder / "panoptic.json").read_text())["annotations"]
  assert sorted(entry["image_id"] for entry in panoptic) == [0, 1, 2]
  for entry in panoptic:
    assert (folder / "panoptic" / entry["file_name"]).is_file()
    assert all(s["category_id"] in (4, 9, 40) for s in entry["segments_info"])
  entries = json.loads((folder / "instances.json").read_text())
  assert entries and {entry["category_id"] for entry in entries} <= {4, 9}


def test_a_picture_is_segmented(run, coco, tmp_path):
  picture = coco / "val2017" / "000000000001.jpg"
  said = succeed("predict.py", f"--checkpoint={run}", f"--input={picture}", f"--output={tmp_path}")
  assert "1 of 1 written" in said
  for name in ("panoptic.png", "panoptic.json", "instances.json", "semantic.png", "overlay.png"):
    assert (tmp_path / f"000000000001_{name}").is_file()
  with Image.open(tmp_path / "000000000001_overlay.png") as overlay:
    assert overlay.size == (64, 48)
