"""Pictures: sizes, colours, and that they stay legible in odd cases."""

import numpy as np
import pytest

from effseg_jax.pictures import semantic as pictures

PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
CLASSES = ("road", "sky", "a very long name of a class")


@pytest.fixture
def class_map():
  return np.array([[0, 0, 1, 1], [0, 2, 2, 255]])


def test_colours_are_the_palettes_and_void_is_black(class_map):
  picture = pictures.colorize(class_map, PALETTE)
  assert picture.dtype == np.uint8
  assert picture.shape == (2, 4, 3)
  np.testing.assert_array_equal(picture[0, 2], (0, 255, 0))
  np.testing.assert_array_equal(picture[1, 3], (0, 0, 0))


def test_borders_lie_between_classes(class_map):
  borders = pictures.class_borders(class_map)
  expected = [[False, True, True, True], [True, False, True, False]]
  np.testing.assert_array_equal(borders, expected)


def test_overlay_mixes_image_and_colour():
  image = np.full((8, 8, 3), 100, np.uint8)
  result = pictures.overlay(image, np.zeros((8, 8), int), PALETTE, opacity=0.5)
  np.testing.assert_array_equal(result, np.broadcast_to((178, 50, 50), (8, 8, 3)))
  halves = np.repeat([[0, 1]], 8, axis=0).repeat(4, axis=1)
  result = pictures.overlay(image, halves, PALETTE)
  assert result[:, 3].max() < result[:, 2].max()  # the border is dark
  np.testing.assert_array_equal(image, 100)


@pytest.mark.parametrize("ids", [[0], [0, 1, 2], [255]])
def test_legend_names_what_occurs(ids):
  class_map = np.resize(ids, (40, 60))
  picture = np.full((40, 60, 3), 7, np.uint8)
  result = pictures.with_legend(picture, class_map, CLASSES, PALETTE)
  assert result.shape[0] >= 40
  assert result.shape[1] > 60
  np.testing.assert_array_equal(result[:40, :60], 7)
  legend = result[:, 60:].reshape(-1, 3)
  for index, colour in enumerate(PALETTE):
    assert (legend == colour).all(-1).any() == (index in ids)


def test_a_row_per_sample():
  rng = np.random.default_rng(0)
  samples = []
  for size in ((30, 40), (60, 50)):
    label = rng.integers(0, 3, size)
    samples.append((rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), label, label))
  one = pictures.side_by_side(samples[:1], PALETTE, height=30)
  both = pictures.side_by_side(samples, PALETTE, height=30)
  assert one.dtype == np.uint8
  assert one.shape[1] == 3 * 40 + 2 * 8
  assert both.shape[0] == one.shape[0] + 30 + 8
  titles = one.shape[0] - 30 - 8
  panels = one[titles : titles + 30]
  colours = pictures.colorize(samples[0][2], PALETTE)
  np.testing.assert_array_equal(panels[:, 48:88], colours)
  np.testing.assert_array_equal(panels[:, 96:136], colours)


@pytest.mark.parametrize("num_classes", [1, 11, 30, 150])
def test_confusion_picture_of_any_number_of_classes(num_classes):
  counts = np.diag(np.arange(num_classes))  # the first class is absent
  names = [f"class {i}" for i in range(num_classes)]
  picture = pictures.confusion_picture(counts, names)
  assert picture.dtype == np.uint8
  assert max(picture.shape) < 2000
  if num_classes > 1:  # right predictions are dark
    assert picture.reshape(-1, 3).sum(-1).min() < 300
