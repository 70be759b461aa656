"""Cross-entropy of upsampled logits without ever holding the upsampled logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.ops.resize import bilinear_matrix, resize_bilinear

# Output rows worked on at a time, at most: 150 classes of a 512 pixels wide strip are 10 MB.
_STRIP_ROWS = 32


def upsampled_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  ignore_label: int = 255,
  class_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Cross-entropy of logits resized (bilinear, corners not aligned) to the labels' size.

  Full-resolution maps of all classes are the largest arrays of a training step by far. Here they
  exist for one strip of rows at a time, in which value and gradient are computed together: the
  loss is a sum over pixels, so its gradient needs nothing from the rest of the image. All of it is
  matrix products and element-wise, per example; a sharded batch stays where it is.

  Args:
    logits: (B, h, w, K) floating.
    labels: int (B, H, W), a class or `ignore_label`.
    ignore_label: pixels of this label count nowhere.
    class_weights: float32 (K,), weight of each class's pixels in the sum; default 1.

  Returns:
    Per example: the weighted sum of negative log-likelihoods, float32 (B,) (differentiable with
    respect to `logits`); the number of pixels whose most likely class is right, int32 (B,); and
    the number of pixels that count, int32 (B,).
  """
  num_classes = logits.shape[-1]
  if class_weights is None:
    class_weights = jnp.ones((num_classes,), jnp.float32)
  return _cross_entropy(logits, labels.astype(jnp.int32), class_weights, ignore_label)


def reference_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  ignore_label: int = 255,
  class_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`upsampled_cross_entropy` as it is defined: resize, then log-softmax."""
  full = resize_bilinear(logits.astype(jnp.float32), labels.shape[1:3])
  counted = labels != ignore_label
  target = jnp.where(counted, labels, 0)
  log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(full), target[..., None], -1)[..., 0]
  weights = counted if class_weights is None else counted * class_weights[target]
  right = counted & (jnp.argmax(full, -1) == labels)
  count = lambda x: jnp.sum(x, (1, 2), dtype=jnp.int32)  # noqa: E731
  return jnp.sum(-log_likelihood * weights, (1, 2)), count(right), count(counted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(
  logits: jax.Array, labels: jax.Array, class_weights: jax.Array, ignore_label: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  return _strips(logits, labels, class_weights, ignore_label, with_gradient=False)[0]


def _forward(logits, labels, class_weights, ignore_label):
  results, gradient = _strips(logits, labels, class_weights, ignore_label, with_gradient=True)
  return results, gradient.astype(logits.dtype)


def _backward(ignore_label, gradient, cotangents):
  del ignore_label
  scale = cotangents[0].astype(gradient.dtype)[:, None, None, None]
  return gradient * scale, None, None


_cross_entropy.defvjp(_forward, _backward)


def _strips(
  logits: jax.Array,
  labels: jax.Array,
  class_weights: jax.Array,
  ignore_label: int,
  *,
  with_gradient: bool,
):
  """Sums over strips of rows; returns the three sums and the gradient of the first, or None."""
  batch, h, w, num_classes = logits.shape
  height, width = labels.shape[1:]
  strips = -(-height // _STRIP_ROWS)
  rows = -(-height // strips)
  row_matrix = np.zeros((strips * rows, h), np.float32)
  row_matrix[:height] = bilinear_matrix(height, h)
  row_matrix = jnp.asarray(row_matrix.reshape(strips, rows, h))
  col_matrix = jnp.asarray(bilinear_matrix(width, w), jnp.float32)
  labels = jnp.pad(
    labels, ((0, 0), (0, strips * rows - height), (0, 0)), constant_values=ignore_label
  )
  labels = labels.reshape(batch, strips, rows, width).swapaxes(0, 1)

  # Classes lead: sums over them are then sums of whole planes.
  planes = logits.astype(jnp.float32).transpose(0, 3, 1, 2)
  class_ids = jnp.arange(num_classes, dtype=jnp.int32)[None, :, None, None]

  def strip(carry, inputs):
    nll_sum, correct, valid, gradient = carry
    to_rows, label = inputs
    narrow = jnp.einsum("rh,bkhw->bkrw", to_rows, planes)
    full = jnp.einsum("bkrw,cw->bkrc", narrow, col_matrix)
    top = jnp.max(full, axis=1)
    exps = jnp.exp(full - top[:, None])
    total = jnp.sum(exps, axis=1)
    counted = label != ignore_label
    target = jnp.where(counted, label, 0)
    chosen = jnp.take_along_axis(full, target[:, None], axis=1)[:, 0]
    weight = jnp.where(counted, class_weights[target], 0.0)
    nll = weight * (jnp.log(total) + top - chosen)
    nll_sum += jnp.sum(nll, (1, 2))
    correct += jnp.sum(counted & (chosen == top), (1, 2), dtype=jnp.int32)
    valid += jnp.sum(counted, (1, 2), dtype=jnp.int32)
    if with_gradient:
      hit = class_ids == target[:, None]
      slope = (exps * (1.0 / total)[:, None] - hit) * weight[:, None]
      narrow_slope = jnp.einsum("bkrc,cw->bkrw", slope, col_matrix)
      gradient += jnp.einsum("rh,bkrw->bkhw", to_rows, narrow_slope)
    return (nll_sum, correct, valid, gradient), None

  zeros = jnp.zeros((batch,), jnp.int32)
  initial = (
    jnp.zeros((batch,), jnp.float32),
    zeros,
    zeros,
    jnp.zeros_like(planes) if with_gradient else None,
  )
  (nll_sum, correct, valid, gradient), _ = jax.lax.scan(strip, initial, (row_matrix, labels))
  if with_gradient:
    gradient = gradient.transpose(0, 2, 3, 1)
  return (nll_sum, correct, valid), gradient
