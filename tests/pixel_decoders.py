"""Pixel decoders for tests: inputs and outputs, and variables made from official names."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from effseg_jax.weights import table
from effseg_jax.weights.pixel_decoder import rows
from tests import official_weights

RES = ("res2", "res3", "res4", "res5")


def nhwc(x: np.ndarray) -> jax.Array:
  """(B, C, H, W) -> (B, H, W, C)."""
  return jnp.asarray(np.transpose(x, (0, 2, 3, 1)))


def features(arrays: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, jax.Array]:
  """The backbone features among a file's arrays."""
  return {name: nhwc(arrays[prefix + name]) for name in RES}


def random_features(
  size: tuple[int, int], channels: Iterable[int] = (8, 16, 16, 8), batch: int = 1
) -> dict[str, jax.Array]:
  """Normal features of an image of a size."""
  rng = np.random.default_rng(0)
  grids = [tuple(-(-n // stride) for n in size) for stride in (4, 8, 16, 32)]
  return {
    name: jnp.asarray(rng.standard_normal((batch, *grid, width)), jnp.float32)
    for name, grid, width in zip(RES, grids, channels, strict=True)
  }


def shapes(decoder: nn.Module, inputs: Mapping[str, jax.Array]) -> dict[str, tuple[int, ...]]:
  """Path of a parameter, without the collection -> shape."""
  tree = jax.eval_shape(lambda x: decoder.init(jax.random.key(0), x, train=False), inputs)
  return {path: x.shape for path, x in flatten_dict(tree["params"], sep="/").items()}


def random_variables(decoder: nn.Module, inputs: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Small normal parameters, norms' scales around 1; nothing is compiled."""
  rng = np.random.default_rng(1)
  params = {}
  for path, shape in shapes(decoder, inputs).items():
    z = rng.standard_normal(shape).astype(np.float32)
    fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 100
    params[path] = z / np.float32(np.sqrt(fan_in)) + np.float32(path.endswith("scale"))
  return {"params": unflatten_dict(params, sep="/")}


def official_variables(decoder: nn.Module, inputs: Mapping[str, jax.Array]) -> dict[str, Any]:
  """A decoder's variables, made as the reference outputs' were; every parameter has a row."""
  found = shapes(decoder, inputs)
  params = {}
  for row in rows(decoder, path="params"):
    path = row.path.removeprefix("params/")
    tensor = _tensor(row.name, table.official_shape(found[path], row.layout))
    params[path] = table.to_ours(tensor, row.layout)
  assert set(params) == set(found)
  return {"params": unflatten_dict(params, sep="/")}


_tensor = functools.cache(official_weights.tensor)  # the same ones again and again


def assert_outputs(outputs: Any, arrays: Mapping[str, np.ndarray]) -> None:
  """Compares with a file's outputs, within the tolerance that goes with them."""
  mask_features, memories = outputs
  found = {"mask_features": mask_features, **{f"ms{i}": x for i, x in enumerate(memories)}}
  for name, x in found.items():
    if name in arrays:
      np.testing.assert_allclose(x, nhwc(arrays[name]), atol=5e-5, rtol=1e-4, err_msg=name)
  if "memory" in arrays:
    tokens = np.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in memories], axis=1)
    np.testing.assert_allclose(tokens, arrays["memory"], atol=5e-5, rtol=1e-4)
