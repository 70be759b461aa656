"""The evaluation of universal segmentation, by a model that knows the answer or half of it."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.evaluators.universal import UniversalEvaluator
from effseg_jax.input_pipeline.datasets.panoptic import ClassTable, GroundTruth, UniversalDataset
from effseg_jax.tasks.universal import UniversalTask

# Pictures are multiples of four pixels, and so are all segments: masks at a quarter are exact.
SIZES = ((32, 48), (24, 48))
TABLE = ClassTable(
  ("sky", "person", "car"),
  np.array([False, True, True]),
  np.array([40, 1, 3]),
  np.array([(0, 0, 255), (255, 0, 0), (0, 255, 0)], np.uint8),
)
OPTIONS = {
  "panoptic": True,
  "instance": True,
  "semantic": True,
  "score_threshold": 0.8,
  "overlap_threshold": 0.8,
  "detections": 20,
  "pictures": 2,
}


class _Dataset(UniversalDataset):
  name, split, table = "blocks", "val", TABLE

  def __len__(self):
    return len(SIZES)

  def image(self, index):
    return np.full((*SIZES[index], 3), 100, np.uint8)

  def image_size(self, index):
    return SIZES[index]

  def ground_truth(self, index):
    rows, cols = SIZES[index]
    segments = np.full((1, rows, cols), -1, np.int16)
    segments[0, :8] = 0  # sky
    segments[0, 8:16, :16] = 1  # two persons
    segments[0, 8:16, 16:32] = 2
    segments[0, 16:24, :32] = 3  # a crowd of cars; the rest is void
    labels = np.array([0, 1, 1, 2], np.int32)
    areas = np.bincount(segments[segments >= 0], minlength=4)
    return GroundTruth(segments, labels, labels == 2, areas, 7 + index, f"picture_{index}")


class _Oracle:
  """Answers with the variables: outputs for each row."""

  def apply(self, variables, images, train):
    assert images.shape[1:] == (32, 64, 3) and not train
    return {**variables, "aux": []}


def _answer(truth, size=(32, 64)):
  """Outputs of 6 queries for one example that know the truth."""
  class_logits = np.full((6, 4), -9.0, np.float32)
  # Between 20 and -12.4 the border of an upsampled rectangle is exact, corners included.
  mask_logits = np.full((6, size[0] // 4, size[1] // 4), -12.4, np.float32)
  class_logits[:, 3] = 9.0
  for row, label in enumerate(truth.labels):
    class_logits[row] = np.where(np.arange(4) == label, 9.0, -9.0)
    mask = truth.segments[0][::4, ::4] == row
    mask_logits[row, : mask.shape[0], : mask.shape[1]][mask] = 20.0
  return {"class_logits": class_logits, "mask_logits": mask_logits}


def _evaluate(change=lambda outputs: None, dataset=None, **options):
  """Two pictures and a filler, in one batch."""
  dataset = dataset or _Dataset()
  answers = [_answer(dataset.ground_truth(i)) for i in (0, 1, 0)]
  outputs = jax.tree.map(lambda *x: np.stack(x), *answers)
  change(outputs)
  batch = {
    "image": np.full((3, 32, 64, 3), 100, np.uint8),
    "valid_size": np.array([*SIZES, (32, 64)], np.int32),
    "label_size": np.array([*SIZES, (32, 64)], np.int32),
    "index": np.array([0, 1, -1], np.int32),
    "weight": np.array([1, 1, 0], np.float32),
  }
  task = UniversalTask.for_dataset(dataset)
  evaluator = UniversalEvaluator(_Oracle(), task, dataset, {**OPTIONS, **options})
  totals, examples = evaluator.step(outputs, batch)
  evaluator.update(batch, totals, examples)
  return evaluator.result()


def test_the_right_answer_is_perfect():
  result = _evaluate()
  # The crowd is found as a car: no truth, and no mistake.
  assert result.scalars["PQ"] == result.scalars["PQ_th"] == result.scalars["PQ_st"] == 1.0
  assert result.scalars["AP"] == pytest.approx(1.0)
  assert result.scalars["mIoU"] == 1.0
  assert result.report["panoptic"]["classes"]["person"]["TP"] == 4
  assert result.report["instance"]["classes"] == {"person": pytest.approx(1.0)}
  assert json.loads(json.dumps(result.report)) == result.report
  assert "person" in result.table and "mIoU 100.00" in result.table
  assert "car" not in result.table  # a crowd alone is no class that occurs
  assert result.pictures["samples"].shape[2] == 3


def test_mistakes_are_counted():
  def change(outputs):
    outputs["class_logits"][0, 1] = outputs["class_logits"][0, 4]  # a person is not found
    outputs["class_logits"][1, 0] = outputs["class_logits"][0, 3]  # the sky is a car

  result = _evaluate(change)
  classes = result.report["panoptic"]["classes"]
  assert (classes["person"]["TP"], classes["person"]["FN"]) == (3, 1)
  assert (classes["sky"]["TP"], classes["sky"]["FN"], classes["car"]["FP"]) == (1, 1, 1)
  assert 0 < result.scalars["PQ"] < 1 and 0 < result.scalars["AP"] < 1
  assert 0 < result.scalars["mIoU"] < 1


def test_nothing_found():
  def change(outputs):
    outputs["class_logits"][...] = outputs["class_logits"][0, 4]

  result = _evaluate(change)
  assert result.scalars["PQ"] == 0.0 and 0 <= result.scalars["AP"] < 1


def test_only_what_is_asked_for():
  result = _evaluate(panoptic=False, instance=False)
  assert set(result.scalars) == {"mIoU"} and "sky" in result.table
  result = _evaluate(panoptic=False, semantic=False)
  assert "PQ" not in result.scalars and result.scalars["AP"] == pytest.approx(1.0)
  with pytest.raises(UserError, match="all False"):
    _evaluate(panoptic=False, instance=False, semantic=False)


def test_segments_that_overlap_have_no_panoptic_truth():
  class Overlapping(_Dataset):
    def ground_truth(self, index):
      truth = super().ground_truth(index)
      layers = np.concatenate([truth.segments, np.full_like(truth.segments, -1)])
      return GroundTruth(layers, truth.labels, truth.crowd, truth.areas, index, truth.name)

  with pytest.raises(UserError, match=r"eval\.panoptic=False"):
    _evaluate(dataset=Overlapping())
  result = _evaluate(dataset=Overlapping(), panoptic=False, semantic=False)
  assert result.scalars["AP"] == pytest.approx(1.0)


def test_predictions_in_the_official_formats(tmp_path):
  _evaluate().write_predictions(tmp_path)
  annotations = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
  assert [a["image_id"] for a in annotations] == [7, 8]
  assert [s["category_id"] for s in annotations[0]["segments_info"]] == [40, 1, 1, 3]
  png = np.asarray(Image.open(tmp_path / "panoptic" / annotations[1]["file_name"])).astype(int)
  ids = png @ np.array([1, 256, 65536])
  np.testing.assert_array_equal(ids - 1, _Dataset().ground_truth(1).segments[0])
  entries = json.loads((tmp_path / "instances.json").read_text())
  best = max(entries, key=lambda entry: entry["score"])
  assert best["segmentation"]["size"] == [32, 48] and best["category_id"] in (1, 3)
  semantic = np.asarray(Image.open(tmp_path / "semantic" / "picture_0.png"))
  assert semantic.shape == SIZES[0] and (semantic[:8] == 0).all()
