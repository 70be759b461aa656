"""From a graph to an `.onnx` file: the model, what it says of itself, and its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.export.graph import Graph, Tensor
from effseg_jax.export.steps import BATCH

OPSETS = (20, 21, 22, 23)  # from the first that has Gelu

# Above it the weights lie beside the file: a protocol buffer holds two gigabytes at most.
_LARGEST_EMBEDDED = 1_500_000_000


def require_onnx() -> Any:
  """The `onnx` package.

  Raises:
    UserError: if it is not installed.
  """
  with extra("export"):
    import onnx
  return onnx


def to_model(graph: Graph, opset: int, metadata: Mapping[str, Any]) -> Any:
  """Makes an `onnx.ModelProto`.

  Args:
    graph: finished.
    opset: of ONNX's operators.
    metadata: by name; what is no text becomes JSON.

  Raises:
    UserError: for an opset that lacks operators.
  """
  onnx = require_onnx()
  if opset not in OPSETS:
    raise UserError(f"--opset is {opset}; expected one of {', '.join(map(str, OPSETS))}.")
  constants: dict[str, Tensor] = {}
  nodes = []
  for node in graph.nodes:
    constants.update({x.name: x for x in node.inputs if x is not None and x.array is not None})
    attributes = {
      key: onnx.helper.np_dtype_to_tensor_dtype(value) if isinstance(value, np.dtype) else value
      for key, value in node.attributes.items()
    }
    names = ["" if x is None else graph.name_of(x) for x in node.inputs]
    made = [graph.name_of(x) for x in node.outputs]
    nodes.append(onnx.helper.make_node(node.operator, names, made, name=made[0], **attributes))
  proto = onnx.helper.make_graph(
    nodes,
    "effseg_jax",
    [_described(onnx, tensor, tensor.name) for tensor in graph.inputs],
    [_described(onnx, tensor, graph.name_of(tensor)) for tensor in graph.outputs],
    [onnx.numpy_helper.from_array(x.array, name) for name, x in constants.items()],
  )
  imports = [onnx.helper.make_opsetid("", opset)]
  model = onnx.helper.make_model(
    proto, opset_imports=imports, producer_name="effseg_jax", ir_version=10
  )
  texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
  onnx.helper.set_model_props(model, texts)
  return model


def _described(onnx: Any, tensor: Tensor, name: str) -> Any:
  sizes = [
    n if n == 0 or n % BATCH else "batch" if n == BATCH else f"{n // BATCH} * batch"
    for n in tensor.shape
  ]
  kind = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
  return onnx.helper.make_tensor_value_info(name, kind, sizes)


def write(model: Any, path: Path) -> None:
  """Writes a model; large weights become `NAME.onnx.data` beside it."""
  onnx = require_onnx()
  if model.ByteSize() > _LARGEST_EMBEDDED:
    onnx.save(
      model,
      str(path),
      save_as_external_data=True,
      location=f"{path.name}.data",
      size_threshold=4096,
    )
  else:
    onnx.save(model, str(path))


def in_half(model: Any) -> Any:
  """A model that computes in float16 inside; inputs and outputs keep their types."""
  with extra("export"):
    from onnxruntime.transformers.float16 import convert_float_to_float16
  return convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=False)
