"""Pictures of segments."""

import numpy as np

from effseg_jax.pictures import universal as pictures_universal

PALETTE = [(10, 20, 30), (200, 100, 0), (0, 250, 120)]
THINGS = (False, True, True)


def test_things_of_one_class_have_colours_of_their_own():
  colours = pictures_universal.segment_colours([0, 1, 1, 0, 1, 2], THINGS, PALETTE)
  assert colours.dtype == np.uint8
  assert colours[0].tolist() == colours[3].tolist() == [10, 20, 30]  # stuff is one segment
  assert colours[1].tolist() == [200, 100, 0] and colours[5].tolist() == [0, 250, 120]
  assert len({tuple(colour) for colour in colours[[1, 2, 4]]}) == 3
  again = pictures_universal.segment_colours([0, 1, 1, 0, 1, 2], THINGS, PALETTE)
  np.testing.assert_array_equal(colours, again)


def test_segments_are_tinted_at_the_size_of_the_map():
  segment_map = np.full((20, 30), -1, np.int16)
  segment_map[:, 15:] = 0
  image = np.full((10, 15, 3), 100, np.uint8)
  painted = pictures_universal.paint_segments(image, segment_map, np.array([[200, 0, 100]]), 0.5)
  assert painted.shape == (20, 30, 3)
  assert painted[10, 20].tolist() == [150, 50, 100]
  assert painted[10, 5].tolist() == [50, 50, 50]  # what no segment covers is darkened
  assert painted[10, 14].sum() < painted[10, 5].sum()  # and the border more so


def test_names_are_written_inside_their_segments():
  segment_map = np.zeros((80, 200), np.int16)
  segment_map[:, 120:] = 1
  picture = np.zeros((80, 200, 3), np.uint8)
  named = pictures_universal.write_names(picture, segment_map, ["", "car 0.97", "not there"])
  assert named.shape == picture.shape and not picture.any()
  assert named[:, 120:].any() and not named[:, :110].any()


def test_the_first_mask_lies_on_top():
  masks = np.zeros((2, 4, 4), bool)
  masks[0, :2], masks[1, 1:3] = True, True
  stacked = pictures_universal.stack_masks(masks)
  assert stacked[:, 0].tolist() == [0, 0, 1, -1]
  assert (pictures_universal.stack_masks(masks[:0]) == -1).all()


def test_rows_of_pictures_of_different_sizes():
  rows = [[np.full((h, w, 3), 9, np.uint8)] * 3 for h, w in ((40, 60), (60, 40))]
  sheet = pictures_universal.stack_rows(rows, height=60)
  assert sheet.shape == (30 + 2 * 60 + 8, 3 * 90 + 2 * 8, 3)
