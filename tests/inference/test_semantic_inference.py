"""Inference: the official order of resizes, windows, views, and sizes that are data."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effseg_jax.inference import semantic as inference
from effseg_jax.inference.semantic import Inference
from effseg_jax.ops.resize import resize_bicubic, resize_bilinear

CLASSES = 3
KERNEL = np.random.default_rng(5).standard_normal((8, 8, 3, CLASSES)).astype(np.float32)


def forward(images):
  """Stands for a model: patches of 8x8 and nothing global, zeros beyond the border."""
  rows, cols = (-(-n // 8) for n in images.shape[1:3])
  below, right = rows * 8 - images.shape[1], cols * 8 - images.shape[2]
  images = jnp.pad(images, ((0, 0), (0, below), (0, right), (0, 0)))
  patches = images.reshape(images.shape[0], rows, 8, cols, 8, 3)
  return jnp.einsum("brycxi,yxik->brck", patches, KERNEL)


def resize_reference(x, size):
  """Bilinear resize of (h, w, K) with half-pixel centres, pixel by pixel in float64."""
  result = np.zeros((*size, x.shape[-1]))
  position = [
    np.clip((np.arange(n) + 0.5) * (m / n) - 0.5, 0, m - 1)
    for n, m in zip(size, x.shape[:2], strict=True)
  ]
  for i, y in enumerate(position[0]):
    for j, z in enumerate(position[1]):
      a, b = int(y), int(z)
      c, d = min(a + 1, x.shape[0] - 1), min(b + 1, x.shape[1] - 1)
      top = x[a, b] * (1 - (z - b)) + x[a, d] * (z - b)
      low = x[c, b] * (1 - (z - b)) + x[c, d] * (z - b)
      result[i, j] = top * (1 - (y - a)) + low * (y - a)
  return result


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).standard_normal((2, 40, 56, 3)).astype(np.float32)


def scores(images, size, shape, options):
  run = jax.jit(lambda x, s: inference.class_scores(forward, x, s, shape, options))
  return np.asarray(run(images, np.asarray(size, np.int32)))


def test_one_view_is_resized_twice(images):
  sizes, shape = [(30, 44), (25, 60)], (32, 64)
  result = scores(images, sizes, shape, Inference())
  logits = np.asarray(forward(images))
  for found, coarse, (rows, cols) in zip(result, logits, sizes, strict=True):
    expected = resize_reference(resize_reference(coarse, (40, 56)), (rows, cols))
    np.testing.assert_allclose(found[:rows, :cols], expected, rtol=1e-4, atol=1e-4)


def test_views_give_their_mean_softmax(images):
  size = (40, 56)
  result = scores(images[:1], [size], size, Inference(scales=(1.0, 1.5), flip=True))
  views = []
  for scale in (1.0, 1.5):
    image = resize_reference(images[0], tuple(round(n * scale) for n in size)).astype(np.float32)
    for step in (1, -1):
      logits = np.asarray(forward(image[None, :, ::step]))[0]
      whole = resize_reference(logits, image.shape[:2])[:, ::step]
      views.append(softmax(resize_reference(whole, size)))
  np.testing.assert_allclose(result[0], np.mean(views, axis=0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(result.sum(-1), 1.0, rtol=1e-5)


def test_a_mirrored_image_gets_the_mirrored_map(images):
  size = images.shape[1:3]
  options = Inference(flip=True)
  plain = scores(images, [size] * 2, size, options)
  mirrored = scores(images[:, :, ::-1], [size] * 2, size, options)
  np.testing.assert_allclose(mirrored[:, :, ::-1], plain, rtol=1e-5, atol=1e-6)


def test_a_window_that_covers_all_is_the_whole(images):
  whole = inference.full_logits(forward, images, Inference())
  for crop in ((40, 56), (64, 512)):
    slid = inference.full_logits(forward, images, Inference(mode="slide", crop=crop))
    np.testing.assert_allclose(slid, whole, rtol=1e-6, atol=1e-6)


def test_windows_are_averaged_where_they_overlap(images):
  options = Inference(mode="slide", crop=(32, 32), stride=(16, 20))
  result = np.asarray(inference.full_logits(forward, images, options))
  total, count = np.zeros((40, 56, CLASSES)), np.zeros((40, 56, 1))
  for top in (0, 8):  # 16 would leave the image: moved back to 40 - 32
    for left in (0, 20, 24):
      window = slice(top, top + 32), slice(left, left + 32)
      logits = np.asarray(forward(images[:1][(slice(None), *window)]))[0]
      total[window] += resize_reference(logits, (32, 32))
      count[window] += 1
  np.testing.assert_allclose(result[0], total / count, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 300), st.integers(1, 300))
def test_windows_cover_everything_and_stay_inside(length, crop, stride):
  crop = min(crop, length)
  stride = min(stride, crop)
  starts = inference._window_starts(length, crop, stride)
  assert starts[0] == 0
  assert starts[-1] == length - crop
  assert all(0 < b - a <= stride for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("size", [(16, 24), (31, 17), (5, 7), (1, 24)])
def test_a_size_that_is_data_gives_the_static_resize(size):
  logits = np.random.default_rng(1).standard_normal((2, 16, 24, 4)).astype(np.float32)
  sizes = np.array([size, (16, 24)], np.int32)
  dynamic = jax.jit(inference.resize_to_labels, static_argnums=2)(logits, sizes, (32, 24))
  static = resize_bilinear(logits[:1], size)
  np.testing.assert_allclose(dynamic[:1, : size[0], : size[1]], static, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dynamic[1, :16], logits[1], atol=1e-6)


def test_equal_sizes_change_nothing():
  logits = np.random.default_rng(1).standard_normal((2, 16, 24, 4)).astype(np.float32)
  resize = jax.jit(inference.resize_to_labels, static_argnums=2)
  same = resize(logits, np.array([(16, 24)] * 2, np.int32), (16, 24))
  np.testing.assert_array_equal(same, logits)
  other = resize(logits, np.array([(16, 24), (8, 12)], np.int32), (16, 24))
  half = resize_bilinear(logits[1:], (8, 12))
  np.testing.assert_allclose(other[1:, :8, :12], half, rtol=1e-4, atol=1e-4)


def test_class_map_is_the_largest_score(images):
  size = images.shape[1:3]
  options = Inference(scales=(0.75, 1.0))
  sizes = np.array([size] * 2, np.int32)
  found = inference.class_map(forward, images, sizes, size, options)
  assert found.dtype == jnp.int32
  expected = scores(images, sizes, size, options).argmax(-1)
  assert (np.asarray(found) == expected).mean() > 0.999


def test_views_are_never_smaller_than_the_network_takes():
  seen = []

  def record(x):
    seen.append(x.shape[1:3])
    return forward(x)

  options = dataclasses.replace(Inference(), scales=(0.5, 1.0))
  jax.eval_shape(
    lambda x, s: inference.class_scores(record, x, s, (40, 56), options),
    jax.ShapeDtypeStruct((1, 40, 56, 3), jnp.float32),
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
  )
  assert seen == [(32, 32), (40, 56)]


def test_bicubic_logits_are_resized_once(images):
  options = Inference(interpolation="bicubic")
  found = scores(images, [(33, 50), (48, 64)], (48, 64), options)
  logits = forward(images)
  for row, (rows, cols) in enumerate([(33, 50), (48, 64)]):
    expected = resize_bicubic(logits[row : row + 1], (rows, cols))[0]
    np.testing.assert_allclose(found[row, :rows, :cols], expected, rtol=1e-4, atol=1e-4)
