"""SSA-Seg: Semantic and Spatial Adaptive Pixel-level Classifier for Semantic Segmentation.

Ma, Ni, Chen, NeurIPS 2024 (arXiv 2405.06525 v2). A classifier whose weights adapt to the image, in
place of the last 1x1 convolution of any network; `create_model("afformer_base", head="ssa")` has it
on AFFormer. It is written from the paper's equations: neither code with a licence nor weights
exist. What the paper leaves open is a field here, or said where it is decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.models.layers import Conv, DepthwiseConv, GroupNorm

Dtype = Any
Arrays = dict[str, Any]

TEACHERS = ("shared", "own")
_EPSILON = 1e-12  # of the sums of weights
_init = nn.initializers.normal(0.02)


class SSAClassifier(nn.Module):
  """The adaptive classifier (section 3).

  Attributes:
    num_classes: K.
    position_residual: add the features to the position encoding, as in the paper that it is from.
    normalise_centres: divide the weights of a semantic centre by their sum over the pixels, which a
      softmax over classes leaves open (equation 3).
    teacher: of the training: "shared": it has this classifier's parameters; "own": its own.
    dtype: of the products with pixels; centres, softmax and logits are float32.
  """

  num_classes: int
  position_residual: bool = False
  normalise_centres: bool = True
  teacher: str = "shared"
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, labels: jax.Array | None = None) -> Arrays:
    """Classifies pixels.

    Args:
      features: S_f (B, H, W, D), what a 1x1 convolution would classify.
      labels: int (B, H, W), a class or another number, which belongs to none; of the teacher.

    Returns:
      `coarse_logits`, of the 1x1 convolution (equation 1), and `logits` (equation 2), float32
      (B, H, W, K); `semantic_prototypes` and `spatial_prototypes` (B, K, D) (equations 4 and 6).
      With labels also what `teach` returns; otherwise `for_teacher`, its first argument.
    """
    dense = nn.Dense(self.num_classes, kernel_init=_init, dtype=self.dtype, name="classify")
    coarse = dense(features).astype(jnp.float32)
    semantics = dense.variables["params"]["kernel"].T
    encoded, parameters = self._parameters(features, semantics, "")
    over_classes = jax.nn.softmax(coarse, axis=-1)
    if self.normalise_centres:
      over_classes /= jnp.sum(over_classes, (1, 2), keepdims=True) + _EPSILON
    over_pixels = jax.nn.softmax(coarse, axis=(1, 2))
    semantic, spatial = prototypes(
      parameters, _centres(over_classes, features), _centres(over_pixels, encoded)
    )
    outputs = {
      "coarse_logits": coarse,
      "logits": _scores(features, encoded, semantic, spatial, self.dtype),
      "semantic_prototypes": semantic,
      "spatial_prototypes": spatial,
    }
    if self.teacher == "own":
      encoded, parameters = self._parameters(features, semantics, "teacher_")
    for_teacher = {"features": features, "encoded": encoded, "parameters": parameters}
    if labels is None:
      return {**outputs, "for_teacher": for_teacher}
    return {**outputs, **teach(for_teacher, labels, self.dtype)}

  def _parameters(
    self, features: jax.Array, semantics: jax.Array, prefix: str
  ) -> tuple[jax.Array, Arrays]:
    """The position encoding P_f of the features, and the parameters of `prototypes`."""
    width = features.shape[-1]
    encoding = DepthwiseConv(use_bias=True, dtype=self.dtype, name=f"{prefix}position")
    encoded = encoding(features)
    if self.position_residual:
      encoded += features
    shape = (self.num_classes, width)
    parameters = {
      "semantics": semantics,
      "basis": self.param(f"{prefix}position_basis", _init, shape, jnp.float32),
      "semantic": Affine(width, name=f"{prefix}semantic")(2 * width),
      "spatial": Affine(width, name=f"{prefix}spatial")(2 * width),
    }
    return encoded, parameters


class Affine(nn.Module):
  """Kernel and bias of a linear layer that is applied elsewhere.

  Attributes:
    features: outputs.
  """

  features: int

  @nn.compact
  def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
    """Kernel (inputs, features) and bias (features,), float32."""
    kernel = self.param("kernel", _init, (inputs, self.features), jnp.float32)
    return kernel, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)


def prototypes(
  parameters: Mapping[str, Any], semantic_centres: jax.Array, spatial_centres: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Centres beside the learned vectors of their classes, mixed (equations 4 and 6).

  Args:
    parameters: of `SSAClassifier`.
    semantic_centres: S_c (..., K, D).
    spatial_centres: P_c, of the same shape.

  Returns:
    Semantic and spatial prototypes, float32 (..., K, D).
  """

  def mixed(centres: jax.Array, learned: jax.Array, layer: tuple[jax.Array, jax.Array]):
    learned = jnp.broadcast_to(learned, centres.shape)
    return jnp.concatenate([centres, learned], axis=-1) @ layer[0] + layer[1]

  semantic = mixed(semantic_centres, parameters["semantics"], parameters["semantic"])
  return semantic, mixed(spatial_centres, parameters["basis"], parameters["spatial"])


def teach(for_teacher: Mapping[str, Any], labels: jax.Array, dtype: Dtype = jnp.float32) -> Arrays:
  """The same classifier with the labels in place of the coarse logits (section 3.3).

  A class's centres are the means of its pixels; a class that is absent has zeros.

  Args:
    for_teacher: of `SSAClassifier`.
    labels: int (B, H, W) at the features' resolution.
    dtype: of the products with pixels.

  Returns:
    `teacher_logits` (B, H, W, K), `teacher_semantic_prototypes` and `teacher_spatial_prototypes`
    (B, K, D), and `batch_semantic_prototypes` (K, D), of means over the whole batch's pixels.
  """
  features, encoded, parameters = (for_teacher[k] for k in ("features", "encoded", "parameters"))
  members = jax.nn.one_hot(labels, parameters["basis"].shape[0], dtype=jnp.float32)
  sizes = jnp.sum(members, (1, 2), keepdims=True)
  weights = members / jnp.maximum(sizes, 1.0)
  semantic_centres = _centres(weights, features)
  semantic, spatial = prototypes(parameters, semantic_centres, _centres(weights, encoded))
  shares = (sizes / jnp.maximum(jnp.sum(sizes, 0), 1.0))[:, 0, 0, :, None]
  of_batch = jnp.sum(semantic_centres * shares, 0)
  return {
    "teacher_logits": _scores(features, encoded, semantic, spatial, dtype),
    "teacher_semantic_prototypes": semantic,
    "teacher_spatial_prototypes": spatial,
    "batch_semantic_prototypes": prototypes(parameters, of_batch, of_batch)[0],
  }


def _centres(weights: jax.Array, features: jax.Array) -> jax.Array:
  """Weighted sums of pixels: weights (B, H, W, K), features (B, H, W, D) -> float32 (B, K, D)."""
  return jnp.einsum("bhwk,bhwd->bkd", weights, features.astype(jnp.float32))


def _scores(
  features: jax.Array, encoded: jax.Array, semantic: jax.Array, spatial: jax.Array, dtype: Dtype
) -> jax.Array:
  """Logits of every pixel (equation 2), float32 (B, H, W, K)."""
  pixels, classes = (features + encoded).astype(dtype), (semantic + spatial).astype(dtype)
  return jnp.einsum("bhwd,bkd->bhwk", pixels, classes).astype(jnp.float32)


class SSAHead(nn.Module):
  """AFFormer's head with this classifier.

  Attributes:
    num_classes: output channels.
    dropout: rate at which whole channels are dropped before the classifier.
    teacher: see `SSAClassifier`.
    dtype: of the computation.
  """

  num_classes: int
  dropout: float = 0.1
  teacher: str = "shared"
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Any:
    """(B, h, w, C) -> logits float32 (B, h, w, num_classes); in training, the classifier's outputs.

    The latter are what the task "semantic_ssa" takes.
    """
    x = Conv(256, dtype=self.dtype, name="squeeze")(x)
    x = nn.relu(GroupNorm(self.dtype, name="norm")(x))
    x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
    classifier = SSAClassifier(
      self.num_classes, teacher=self.teacher, dtype=self.dtype, name="classifier"
    )
    outputs = classifier(x)
    return outputs if train else outputs["logits"]
