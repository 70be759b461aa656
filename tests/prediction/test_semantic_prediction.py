"""Semantic prediction: what evaluation does, with few programs, whatever the pictures' sizes."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from semantic_bundle import CLASSES, EVALUATION, PALETTE, make_bundle, picture

import effseg_jax
from effseg_jax.errors import UserError
from effseg_jax.evaluators.semantic import SemanticEvaluator
from effseg_jax.input_pipeline.datasets import open_dataset
from effseg_jax.input_pipeline.eval_batches import SizeRule
from effseg_jax.input_pipeline.eval_semantic import semantic_eval_batches
from effseg_jax.prediction import make_segmenter
from effseg_jax.prediction.sizes import SemanticSize, parse_scale
from effseg_jax.tasks.semantic import SemanticTask


@pytest.fixture(scope="module")
def segment():
  return make_segmenter(make_bundle())


def evaluated(root, bundle, inference):
  """The class maps of an evaluation of the folder, by name."""
  dataset = open_dataset("folder", root=root, split="val")
  task = SemanticTask(CLASSES, PALETTE)
  evaluator = SemanticEvaluator(bundle.model, task, dataset, inference)
  step = jax.jit(evaluator.step)
  for batch in semantic_eval_batches(dataset, inference, batch_size=2):
    totals, examples = step(bundle.variables, batch)
    evaluator.update(batch, np.asarray(totals), np.asarray(examples))
  evaluator.result().write_predictions(root / "predictions")
  return {
    path.relative_to(root / "predictions").as_posix(): np.asarray(Image.open(path))
    for path in (root / "predictions").rglob("*_classes.png")
  }


def write_folder(root, sizes):
  for k, size in enumerate(sizes):
    for kind, name in (("images", f"{k}.png"), ("labels", f"{k}.png")):
      path = root / kind / "val" / ("b" if k % 2 else "a") / name
      path.parent.mkdir(parents=True, exist_ok=True)
      array = picture(*size, k) if kind == "images" else np.zeros(size, np.uint8)
      Image.fromarray(array).save(path)
  (root / "classes.txt").write_text("\n".join(CLASSES))


@pytest.mark.parametrize(
  "inference, exact, sizes",
  [
    ({}, False, [(72, 96), (60, 96), (150, 200)]),
    ({"mode": "slide"}, False, [(72, 96), (150, 200)]),
    ({"scales": (0.75, 1.25), "flip": True}, False, [(72, 96)]),
    ({"multiple": 1}, True, [(71, 93), (60, 97)]),
  ],
)
def test_equals_the_evaluation_to_the_pixel(tmp_path, inference, exact, sizes):
  write_folder(tmp_path, sizes)
  bundle = make_bundle(**inference)
  expected = evaluated(tmp_path, bundle, EVALUATION | inference)
  segment = make_segmenter(bundle, exact_size=exact)
  assert len(expected) == len(sizes)
  for name, class_map in expected.items():
    (image,) = (tmp_path / "images" / "val").rglob(Path(name).name.replace("_classes", ""))
    found = segment(image).class_map
    np.testing.assert_array_equal(found, class_map)
    assert len(np.unique(found)) > 1


def test_the_ways_of_evaluating_differ():
  image = picture(90, 120)
  ways = ({}, {"mode": "slide"}, {"scales": (0.75,)}, {"flip": True})
  maps = [make_segmenter(make_bundle(**way))(image).class_map for way in ways]
  for other in maps[1:]:
    assert (maps[0] != other).any()


def test_pictures_of_many_sizes_share_programs():
  sizes = [(100 + 5 * k, 150 + 7 * k) for k in range(12)]
  segment = make_segmenter(make_bundle(scale=(360, 270), multiple=1))
  results = segment([picture(*size) for size in sizes])
  assert [result.class_map.shape for result in results] == sizes
  assert segment.num_programs == 2  # one network size, one reader
  segment([picture(120, 160 + k) for k in range(6)])
  assert segment.num_programs == 4


def test_the_number_of_programs_kept_is_limited():
  segment = make_segmenter(make_bundle(scale=(0, 0)))
  segment.engine.programs._limit = 3
  for side in (32, 64, 96, 128):
    segment(picture(side, side))
  assert len(segment.engine.programs._kept) == 3 and segment.num_programs == 8


def test_large_pictures_are_read_in_tiles(segment, monkeypatch):
  image = picture(300, 1100)
  whole = segment(image).class_map
  monkeypatch.setattr("effseg_jax.prediction.tiles._TILES", ((32, 64), (32, 64)))
  np.testing.assert_array_equal(segment(image).class_map, whole)


def test_batches_do_not_change_results():
  images = [picture(72 + k, 96, k) for k in range(5)] + [picture(96, 72)]
  alone = make_segmenter(make_bundle())
  together = make_segmenter(make_bundle(), batch_size=2)
  results = together(images)
  for image, result in zip(images, results, strict=True):
    np.testing.assert_array_equal(result.class_map, alone(image).class_map)
    np.testing.assert_array_equal(result.image, image)


def test_map_serves_an_endless_iterator_in_order(segment):
  read = []

  def pictures():
    for k in range(1000):
      read.append(k)
      yield picture(40, 50 + k % 3, k)

  served = segment.map(pictures(), batch_size=4)
  for k in range(6):
    np.testing.assert_array_equal(next(served).image, picture(40, 50 + k % 3, k))
  assert len(read) < 40


def test_arrays_pillow_images_and_paths(segment, tmp_path):
  image = picture(40, 56)
  expected = segment(image).class_map
  path = tmp_path / "a.png"
  Image.fromarray(image).save(path)
  for kind in (Image.fromarray(image), path, str(path)):
    np.testing.assert_array_equal(segment(kind).class_map, expected)
  grey = image[..., 0]
  for kind in (grey, grey[..., None], Image.fromarray(grey)):
    np.testing.assert_array_equal(segment(kind).image, np.stack([grey] * 3, axis=-1))
  turned = Image.fromarray(image)
  turned.getexif()[0x112] = 6
  np.testing.assert_array_equal(segment(turned).image, np.rot90(image, -1))
  clear = np.dstack([image, np.zeros(image.shape[:2], np.uint8)])
  for kind in (clear, Image.fromarray(clear)):
    assert (segment(kind).image == 255).all()


@pytest.mark.parametrize(
  "wrong, message",
  [
    (np.zeros((8, 8, 3)), r"float64 \(8, 8, 3\); expected uint8 RGB"),
    (np.zeros((3, 8, 8), np.uint8), "expected channels last"),
    (np.zeros((0, 8, 3), np.uint8), "expected uint8 RGB"),
    ("missing.jpg", "missing.jpg is missing"),
    (Image.new("I;16", (4, 4)), "mode I;16; expected 8 bits"),
  ],
)
def test_what_is_no_picture_ends_in_one_line(segment, wrong, message):
  with pytest.raises(UserError, match=message):
    segment(wrong)
  with pytest.raises(UserError, match=message):
    segment([picture(40, 40), wrong])


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (31, 33), (700, 2)])
def test_small_and_thin_pictures(segment, size):
  assert segment(picture(*size)).class_map.shape == size
  assert (
    make_segmenter(make_bundle(multiple=1), exact_size=True)(picture(*size)).class_map.shape == size
  )


def test_a_result_says_what_it_holds(segment, tmp_path):
  result = segment(picture(40, 56))
  assert isinstance(result, effseg_jax.SemanticResult)
  assert result.classes == CLASSES and result.class_map.dtype == np.uint8
  shares = result.shares()
  assert sum(shares.values()) == pytest.approx(1.0)
  assert list(shares.values()) == sorted(shares.values(), reverse=True)
  name = next(iter(shares))
  assert shares[name] == (result.class_map == CLASSES.index(name)).mean()
  assert result.overlay(legend=False).shape == (40, 56, 3)
  assert result.overlay().shape[1] > 56
  paths = result.save(tmp_path / "new" / "street.v1")
  assert [path.name for path in paths] == ["street.v1_classes.png", "street.v1_overlay.png"]
  with Image.open(paths[0]) as saved:
    assert saved.mode == "P" and tuple(saved.getpalette()[:9]) == sum(PALETTE, ())
    np.testing.assert_array_equal(np.asarray(saved), result.class_map)
  assert {path.name for path in paths[0].parent.iterdir()} == {path.name for path in paths}


def test_sizes():
  rule = SizeRule((720, 540), 1)
  assert SemanticSize(rule)((360, 480)) == (540, 720)  # fills the frame: as it is
  assert SemanticSize(rule)((345, 503)) == (480, 720)
  assert SemanticSize(rule, exact=True)((345, 503)) == (494, 720)
  assert SemanticSize(SizeRule((0, 0), 32))((33, 64)) == (64, 64)
  assert SemanticSize(SizeRule((0, 0), 1))((100, 20)) == (96, 32)
  assert SemanticSize(rule, parse_scale("1.5"), exact=True)((100, 200)) == (150, 300)
  assert SemanticSize(rule, parse_scale((200, 100)), exact=True)((100, 150)) == (100, 150)
  for wrong in ("big", "0x5", "720", "-1", "9"):
    with pytest.raises(UserError, match="expected WIDTHxHEIGHT such as 720x540, or a factor"):
      parse_scale(wrong)


def test_unknown_options(segment):
  with pytest.raises(UserError, match="score_threshold means nothing to this model"):
    segment(picture(8, 8), score_threshold=0.5)
  with pytest.raises(UserError, match="--score_threshold means nothing to a checkpoint for sem"):
    make_segmenter(make_bundle(), score_threshold=0.5)
