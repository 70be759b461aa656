"""Eight-bit ONNX models: static quantisation with ranges from calibration pictures."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import extra

# Operators that compute in eight bits; everything between them stays float32.
_OPERATORS = ("Conv", "MatMul")


def quantise(model: Any, names: Sequence[str], examples: Sequence[Sequence[np.ndarray]]) -> Any:
  """Quantises convolutions and matrix products: weights per channel, activations per tensor.

  Args:
    model: an `onnx.ModelProto` in float32.
    names: of its inputs.
    examples: inputs from which the ranges of activations are taken, a batch of one each.

  Returns:
    A model with quantise and dequantise nodes, which ONNX Runtime and OpenVINO turn into integer
    arithmetic.
  """
  with extra("export"):
    import onnx
    from onnxruntime import quantization

  class Reader(quantization.CalibrationDataReader):
    """Feeds the examples one by one."""

    def __init__(self):
      self._left = iter(examples)

    def get_next(self) -> dict[str, np.ndarray] | None:
      """The next example, or None."""
      arrays = next(self._left, None)
      return None if arrays is None else dict(zip(names, arrays, strict=True))

  logging.getLogger().setLevel(logging.ERROR)
  with tempfile.TemporaryDirectory() as folder:
    plain, found = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
    onnx.save(model, str(plain))
    quantization.quantize_static(
      str(plain),
      str(found),
      Reader(),
      quant_format=quantization.QuantFormat.QDQ,
      op_types_to_quantize=list(_OPERATORS),
      per_channel=True,
      activation_type=quantization.QuantType.QUInt8,
      weight_type=quantization.QuantType.QInt8,
      calibrate_method=quantization.CalibrationMethod.MinMax,
      extra_options={"ActivationSymmetric": False},
    )
    quantised = onnx.load(str(found))
  del quantised.metadata_props[:]
  quantised.metadata_props.extend(model.metadata_props)
  return quantised
