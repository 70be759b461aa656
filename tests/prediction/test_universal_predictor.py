"""Segmented pictures, by a model that always finds the same two things and a sky."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.prediction import make_predictor
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


def _predictor(scale=None, **inference):
  class_logits = np.full((1, 3, 4), -9.0, np.float32)
  class_logits[0, [0, 1, 2], [0, 1, 1]] = 9.0
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
  options = {} if scale is None else {"scale": scale}
  return make_predictor(Bundle(_Fixed(), {"class_logits": class_logits}, card), **options)


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "street.png"
  Image.fromarray(np.full((40, 56, 3), 90, np.uint8)).save(path)
  return path


def test_writes_everything_the_model_was_evaluated_for(picture, tmp_path):
  predictor = _predictor()
  assert predictor.inputs(tmp_path) == [picture]
  line = predictor(picture, tmp_path / "out")
  assert line.startswith("sky, 2 person  ") and line.endswith(" ms")
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
  "kind, result", [("semantic", "semantic.png"), ("instance", "instances.json")]
)
def test_writes_one_kind_of_result(picture, tmp_path, kind, result):
  kinds = dict.fromkeys(("panoptic", "instance", "semantic"), False)
  line = _predictor(**{**kinds, kind: True})(picture, tmp_path / "out")
  assert {p.name for p in tmp_path.glob("out*")} == {f"out_{result}", "out_overlay.png"}
  assert "person" in line


def test_the_size_that_the_network_sees(picture, tmp_path):
  for scale, shape in ((None, (64, 96)), ("112x80", (96, 128)), ("0.5", (32, 32))):
    predictor = _predictor(scale, panoptic=False, instance=False)
    predictor(picture, tmp_path / "out")
    assert [key[:2] for key in predictor._programs] == [shape]


def test_a_file_that_is_no_picture(tmp_path):
  path = tmp_path / "broken.png"
  path.write_bytes(b"no picture")
  with pytest.raises(UserError, match="cannot be decoded"):
    _predictor()(path, tmp_path / "out")
