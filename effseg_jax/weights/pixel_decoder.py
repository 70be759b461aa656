"""The pixel decoders' official names and ours, in the official order.

Names and order are those of the released state dicts; Mask2Former's, PRO-SCALE's and ECO-M2F's
differ in the depth of the encoder, a gate after its layers, and the convolution of the FPN step.
"""

from __future__ import annotations

from collections.abc import Iterator

from effseg_jax.models.eco import EcoPixelDecoder
from effseg_jax.models.pixel_decoder import Mask2FormerPixelDecoder
from effseg_jax.models.proscale import ProScalePixelDecoder
from effseg_jax.weights import table
from effseg_jax.weights.table import Row

PixelDecoder = Mask2FormerPixelDecoder | ProScalePixelDecoder | EcoPixelDecoder


def rows(
  decoder: PixelDecoder,
  name: str = "sem_seg_head.pixel_decoder",
  path: str = "params/pixel_decoder",
) -> Iterator[Row]:
  """The official tensors of a pixel decoder.

  Args:
    decoder: gives the depth and the kinds of gate and FPN step.
    name: prefix of the official names.
    path: of the decoder among our variables.
  """
  for level in range(3):
    projection = f"{path}/inputs/project_{level}"
    yield from table.conv(f"{name}.input_proj.{level}.0", f"{projection}/conv", bias=True)
    yield from table.norm(f"{name}.input_proj.{level}.1", f"{projection}/norm")
  yield Row(f"{name}.transformer.level_embed", f"{path}/inputs/level_embed")
  encoder = f"{name}.transformer.encoder"
  depth = decoder.layers if isinstance(decoder.layers, int) else sum(decoder.layers)
  for index in range(depth):
    yield from _layer(f"{encoder}.layers.{index}", f"{path}/layer_{index}")
  light = False
  if isinstance(decoder, ProScalePixelDecoder):
    light = decoder.light_pixel_embedding
    if decoder.trc_gate != "none":
      layout = "linear" if decoder.trc_gate == "linear" else "conv"
      gate = f"{path}/recalibration"
      yield Row(f"{encoder}.token_excite.ops.weight", f"{gate}/kernel", layout)
      yield Row(f"{encoder}.token_excite.ops.bias", f"{gate}/bias")
  if isinstance(decoder, EcoPixelDecoder):
    yield from table.linear(f"{encoder}.gt.head", f"{path}/gate")
  output = f"{path}/output"
  yield from table.conv(f"{name}.mask_features", f"{output}/project", bias=True)
  yield from table.conv(f"{name}.adapter_1", f"{output}/adapter/conv")
  yield from table.norm(f"{name}.adapter_1.norm", f"{output}/adapter/norm")
  if not light:
    yield from table.conv(f"{name}.layer_1", f"{output}/conv")
  yield from table.norm(f"{name}.layer_1.norm", f"{output}/norm")


def _layer(name: str, path: str) -> Iterator[Row]:
  for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
    yield from table.linear(f"{name}.self_attn.{part}", f"{path}/attention/{part}")
  yield from table.norm(f"{name}.norm1", f"{path}/norm1")
  yield from table.linear(f"{name}.linear1", f"{path}/linear1")
  yield from table.linear(f"{name}.linear2", f"{path}/linear2")
  yield from table.norm(f"{name}.norm2", f"{path}/norm2")
