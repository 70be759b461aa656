"""AVESFormer's parts that have official weights: its visual and its audio backbone.

No weights of the whole model have been released. `partial="backbone"` reads ImageNet weights (a
ResNet of PyTorch's model zoo, a PVT v2 of its authors, an EfficientNet-Lite of PyTorch's port),
`partial="audio"` reads VGGish; the whole model is read from our own bundles.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effseg_jax.models.avesformer import AVESFormer
from effseg_jax.models.backbones.efficientnet_lite import EfficientNetLite
from effseg_jax.models.backbones.pvt import PVTv2
from effseg_jax.models.backbones.resnet import ResNet
from effseg_jax.models.backbones.vggish import PATCH
from effseg_jax.weights import backbones, efficientnet_lite, pvt, vggish
from effseg_jax.weights.table import Part, Row

PARTS = {
  "backbone": Part(
    r"backbone\.",
    r"\w+/backbone/",
    (*backbones.PART.beginnings, *pvt.BEGINNINGS, *efficientnet_lite.BEGINNINGS),
  ),
  "audio": Part(r"audio\.", r"\w+/audio/", vggish.BEGINNINGS),
}


def example_inputs(model: AVESFormer) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Arguments of a model, of any size: no parameter's shape depends on it."""
  del model
  return (
    jax.ShapeDtypeStruct((1, 1, 64, 64, 3), jnp.float32),
    jax.ShapeDtypeStruct((1, 1, *PATCH), jnp.float32),
  )


def renamed(model: AVESFormer, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """A file's tensors, those of a ResNet under the names of `backbones.rows`."""
  return backbones.renamed(model.visual_backbone(), tensors)


def rows(model: AVESFormer, paths: Collection[str]) -> list[Row]:
  """The official tensors of a model's parts; see `effseg_jax.weights.afformer.rows`.

  An encoder that is our own has none.
  """
  return [row for row in _rows(model) if not row.path or row.path in paths]


def _rows(model: AVESFormer) -> Iterator[Row]:
  backbone = model.visual_backbone()
  if isinstance(backbone, ResNet):
    yield from backbones.rows(backbone)
  elif isinstance(backbone, PVTv2):
    yield from pvt.rows(backbone)
  elif isinstance(backbone, EfficientNetLite):
    yield from efficientnet_lite.rows(backbone)
  if model.audio == "vggish":
    yield from vggish.vggish_rows("audio.", "audio/")
