"""VGGish's names in `vggish-10086976.pth` (torchvggish) and ours, in the official order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effseg_jax.models.backbones.vggish import PATCH, VGGish
from effseg_jax.weights import table
from effseg_jax.weights.table import Row

PARTS: Mapping[str, Any] = {}

# What all official names of the file begin with.
BEGINNINGS = ("features.", "embeddings.")

# Places of the layers with weights in the official sequences; between them are pools and ReLUs.
_CONVOLUTIONS = (0, 3, 6, 8, 11, 13)
_LINEAR = (0, 2, 4)


def example_inputs(model: VGGish) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Arguments of the model."""
  del model
  return (jax.ShapeDtypeStruct((1, *PATCH), jnp.float32),)


def renamed(model: VGGish, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """A file's tensors under the official names, which all files have."""
  del model
  return tensors


def rows(model: VGGish, paths: Collection[str]) -> list[Row]:
  """The official state dict; see `effseg_jax.weights.afformer.rows`."""
  del model, paths
  return list(vggish_rows())


def vggish_rows(name: str = "", path: str = "") -> Iterator[Row]:
  """The rows of a VGGish inside another model.

  Args:
    name: prefix of the official names, "audio." for example.
    path: the same for ours, "audio/" for example.
  """
  for index, place in enumerate(_CONVOLUTIONS):
    yield from table.conv(f"{name}features.{place}", f"params/{path}conv_{index}", bias=True)
  for index, place in enumerate(_LINEAR):
    yield from table.linear(f"{name}embeddings.{place}", f"params/{path}dense_{index}")
