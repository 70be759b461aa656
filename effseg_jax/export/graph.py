"""An ONNX graph under construction: tensors, nodes, and what can be said with fewer of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from effseg_jax.export.steps import BATCH


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A tensor of the graph.

  Attributes:
    name: in the file.
    shape: `BATCH` divides a dimension that grows with the batch.
    dtype: of the elements.
    array: its elements, if it is a constant.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  array: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class Node:
  """An operator with its operands."""

  operator: str
  inputs: list[Tensor | None]
  outputs: list[Tensor]
  attributes: dict[str, Any]


class Graph:
  """Nodes in order. The same operator on the same operands is one node."""

  def __init__(self):
    """An empty graph."""
    self.inputs: list[Tensor] = []
    self.outputs: list[Tensor] = []
    self.nodes: list[Node] = []
    self._constants: dict[Any, Tensor] = {}
    self._known: dict[Any, list[Tensor]] = {}
    self._makers: dict[str, Node] = {}
    self._renamed: dict[str, str] = {}
    self._count = 0

  def input(self, name: str, shape: Sequence[int], dtype: Any) -> Tensor:
    """Declares an input."""
    self.inputs.append(Tensor(name, tuple(shape), np.dtype(dtype)))
    return self.inputs[-1]

  def output(self, name: str, tensor: Tensor) -> None:
    """Declares an output."""
    result = Tensor(name, tensor.shape, tensor.dtype)
    maker = self._makers.get(tensor.name)
    if maker is None or tensor.name in self._renamed:
      # An input, a constant, or what is an output already: a node of its own gives it the name.
      self.nodes.append(Node("Identity", [tensor], [result], {}))
    else:
      self._renamed[tensor.name] = name
      result = tensor
    self.outputs.append(result)

  def name_of(self, tensor: Tensor) -> str:
    """The name of a tensor in the file."""
    return self._renamed.get(tensor.name, tensor.name)

  def constant(self, array: Any, dtype: Any = None) -> Tensor:
    """A constant; equal ones are one tensor."""
    array = np.ascontiguousarray(array, dtype).reshape(np.shape(array))
    key = (array.shape, array.dtype.str, array.tobytes())
    if key not in self._constants:
      name = f"constant_{len(self._constants)}"
      self._constants[key] = Tensor(name, array.shape, array.dtype, array)
    return self._constants[key]

  def emit(
    self,
    operator: str,
    inputs: Sequence[Tensor | None],
    shape: Sequence[int],
    dtype: Any = None,
    **attributes: Any,
  ) -> Tensor:
    """Adds a node with one output, of the first input's dtype unless another is given."""
    kind = inputs[0].dtype if dtype is None else dtype
    return self.emit_several(operator, inputs, [(shape, kind)], **attributes)[0]

  def emit_several(
    self,
    operator: str,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[tuple[Sequence[int], Any]],
    **attributes: Any,
  ) -> list[Tensor]:
    """Adds a node; `outputs` are shapes and dtypes."""
    key = (operator, tuple(x and x.name for x in inputs), repr(sorted(attributes.items())))
    if key not in self._known:
      made = []
      for shape, dtype in outputs:
        sizes = tuple(map(int, shape))
        made.append(Tensor(f"{operator.lower()}_{self._count}", sizes, np.dtype(dtype)))
        self._count += 1
      node = Node(operator, list(inputs), made, attributes)
      self.nodes.append(node)
      self._makers.update({tensor.name: node for tensor in made})
      self._known[key] = made
    return self._known[key]

  def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Another shape of the same elements; of several in a row the last one counts."""
    shape = tuple(shape)
    if x.array is not None:
      return self.constant(x.array.reshape(shape))
    maker = self._makers.get(x.name)
    if maker is not None and maker.operator == "Reshape":
      x = maker.inputs[0]
    if x.shape == shape:
      return x
    target = [-1 if n and n % BATCH == 0 else n for n in shape]
    return self.emit("Reshape", [x, self.constant(target, np.int64)], shape)

  def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
    """Axis i of the result is axis `order[i]`; of several in a row their product is taken."""
    order = tuple(order)
    if x.array is not None:
      return self.constant(x.array.transpose(order))
    shape = tuple(x.shape[axis] for axis in order)
    maker = self._makers.get(x.name)
    if maker is not None and maker.operator == "Transpose":
      x, order = maker.inputs[0], tuple(maker.attributes["perm"][axis] for axis in order)
    moved = [axis for axis in order if x.shape[axis] != 1]
    if moved == sorted(moved):  # only axes of one element change places
      return self.reshape(x, shape)
    return self.emit("Transpose", [x], shape, perm=list(order))

  def cast(self, x: Tensor, dtype: Any) -> Tensor:
    """Another dtype."""
    if x.dtype == np.dtype(dtype):
      return x
    if x.array is not None:
      return self.constant(x.array.astype(dtype))
    return self.emit("Cast", [x], x.shape, dtype, to=np.dtype(dtype))

  def expand(self, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeats axes of one element."""
    shape = tuple(shape)
    if x.shape == shape:
      return x
    if not any(n and n % BATCH == 0 for n in shape):
      if x.array is not None:
        return self.constant(np.broadcast_to(x.array, shape))
      return self.emit("Expand", [x, self.constant(shape, np.int64)], shape)
    source = self.inputs[0]
    batch = self.emit("Shape", [source], (1,), np.int64, start=0, end=1)
    parts = []
    for n in shape:
      if n % BATCH == 0 and n:
        factor = self.constant([n // BATCH], np.int64)
        parts.append(batch if n == BATCH else self.emit("Mul", [batch, factor], (1,)))
      else:
        parts.append(self.constant([n], np.int64))
    target = self.emit("Concat", parts, (len(shape),), np.int64, axis=0)
    return self.emit("Expand", [x, target], shape)

  def transposed_elements(self) -> int:
    """Elements that transposes move for one example: what a choice of layouts costs."""
    return sum(
      math.prod(node.outputs[0].shape) // (BATCH if BATCH in node.outputs[0].shape else 1)
      for node in self.nodes
      if node.operator == "Transpose"
    )

  def finish(self) -> None:
    """Drops what is not read, and folds constant factors and summands into convolutions."""
    self._drop_unread()
    _fold_into_convolutions(self)
    self._drop_unread()

  def _drop_unread(self) -> None:
    read = {tensor.name for tensor in self.outputs}
    kept = []
    for node in reversed(self.nodes):
      if any(tensor.name in read for tensor in node.outputs):
        read.update(tensor.name for tensor in node.inputs if tensor is not None)
        kept.append(node)
    self.nodes = kept[::-1]


def _fold_into_convolutions(graph: Graph) -> None:
  """conv(x) * a + b is a convolution with other weights; so is conv(x) + x channel by channel."""
  readers: dict[str, list[Node]] = {}
  for node in graph.nodes:
    for tensor in node.inputs:
      if tensor is not None:
        readers.setdefault(tensor.name, []).append(node)
  results = {tensor.name for tensor in graph.outputs}
  for node in graph.nodes:
    if node.operator != "Conv":
      continue
    while True:
      (output,) = node.outputs
      following = readers.get(output.name, [])
      if len(following) != 1 or output.name in results:
        break
      other = _folded(graph, node, following[0])
      if other is None:
        break
      node.inputs = other
      node.outputs = following[0].outputs
      following[0].outputs = []
  graph.nodes = [node for node in graph.nodes if node.outputs]
  graph.nodes = _in_order(graph)


def _folded(graph: Graph, conv: Node, after: Node) -> list[Tensor | None] | None:
  """The inputs of a convolution that does what follows it too, or None."""
  if after.operator not in ("Mul", "Add", "Sub") or after.outputs[0].shape != conv.outputs[0].shape:
    return None
  own = conv.outputs[0]
  position = 0 if after.inputs[0] is own else 1
  other = after.inputs[1 - position]
  if other is own:
    return None
  x, kernel, *rest = conv.inputs
  features = kernel.shape[0]
  bias = rest[0].array if rest else np.zeros(features, kernel.dtype)
  if kernel.array is None:
    return None
  per_channel = (1, features) + (1,) * (len(own.shape) - 2)
  if other.array is not None and other.array.ndim in (0, len(own.shape)):
    value = np.asarray(other.array)
    if value.size != 1 and value.shape != per_channel:
      return None
    value = np.broadcast_to(value.reshape(-1), (features,))
    weights = kernel.array
    if after.operator == "Mul":
      weights, bias = weights * value.reshape(-1, *[1] * (weights.ndim - 1)), bias * value
    elif after.operator == "Add":
      bias = bias + value
    elif position == 0:
      bias = bias - value
    else:
      weights, bias = -weights, value - bias
    return [x, graph.constant(weights, kernel.dtype), graph.constant(bias, kernel.dtype)]
  depthwise = conv.attributes["group"] == features == x.shape[1]
  if after.operator == "Add" and other.name == x.name and depthwise:
    weights = kernel.array.copy()
    weights[:, :, *(n // 2 for n in weights.shape[2:])] += 1
    return [x, graph.constant(weights), *rest]
  return None


def _in_order(graph: Graph) -> list[Node]:
  """Nodes after what they read (a convolution that took over a sum may stand before an operand)."""
  made = {tensor.name for tensor in graph.inputs}
  waiting, ordered = list(graph.nodes), []
  while waiting:
    later = []
    for node in waiting:
      if all(x is None or x.array is not None or x.name in made for x in node.inputs):
        ordered.append(node)
        made.update(tensor.name for tensor in node.outputs)
      else:
        later.append(node)
    if len(later) == len(waiting):
      raise AssertionError("the graph has a circle")
    waiting = later
  return ordered
