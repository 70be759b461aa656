"""Segmented pictures, by a model that always finds the same two things and a sky."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import effseg_jax
from effseg_jax.errors import UserError
from effseg_jax.inference.mask_readout import MaskInference
from effseg_jax.inference.segments import instance_result, panoptic_result, segment_on_host
from effseg_jax.prediction import make_segmenter
from effseg_jax.weights.bundle import Bundle

CLASSES = ("sky", "person", "car")


class _Fixed:
  """Answers with masks of fixed shares of the picture, whatever it shows."""

  def apply(self, variables, images, train):
    assert not train
    rows, cols = -(-images.shape[1] // 4), -(-images.shape[2] // 4)
    y, x = jnp.arange(rows)[:, None] / rows, jnp.arange(cols) / cols
    masks = jnp.stack([(y < 0.5) & (x < 2), (y >= 0.5) & (x < 0.5), (y >= 0.5) & (x >= 0.5)])
    mask_logits = jnp.where(masks, 20.0, -20.0)[None]
    return {"class_logits": variables["class_logits"], "mask_logits": mask_logits, "aux": []}


def _segmenter(logits=9.0, options=(), **inference):
  class_logits = np.full((1, 3, 4), -9.0, np.float32)
  class_logits[0, [0, 1, 2], [0, 1, 1]] = logits
  card = {
    "task": {
      "name": "universal",
      "classes": list(CLASSES),
      "palette": [[0, 0, 255], [255, 0, 0], [0, 255, 0]],
      "is_thing": [False, True, True],
      "mean": [120.0, 120.0, 120.0],
    },
    "inference": {"short_side": 64, "max_size": 96, "multiple": 32, **inference},
  }
  return make_segmenter(Bundle(_Fixed(), {"class_logits": class_logits}, card), **dict(options))


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "street.png"
  Image.fromarray(np.full((40, 56, 3), 90, np.uint8)).save(path)
  return path


def test_writes_everything_the_model_was_evaluated_for(picture, tmp_path):
  result = _segmenter()(picture)
  assert result.describe() == "sky, 2 person"
  result.save(tmp_path / "out")
  files = {path.name for path in tmp_path.glob("out*")}
  assert files == {
    "out_panoptic.png",
    "out_panoptic.json",
    "out_instances.json",
    "out_semantic.png",
    "out_overlay.png",
  }
  coded = np.asarray(Image.open(tmp_path / "out_panoptic.png"))
  assert coded.shape == (40, 56, 3) and coded[5, 5].tolist() == [1, 0, 0]
  segments = json.loads((tmp_path / "out_panoptic.json").read_text())
  assert [(s["id"], s["class"], s["isthing"]) for s in segments] == [
    (1, "sky", 0),
    (2, "person", 1),
    (3, "person", 1),
  ]
  areas = np.bincount(coded[..., 0].ravel(), minlength=4)[1:]
  assert [s["area"] for s in segments] == areas.tolist()
  assert segments[0]["score"] == pytest.approx(1.0, abs=1e-3)
  instances = json.loads((tmp_path / "out_instances.json").read_text())
  assert [i["class"] for i in instances[:2]] == ["person", "person"]
  assert instances[0]["segmentation"]["size"] == [40, 56]
  semantic = np.asarray(Image.open(tmp_path / "out_semantic.png"))
  assert semantic.shape == (40, 56) and semantic[5, 5] == 0 and semantic[35, 5] == 1
  assert np.asarray(Image.open(tmp_path / "out_overlay.png")).shape == (40, 56, 3)


@pytest.mark.parametrize(
  "kind, result_name", [("semantic", "semantic.png"), ("instance", "instances.json")]
)
def test_writes_one_kind_of_result(picture, tmp_path, kind, result_name):
  kinds = dict.fromkeys(("panoptic", "instance", "semantic"), False)
  result = _segmenter(**{**kinds, kind: True})(picture)
  result.save(tmp_path / "out")
  assert {p.name for p in tmp_path.glob("out*")} == {f"out_{result_name}", "out_overlay.png"}
  assert "person" in result.describe() and result.shares()["person"] > 0.4


def test_a_result_says_what_it_holds(picture):
  result = _segmenter()(np.asarray(Image.open(picture)))
  assert isinstance(result, effseg_jax.UniversalResult)
  sky, left, right = result.segments
  assert (sky.id, sky.label, sky.name, sky.is_thing) == (1, 0, "sky", False)
  assert (right.id, right.label, right.name, right.is_thing, right.number) == (
    3,
    1,
    "person",
    True,
    1,
  )
  assert left.score == pytest.approx(1.0, abs=1e-3)
  for segment in (*result.segments, *result.instances):
    assert segment.mask.shape == (40, 56) and segment.mask.dtype == bool
    assert segment.area == segment.mask.sum()
    if segment.area:
      x0, y0, x1, y1 = segment.box
      assert segment.mask[y0:y1, x0:x1].sum() == segment.area
      assert segment.mask[y0].any() and segment.mask[y1 - 1].any()
      assert segment.mask[:, x0].any() and segment.mask[:, x1 - 1].any()
  for segment in result.segments:
    np.testing.assert_array_equal(segment.mask, result.panoptic_map == segment.id)
  scores = [instance.score for instance in result.instances]
  assert scores == sorted(scores, reverse=True) and result.instances[0].name == "person"
  assert (result.class_map[:18] == 0).all() and (result.class_map[22:] == 1).all()


def test_equals_the_evaluators_reading(picture):
  """Strips of rows and a common width give what the canvas of evaluation gives."""
  rng = np.random.default_rng(0)
  outputs = {
    "class_logits": 3 * rng.standard_normal((1, 12, 4)).astype(np.float32),
    "mask_logits": 4 * rng.standard_normal((1, 12, 16, 24)).astype(np.float32),
  }

  class Noise:
    def apply(self, variables, images, train):
      return variables

  inference = {"short_side": 64, "max_size": 96, "overlap_threshold": 0.1}
  segment = _segmenter(**inference)
  engine = segment.engine
  engine._model, engine._variables = Noise(), outputs
  image = np.zeros((170, 255, 3), np.uint8)
  result = segment(image, score_threshold=0.5)
  settings = MaskInference(
    engine.task.is_thing, score_threshold=0.5, overlap_threshold=0.1, detections=100
  )
  found = segment_on_host(outputs, [(170, 255)], [(64, 96)], settings)
  panoptic = panoptic_result(found, 0, (170, 255), engine.task.is_thing)
  np.testing.assert_array_equal(result.panoptic_map, panoptic["segmentation"])
  assert [(s.id, s.label, s.is_thing, s.score) for s in result.segments] == [
    (s["id"], s["label_id"], s["is_thing"], pytest.approx(s["score"]))
    for s in panoptic["segments_info"]
  ]
  assert len(result.segments) > 2
  instances = instance_result(found, 0, (170, 255))
  order = np.argsort(-instances["scores"], kind="stable")
  assert [s.label for s in result.instances] == instances["labels"][order].tolist()
  for segment_, row in zip(result.instances, order, strict=True):
    np.testing.assert_array_equal(segment_.mask, instances["masks"][row])
  np.testing.assert_array_equal(result.class_map, found.semantic[0, :170, :255])

  alone = _segmenter(**inference, panoptic=False, instance=False)
  alone.engine._model, alone.engine._variables = Noise(), outputs
  settings = MaskInference(engine.task.is_thing, panoptic=False, instance=False)
  found = segment_on_host(outputs, [(170, 255)], [(64, 96)], settings)
  np.testing.assert_array_equal(alone(image).class_map, found.semantic[0, :170, :255])


def test_the_threshold_is_the_calls_or_the_models_or_the_cards(picture):
  certain = np.log(3 * np.exp(-9.0) * np.array([9.0, 1.5, 0.3]))
  names = lambda result: [segment.name for segment in result.segments]  # noqa: E731
  segment = _segmenter(certain)  # scores 0.9, 0.6, 0.23
  assert names(segment(picture)) == ["sky"]
  programs = segment.num_programs
  assert names(segment(picture, score_threshold=0.5)) == ["sky", "person"]
  assert segment.num_programs == programs  # a threshold is data
  assert names(_segmenter(certain, {"score_threshold": 0.95})(picture)) == []
  assert names(_segmenter(certain, score_threshold=0.5)(picture)) == ["sky", "person"]
  for wrong in (1.0, -0.1, "high"):
    with pytest.raises(UserError, match=r"score_threshold is .*; expected a number from 0"):
      segment(picture, score_threshold=wrong)


def test_nothing_found_says_what_came_closest(picture):
  certain = np.log(3 * np.exp(-9.0) * np.array([0.3, 0.7, 0.3]))
  line = _segmenter(certain)(picture).describe()
  assert line == "nothing above 0.8; the best is person 0.41, try --score_threshold=0.4"
  assert _segmenter(-20.0)(picture).describe().startswith("nothing above 0.8")
  assert _segmenter(certain, panoptic=False)(picture).best[0] == "person"


def test_the_size_that_the_network_sees():
  size = _segmenter().engine._size
  assert (size.image((40, 56)), size.array((40, 56))) == ((64, 90), (64, 96))
  wide = _segmenter(options={"scale": "112x80"}).engine._size
  assert (wide.image((40, 56)), wide.array((40, 56))) == ((80, 112), (96, 128))
  half = _segmenter(options={"scale": "0.5"}).engine._size
  assert (half.image((40, 56)), half.array((40, 56))) == ((20, 28), (32, 32))
  coco = _segmenter(
    options={"scale": "1333x800"}, short_side=400, max_size=666, multiple=32
  ).engine._size
  assert coco.image((480, 640)) == (800, 1067)  # the ratio is kept
  assert coco.array((480, 640)) == (800, 1088)  # and the rest padded
  assert size.image((1, 5000)) == (1, 96)


def test_pictures_of_many_sizes_share_programs():
  segment = _segmenter()
  sizes = [(300 + 7 * k, 450 + 2 * k) for k in range(10)]
  results = segment([np.zeros((*size, 3), np.uint8) for size in sizes])
  assert [result.panoptic_map.shape for result in results] == sizes
  # Two network sizes, one width of pictures, and two programs that number what was found.
  assert segment.num_programs <= 6


def test_a_file_that_is_no_picture(tmp_path):
  path = tmp_path / "broken.png"
  path.write_bytes(b"no picture")
  with pytest.raises(UserError, match="cannot be decoded"):
    _segmenter()(path)
