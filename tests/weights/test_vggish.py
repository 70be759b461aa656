"""The names of the official VGGish file; there and back without a changed bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.weights.loading import export_weights, variable_shapes
from effseg_jax.weights.table import official_shape
from effseg_jax.weights.vggish import vggish_rows
from tests import official_weights


@pytest.fixture(scope="module")
def model():
  return create_model("vggish")


def test_official_names_and_shapes(shared, model):
  path = shared / "golden" / "avesformer" / "vggish_net_params.json"
  listed = json.loads(path.read_text())["params"]
  shapes = variable_shapes(model)
  found = {row.name: list(official_shape(shapes[row.path], row.layout)) for row in vggish_rows()}
  assert found == listed
  assert list(found) == list(listed)
  assert {row.path for row in vggish_rows()} == set(shapes)


def test_there_and_back_and_what_does_not_fit(model):
  shapes = variable_shapes(model)
  official = {}
  for row in vggish_rows():
    shape = official_shape(shapes[row.path], row.layout)
    # The large matrices hold what tells rows from columns, and are cheap to make.
    big = np.prod(shape) > 1e6
    official[row.name] = (
      np.broadcast_to(np.arange(shape[-1], dtype=np.float32), shape)
      if big
      else official_weights.tensor(row.name, shape)
    )
  variables = load_weights(model, official)
  exported = export_weights(model, variables)
  assert list(exported) == list(official)
  for name, array in official.items():
    np.testing.assert_array_equal(exported[name], array, err_msg=name)
  first = official["features.0.weight"]
  np.testing.assert_array_equal(variables["params"]["conv_0"]["kernel"][2, 1, 0], first[:, 0, 2, 1])

  del official["features.13.bias"]
  official["embeddings.4.weight"] = np.zeros((64, 4096), np.float32)
  with pytest.raises(UserError, match=r"missing: features\.13\.bias; .*embeddings\.4\.weight has"):
    load_weights(model, official)
