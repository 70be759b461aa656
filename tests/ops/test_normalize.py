"""Normalisation against its definition, pixel by pixel; the padding is exactly 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize


def test_pictures_are_normalised_and_padding_is_zero():
  images = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
  sizes = np.array([(5, 7), (3, 4), (1, 7), (0, 0)], np.int32)
  found = jax.jit(lambda i, s: normalize(i, s, IMAGENET_MEAN, IMAGENET_STD))(images, sizes)
  assert found.dtype == jnp.float32
  for image, (rows, cols), ours in zip(images, sizes, np.asarray(found), strict=True):
    expected = (image.astype(np.float64) - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(ours[:rows, :cols], expected[:rows, :cols], atol=1e-6)
    assert not ours[rows:].any() and not ours[:, cols:].any()


def test_the_scale_is_that_of_uint8():
  image = np.zeros((1, 1, 2, 3), np.uint8)
  image[0, 0, 1] = 255
  found = normalize(image, np.array([[1, 2]]), IMAGENET_MEAN, IMAGENET_STD)[0, 0]
  np.testing.assert_allclose(found[0], [-2.11790, -2.03571, -1.80444], atol=1e-5)
  np.testing.assert_allclose(found[1], [2.24891, 2.42857, 2.64000], atol=1e-5)
