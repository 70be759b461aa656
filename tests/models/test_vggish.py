"""VGGish against the reference's outputs; the small encoder's contract."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.models.backbones.vggish import SmallAudioEncoder
from effseg_jax.weights.loading import variable_shapes
from effseg_jax.weights.table import official_shape
from effseg_jax.weights.vggish import vggish_rows
from tests import official_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "vggish.npz"


def test_number_of_parameters():
  shapes = variable_shapes(create_model("vggish"))
  assert sum(np.prod(shape) for shape in shapes.values()) == 72_141_184


def test_reference_outputs():
  model = create_model("vggish")
  shapes = variable_shapes(model)
  official = official_weights.tensors(
    {row.name: official_shape(shapes[row.path], row.layout) for row in vggish_rows()}
  )
  variables = load_weights(model, official)

  @jax.jit
  def run(variables, patches):
    kept = lambda module, _: module.name in ("conv_0", "dense_0", "dense_2")  # noqa: E731
    output, state = model.apply(variables, patches, capture_intermediates=kept)
    return output, {name: x["__call__"][0] for name, x in state["intermediates"].items()}

  with np.load(GOLDEN) as golden:
    output, inside = run(variables, golden["log_mel"])
    first = np.moveaxis(np.asarray(inside["conv_0"][0, :, :, :2]), -1, 0)
    np.testing.assert_allclose(first, golden["conv1_pre_relu"], atol=1e-5)
    hidden = np.maximum(inside["dense_0"][:, :256], 0)
    np.testing.assert_allclose(hidden, golden["fc1_first256"], atol=1e-4)
    np.testing.assert_allclose(inside["dense_2"], golden["embedding_pre_relu"], atol=1e-4)
    np.testing.assert_allclose(output, golden["embedding"], atol=1e-4)
    assert output.dtype == jnp.float32


def test_the_small_encoder_hears_pitch():
  patches = np.full((2, 96, 64), np.log(0.01), np.float32)
  patches[0, 40:50, 10], patches[1, 40:50, 50] = 2.0, 2.0
  model = SmallAudioEncoder(widths=(8, 8, 8, 8, 8))
  variables = model.init(jax.random.key(0), patches)
  apply = jax.jit(model.apply)
  low, high = apply(variables, patches)
  assert low.shape == (128,)
  assert np.abs(low - high).max() > 1e-3
  size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(SmallAudioEncoder().init,
    jax.random.key(0), patches)["params"]))  # fmt: skip
  assert size < 1_000_000


@pytest.mark.parametrize("shape", [(96, 64), (1, 64, 96), (1, 1, 96, 64)])
def test_other_shapes_are_refused(shape):
  with pytest.raises(UserError, match=r"expected \(patches, 96, 64\)"):
    create_model("vggish").init(jax.random.key(0), jnp.zeros(shape))
