"""A picture's size in its header is the size it decodes to, however the camera was held."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from effseg_jax import errors
from effseg_jax.errors import UserError
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


def grey_png(path, array, bits):
  """A grey PNG of 1, 2, 4 or 8 bits a pixel, as optipng and ImageMagick write it."""
  rows = b"".join(
    b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()
    for row in np.asarray(array, np.uint8)
  )
  chunk = lambda kind, body: (  # noqa: E731
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
  )
  head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, 0, 0, 0, 0)
  path.write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", head)
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )
  return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_labels_of_few_bits_keep_their_values(tmp_path, bits):
  label = np.random.default_rng(bits).integers(0, 1 << bits, (5, 7))
  found = codecs.read_label(grey_png(tmp_path / "a.png", label, bits))
  np.testing.assert_array_equal(found, label)
  assert found.dtype == np.uint8


@pytest.mark.parametrize(
  ("suffix", "mode"),
  [
    *((suffix, mode) for suffix in ("png", "tif") for mode in ("1", "L", "P", "I;16", "RGB")),
    *(("bmp", mode) for mode in ("1", "L", "P", "RGB")),
    ("gif", "P"),
  ],
)
def test_labels_of_every_form(tmp_path, suffix, mode):
  label = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
  if mode == "1":
    picture = Image.fromarray(label.astype(bool))
  elif mode == "I;16":
    label = label.astype(np.uint16) * 300
    picture = Image.fromarray(label)
  else:
    picture = Image.fromarray(label)
    if mode == "P":
      picture.putpalette(bytes([9, 9, 9, 200, 10, 20]))
    if mode == "RGB":
      picture = picture.convert("RGB")
  picture.save(tmp_path / f"a.{suffix}")
  found = codecs.read_label(tmp_path / f"a.{suffix}")
  np.testing.assert_array_equal(found, label)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_white_may_be_zero(tmp_path, mode):
  """TIFFs of fax machines and scanners; the stored values count, and not what is shown."""
  label = np.array([[0, 1, 1, 0, 1, 0, 0, 1]], np.uint8)
  shown = Image.fromarray(label.astype(bool)) if mode == "1" else Image.fromarray(255 - label)
  shown.save(tmp_path / "a.tif")
  content = bytearray((tmp_path / "a.tif").read_bytes())
  at = content.index(struct.pack("<HHI", 262, 3, 1))  # PhotometricInterpretation: black is zero
  content[at + 8 : at + 10] = b"\0\0"  # white is zero
  (tmp_path / "a.tif").write_bytes(content)
  expected = label if mode == "1" else 255 - label
  np.testing.assert_array_equal(codecs.read_label(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.png", b"", "is empty"),
    ("a.png", b"<!DOCTYPE html><html>", "is a web page"),
    ("a.jpg", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ("a.heic", b"\0\0\0\x18ftypheic", "pip install pillow-heif"),
    ("a.png", b"\x89PNG\r\n\x1a\n", "truncated"),
  ],
)
def test_what_is_no_picture_is_one_line(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    codecs.read_image(tmp_path / name)
  with pytest.raises(UserError):
    codecs.read_label(tmp_path / name)
  with pytest.raises(UserError):
    codecs.image_size(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_truncated_pictures_are_refused(tmp_path, suffix, share):
  path = tmp_path / f"a.{suffix}"
  noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  preview = Image.Exif()  # its own end marker is not that of the picture
  preview[0x927C] = b"\xff\xd8 a preview \xff\xd9"
  Image.fromarray(noise).save(path, exif=preview)
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])
  with pytest.raises(UserError, match="truncated"):
    codecs.read_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_whatever_lies_below(tmp_path, mode):
  seen = []
  for below in (0, 200):
    rgba = np.full((4, 6, 4), below, np.uint8)
    rgba[..., 3] = 0
    rgba[0, 0] = (10, 10, 10, 255)
    picture = Image.fromarray(rgba).convert(mode)
    picture.save(tmp_path / "a.png")
    seen.append(codecs.read_image(tmp_path / "a.png"))
  np.testing.assert_array_equal(*seen)
  assert seen[0][0, 0].tolist() == [10, 10, 10] and seen[0][3, 3].tolist() == [255] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_transparent_pictures_are_turned_alike(tmp_path, orientation):
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  opaque = Image.fromarray(picture())
  opaque.save(tmp_path / "a.png", exif=exif)
  opaque.convert("RGBA").save(tmp_path / "b.png", exif=exif)
  np.testing.assert_array_equal(
    codecs.read_image(tmp_path / "a.png"), codecs.read_image(tmp_path / "b.png")
  )


def test_too_many_megapixels_are_one_line(tmp_path, monkeypatch):
  write(tmp_path / "a.png", 1)
  monkeypatch.setattr(codecs, "MAX_PIXELS", ROWS * COLS - 1)
  for read in (codecs.read_image, codecs.read_label, codecs.image_size):
    with pytest.raises(UserError, match="megapixels; expected 0 at most"):
      read(tmp_path / "a.png")


def test_a_stack_of_pages_is_no_picture_but_overviews_are(tmp_path):
  page = Image.fromarray(picture())
  page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
  with pytest.raises(UserError, match="stack of 3 pages"):
    codecs.read_image(tmp_path / "a.tif")
  small = page.resize((COLS // 2, ROWS // 2))
  page.save(tmp_path / "b.tif", save_all=True, append_images=[small])
  assert codecs.read_image(tmp_path / "b.tif").shape == (ROWS, COLS, 3)


def test_dark_16_bit_pictures_are_reported_once(tmp_path, monkeypatch):
  monkeypatch.setattr(errors, "_warned", set())
  Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "a.png")
  with pytest.warns(errors.DataWarning, match="4095 of 65535 levels") as warned:
    assert codecs.read_image(tmp_path / "a.png").max() == 15
    codecs.read_image(tmp_path / "a.png")
  assert len(warned) == 1


def test_hidden_files_are_no_data_and_links_are_followed(tmp_path):
  for name in ("b/1.JPG", "b/._1.jpg", "__MACOSX/2.jpg", ".cache/3.jpg", "4.tif", "notes.txt"):
    (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "data" / name).touch()
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "5.png").touch()
  (tmp_path / "data" / "site").symlink_to(tmp_path / "other")
  (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
  found = codecs.list_pictures(tmp_path / "data", recursive=True)
  assert [str(path.relative_to(tmp_path / "data")) for path in found] == [
    *("4.tif", "b/1.JPG", "site/5.png")
  ]
  assert [path.name for path in codecs.list_pictures(tmp_path / "data")] == ["4.tif"]
