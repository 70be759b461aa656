"""A model inside an NNX program: `flax.nnx.bridge.ToNNX` wraps the Linen module."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import effseg_jax


def test_a_wrapped_model_computes_the_same_and_has_gradients():
  fields = {"widths": (8, 8, 16, 16), "depths": (0, 1, 1, 1), "num_classes": 3}
  model = effseg_jax.create_model("afformer_tiny", **fields)
  images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
  wrapped = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0))
  wrapped = nnx.jit(lambda module, x: module.lazy_init(x, train=False))(wrapped, images)
  variables = {
    "params": nnx.to_pure_dict(nnx.state(wrapped, nnx.Param)),
    "batch_stats": nnx.to_pure_dict(nnx.state(wrapped, nnx.BatchStat)),
  }
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  assert jax.tree.structure(variables) == jax.tree.structure({n: shapes[n] for n in variables})

  def loss(module):
    logits = module(images, train=False)
    return jnp.mean(logits**2), logits

  (_, logits), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(wrapped)
  expected = jax.jit(model.apply, static_argnames="train")(variables, images, train=False)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
  leaves = jax.tree.leaves(gradients)
  assert all(np.isfinite(leaf).all() for leaf in leaves)
  assert any(np.abs(leaf).max() > 0 for leaf in leaves)
