"""EfficientNet-Lite: the published sizes, and its PyTorch port's features with the same weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import create_model, load_weights
from effseg_jax.models.backbones.efficientnet_lite import EFFICIENTNET_LITE, EfficientNetLite
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD
from effseg_jax.weights import efficientnet_lite
from effseg_jax.weights.loading import variable_shapes
from effseg_jax.weights.table import official_shape
from tests import official_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "efficientnet_lite.npz"
CLASSIFIER_WIDTH = 1280


@pytest.mark.parametrize(
  ("name", "parameters"),
  [
    ("efficientnet_lite0", 4_652_008),
    ("efficientnet_lite1", 5_416_680),
    ("efficientnet_lite2", 6_092_072),
    ("efficientnet_lite3", 8_197_096),
    ("efficientnet_lite4", 13_006_568),
  ],
)
def test_sizes(name, parameters):
  model = EfficientNetLite(**EFFICIENTNET_LITE[name])
  outputs, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), jnp.zeros((1, 70, 33, 3))
  )
  last = outputs["res5"].shape[-1]
  assert [outputs[f"res{level}"].shape[1:3] for level in (2, 3, 4, 5)] == [
    (18, 9),
    (9, 5),
    (5, 3),
    (3, 2),
  ]
  own = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  classifier = (last + 2) * CLASSIFIER_WIDTH + 1000 * (CLASSIFIER_WIDTH + 1)
  assert own + classifier == parameters


@pytest.fixture(scope="module")
def official():
  """Names of the PyTorch port -> tensors, convolutions large enough to reach ReLU6's bound."""
  model = create_model("avesformer_lite", backbone="efficientnet_lite0")
  shapes = variable_shapes(model)
  tensors = {}
  for row in efficientnet_lite.rows(EfficientNetLite()):
    if row.path:
      tensor = official_weights.tensor(row.name, official_shape(shapes[row.path], row.layout))
      tensors[row.name.removeprefix("backbone.")] = tensor * (1.5 if tensor.ndim == 4 else 1)
  return tensors


def test_features_of_the_pytorch_port(official):
  # A classifier's file: its end is not ours, nor are counters of batches.
  official = official | {
    "_conv_head.weight": np.zeros((1280, 320, 1, 1)),
    "_bn1.weight": np.zeros(1280),
    "_fc.bias": np.zeros(1000),
    "_bn0.num_batches_tracked": np.zeros((), np.int64),
  }
  model = create_model("avesformer_lite", backbone="efficientnet_lite0")
  variables = load_weights(model, official, partial="backbone")
  variables = {collection: tree["backbone"] for collection, tree in variables.items()}
  with np.load(GOLDEN) as golden:
    image = (golden["image"] - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    features = jax.jit(EfficientNetLite().apply)(variables, image)
    for name, found in features.items():
      expected = golden[name]
      scale = np.abs(expected).max()
      np.testing.assert_allclose(found, expected, atol=2e-5 * scale, err_msg=name)
