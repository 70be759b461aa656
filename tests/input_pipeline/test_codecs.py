"""A picture's size in its header is the size it decodes to, however the camera was held."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from effseg_jax.input_pipeline import codecs

ORIENTATION = 0x0112
ROWS, COLS = 12, 20


def picture():
  """Bright in its first quarter of rows and columns, dark elsewhere."""
  pixels = np.full((ROWS, COLS, 3), 20, np.uint8)
  pixels[:6, :10] = 220
  return pixels


def write(path, orientation=None, exif=None):
  if exif is None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
  Image.fromarray(picture()).save(path, exif=exif)
  return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_has_the_decoded_size(tmp_path, suffix, orientation):
  path = write(tmp_path / f"a{suffix}", orientation)
  turned = orientation >= 5
  assert codecs.read_image(path).shape == ((COLS, ROWS, 3) if turned else (ROWS, COLS, 3))
  assert codecs.image_size(path) == ((COLS, ROWS) if turned else (ROWS, COLS))


@pytest.mark.parametrize(
  ("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))]
)
def test_photographs_are_turned_upright(tmp_path, orientation, corner):
  image = codecs.read_image(write(tmp_path / "a.png", orientation))
  assert image[corner].tolist() == [220] * 3
  assert (image == 220).all(-1).sum() == 60


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\x08\0", b"no TIFF header at all"])
def test_a_broken_orientation_is_none(tmp_path, exif):
  path = write(tmp_path / "a.jpg", exif=exif)
  assert codecs.image_size(path) == codecs.read_image(path).shape[:2] == (ROWS, COLS)


def test_a_size_needs_the_header_alone(tmp_path):
  path = write(tmp_path / "a.png", 6)
  content = path.read_bytes()
  path.write_bytes(content[: content.index(b"IDAT") + 8])
  assert codecs.image_size(path) == (COLS, ROWS)


def test_labels_keep_their_values(tmp_path):
  label = np.arange(ROWS * COLS, dtype=np.uint8).reshape(ROWS, COLS)
  indexed = Image.fromarray(label)
  indexed.putpalette(bytes(range(256)) * 3)
  indexed.save(tmp_path / "a.png")
  np.testing.assert_array_equal(codecs.read_label(tmp_path / "a.png"), label)
