"""From steps to an ONNX graph: elementwise operators, shapes, reductions and selections.

Products and convolutions are in `products.py`. Each rule takes the graph, the step and its operands
as views, and returns views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.export import products
from effseg_jax.export.graph import Graph, Tensor
from effseg_jax.export.steps import BATCH, Program, Step, Value
from effseg_jax.export.views import (
  View,
  complete,
  inverse,
  ordered,
  plain_view,
  reshaped,
  with_axes,
  without_axes,
)

# The two ways to choose where operands lie differently: see `lower`.
CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"


def lower(program: Program, names: Sequence[str], output_names: Sequence[str]) -> Graph:
  """Makes a graph; of two ways to lay arrays out, the one that transposes fewer elements.

  Where an operator meets operands in different orders, or a layer normalisation needs channels
  last, either the order of convolutions is kept (networks of convolutions) or the array's own
  (networks of tokens).

  Args:
    program: what to lower.
    names: of the inputs.
    output_names: of the outputs.

  Raises:
    UserError: for a primitive that has no rule.
  """
  graphs = [_lower(program, names, output_names, way) for way in (CHANNELS_FIRST, CHANNELS_LAST)]
  return min(graphs, key=lambda graph: (graph.transposed_elements(), len(graph.nodes)))


def _lower(
  program: Program, names: Sequence[str], output_names: Sequence[str], layout: str
) -> Graph:
  graph = Graph()
  graph.layout = layout
  views: dict[int, View] = {}
  for value, name in zip(program.inputs, names, strict=True):
    views[id(value)] = plain_view(graph.input(name, value.shape, value.dtype))

  def read(operand: Value | np.ndarray) -> View:
    if isinstance(operand, Value):
      return views[id(operand)]
    return plain_view(graph.constant(operand))

  for step in program.steps:
    rule = _rule(step)
    operands = [read(operand) for operand in step.inputs]
    found = rule(graph, step, operands)
    found = [found] if isinstance(found, View) else found
    for output, view in zip(step.outputs, found, strict=True):
      assert view.shape == output.shape, (step.name, view.shape, output.shape)
      views[id(output)] = view
    if step.name == "layer_norm" and layout == CHANNELS_LAST:
      # Whoever reads the same array later finds it where the normalisation had it put.
      source = step.inputs[0]
      views[id(source)] = plain_view(ordered(graph, views[id(source)]))
  for output, name in zip(program.outputs, output_names, strict=True):
    graph.output(name, complete(graph, read(output)))
  graph.finish()
  return graph


def _rule(step: Step) -> Callable[..., View | list[View]]:
  name = step.name.split(":")[1] if step.name.startswith("operator:") else step.name
  rule = _RULES.get(name)
  if rule is None:
    raise UserError(
      f"the model computes {step.name!r}, which the ONNX exporter has no operator for; export it"
      " with --format=stablehlo."
    )
  return rule


# --- Elementwise ----------------------------------------------------------------------------------


def _common_order(graph: Graph, views: Sequence[View]) -> tuple[int, ...]:
  """The order in which operands meet."""
  rank = max(len(view.shape) for view in views)
  plain = tuple(range(rank))
  orders = [v.order for v in views if len(v.shape) == rank and v.tensor.array is None]
  sized = sorted(
    (v for v in views if len(v.shape) == rank and v.tensor.array is None),
    key=lambda v: -math.prod(v.tensor.shape),
  )
  if not orders:
    return plain
  most = math.prod(sized[0].tensor.shape)
  candidates = [v.order for v in sized if math.prod(v.tensor.shape) == most]
  if graph.layout == CHANNELS_LAST:
    return plain if plain in candidates else candidates[0]
  return next((order for order in candidates if order != plain), plain)


def _meet(graph: Graph, views: Sequence[View]) -> tuple[list[Tensor], tuple[int, ...]]:
  """Operands in one order (scalars as they are), and the order."""
  order = _common_order(graph, views)
  tensors = [view.tensor if not view.shape else ordered(graph, view, order) for view in views]
  return tensors, order


def _elementwise(operator: str) -> Callable[..., View]:
  def rule(graph: Graph, step: Step, operands: list[View]) -> View:
    return _apply(graph, operator, step, operands)

  return rule


def _apply(graph: Graph, operator: str, step: Step, operands: Sequence[View], **attributes) -> View:
  tensors, order = _meet(graph, operands)
  output = step.outputs[0]
  if operator in ("Add", "Mul", "Sub", "Div") and output.dtype.kind == "f":
    # Numbers that are the same everywhere need no axes.
    tensors = [
      graph.constant(t.array.ravel()[0])
      if t.array is not None
      and t.array.size == 1
      and any(len(o.shape) for o in tensors if o is not t)
      else t
      for t in tensors
    ]
  shape = np.broadcast_shapes(*(t.shape for t in tensors))
  shape = (1,) * (len(order) - len(shape)) + tuple(shape)
  tensor = graph.emit(operator, tensors, shape, output.dtype, **attributes)
  return View(tensor, order, output.shape)


def _divide(graph: Graph, step: Step, operands: list[View]) -> View:
  divisor = operands[1].tensor
  if divisor.array is not None and divisor.dtype.kind == "f":
    factor = graph.constant(np.asarray(1.0 / divisor.array.astype(np.float64), divisor.dtype))
    return _apply(
      graph, "Mul", step, [operands[0], View(factor, operands[1].order, operands[1].shape)]
    )
  return _apply(graph, "Div", step, operands)


def _maximum(graph: Graph, step: Step, operands: list[View]) -> View:
  for view, other in (operands, operands[::-1]):
    if other.tensor.array is not None and other.tensor.dtype.kind == "f":
      if not other.tensor.array.any():
        return _apply(graph, "Relu", step, [view])
      if np.isneginf(other.tensor.array).all():
        return view
  return _apply(graph, "Max", step, operands)


def _square(graph: Graph, step: Step, operands: list[View]) -> View:
  return _apply(graph, "Mul", step, [operands[0], operands[0]])


def _integer_power(graph: Graph, step: Step, operands: list[View]) -> View:
  exponent = step.params["y"]
  if exponent == 2:
    return _square(graph, step, operands)
  if exponent == -1:
    return _apply(graph, "Reciprocal", step, operands)
  power = plain_view(graph.constant(np.asarray(exponent, step.outputs[0].dtype)))
  return _apply(graph, "Pow", step, [operands[0], power])


def _inverse_root(graph: Graph, step: Step, operands: list[View]) -> View:
  return _apply(graph, "Reciprocal", step, [_apply(graph, "Sqrt", step, operands)])


def _erfc(graph: Graph, step: Step, operands: list[View]) -> View:
  one = plain_view(graph.constant(np.ones((), step.outputs[0].dtype)))
  return _apply(graph, "Sub", step, [one, _apply(graph, "Erf", step, operands)])


def _not_equal(graph: Graph, step: Step, operands: list[View]) -> View:
  return _apply(graph, "Not", step, [_apply(graph, "Equal", step, operands)])


def _logical(operator: str) -> Callable[..., View]:
  def rule(graph: Graph, step: Step, operands: list[View]) -> View:
    boolean = step.outputs[0].dtype == bool
    return _apply(graph, operator if boolean else f"Bitwise{operator}", step, operands)

  return rule


def _cast(graph: Graph, step: Step, operands: list[View]) -> View:
  (view,) = operands
  dtype = np.dtype(step.params["new_dtype"])
  tensor = graph.cast(view.tensor, dtype)
  return View(tensor, view.order, view.shape)


def _select(graph: Graph, step: Step, operands: list[View]) -> View:
  which, *cases = operands
  if len(cases) != 2 or which.tensor.dtype != bool:
    raise UserError("the model chooses among more than two cases; ONNX export knows two.")
  return _apply(graph, "Where", step, [which, cases[1], cases[0]])


def _clamp(graph: Graph, step: Step, operands: list[View]) -> View:
  low, view, high = operands
  return _apply(graph, "Min", step, [_apply(graph, "Max", step, [view, low]), high])


# --- Shapes ---------------------------------------------------------------------------------------


def _reshape(graph: Graph, step: Step, operands: list[View]) -> View:
  return reshaped(graph, operands[0], step.outputs[0].shape)


def _squeeze(graph: Graph, step: Step, operands: list[View]) -> View:
  rank = len(operands[0].shape)
  return without_axes(graph, operands[0], [axis % rank for axis in step.params["dimensions"]])


def _broadcast(graph: Graph, step: Step, operands: list[View]) -> View:
  dimensions = step.params["broadcast_dimensions"]
  return with_axes(graph, operands[0], step.outputs[0].shape, dimensions)


def _transpose(graph: Graph, step: Step, operands: list[View]) -> View:
  del graph
  (view,), permutation = operands, step.params["permutation"]
  order = tuple(view.order[axis] for axis in permutation)
  return View(view.tensor, order, step.outputs[0].shape)


def _concatenate(graph: Graph, step: Step, operands: list[View]) -> View:
  order, output = _common_order(graph, operands), step.outputs[0]
  tensors = [complete(graph, view, order) for view in operands]
  shape = tuple(output.shape[axis] for axis in inverse(order))
  axis = order[step.params["dimension"]]
  return View(graph.emit("Concat", tensors, shape, axis=axis), order, output.shape)


def _stack(graph: Graph, step: Step, operands: list[View]) -> View:
  output, axis = step.outputs[0], step.params["axis"]
  shape = tuple(1 if a == axis else n for a, n in enumerate(output.shape))
  kept = [a for a in range(len(shape)) if a != axis]
  views = [with_axes(graph, view, shape, kept) for view in operands]
  order = _common_order(graph, views)
  tensors = [complete(graph, view, order) for view in views]
  sizes = tuple(output.shape[a] for a in inverse(order))
  return View(graph.emit("Concat", tensors, sizes, axis=order[axis]), order, output.shape)


def _slice(graph: Graph, step: Step, operands: list[View]) -> View:
  params, (view,) = step.params, operands
  steps = params["strides"] or (1,) * len(view.shape)
  return cropped(graph, view, params["start_indices"], params["limit_indices"], steps)


def cropped(
  graph: Graph, view: View, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]
) -> View:
  """A slice along every axis."""
  shape = tuple(
    max(-(-(end - start) // step), 0) for start, end, step in zip(starts, ends, steps, strict=True)
  )
  axes = [
    axis
    for axis, n in enumerate(view.shape)
    if (shape[axis] != n) and view.tensor.shape[view.order[axis]] != 1
  ]
  if not axes:
    return View(view.tensor, view.order, shape)
  places = [view.order[axis] for axis in axes]
  sizes = list(view.tensor.shape)
  for axis, place in zip(axes, places, strict=True):
    sizes[place] = shape[axis]
  numbers = [
    graph.constant(values, np.int64)
    for values in (
      [starts[axis] for axis in axes],
      [ends[axis] for axis in axes],
      places,
      [steps[axis] for axis in axes],
    )
  ]
  if view.tensor.array is not None:
    index = [slice(None)] * len(sizes)
    for axis, place in zip(axes, places, strict=True):
      index[place] = slice(starts[axis], ends[axis], steps[axis])
    return View(graph.constant(view.tensor.array[tuple(index)]), view.order, shape)
  return View(graph.emit("Slice", [view.tensor, *numbers], sizes), view.order, shape)


def _split(graph: Graph, step: Step, operands: list[View]) -> list[View]:
  (view,), axis = operands, step.params["axis"]
  place, sizes = view.order[axis], [value.shape[axis] for value in step.outputs]
  if view.tensor.shape[place] != view.shape[axis]:  # a broadcast axis
    return [View(view.tensor, view.order, value.shape) for value in step.outputs]
  shapes = [
    tuple(n if p != place else size for p, n in enumerate(view.tensor.shape)) for size in sizes
  ]
  parts = graph.emit_several(
    "Split",
    [view.tensor, graph.constant(sizes, np.int64)],
    [(shape, view.tensor.dtype) for shape in shapes],
    axis=place,
  )
  return [
    View(part, view.order, value.shape) for part, value in zip(parts, step.outputs, strict=True)
  ]


def _pad(graph: Graph, step: Step, operands: list[View]) -> View:
  view, fill = operands
  config = step.params["padding_config"]
  if any(inside for _, _, inside in config) or any(
    n < 0 for low, high, _ in config for n in (low, high)
  ):
    raise UserError("the model spreads or crops an array with lax.pad; export it with stablehlo.")
  if not any(low or high for low, high, _ in config):
    return view
  order, rank = view.order, len(config)
  tensor = complete(graph, view, order)
  by_place = [config[axis] for axis in inverse(order)]
  pads = [low for low, _, _ in by_place] + [high for _, high, _ in by_place]
  shape = [n + low + high for n, (low, high, _) in zip(tensor.shape, by_place, strict=True)]
  assert len(pads) == 2 * rank
  padded = graph.emit("Pad", [tensor, graph.constant(pads, np.int64), fill.tensor], shape)
  return View(padded, order, step.outputs[0].shape)


def _reverse(graph: Graph, step: Step, operands: list[View]) -> View:
  (view,) = operands
  places = [view.order[axis] for axis in step.params["dimensions"]]
  places = [place for place in places if view.tensor.shape[place] != 1]
  if not places:
    return view
  count, far = len(places), -(2**31)
  numbers = [[-1] * count, [far] * count, places, [-1] * count]
  constants = [graph.constant(values, np.int64) for values in numbers]
  tensor = graph.emit("Slice", [view.tensor, *constants], view.tensor.shape)
  return View(tensor, view.order, view.shape)


def _iota(graph: Graph, step: Step, operands: list[View]) -> View:
  del operands
  output, axis = step.outputs[0], step.params["dimension"]
  if output.shape[axis] % BATCH == 0:
    raise UserError("the model numbers the examples of a batch; export it with --batch=1.")
  sizes = [1] * len(output.shape)
  sizes[axis] = output.shape[axis]
  tensor = graph.constant(np.arange(sizes[axis]).reshape(sizes), output.dtype)
  return View(tensor, tuple(range(len(sizes))), output.shape)


# --- Reductions -----------------------------------------------------------------------------------


def _reduction(operator: str) -> Callable[..., View]:
  def rule(graph: Graph, step: Step, operands: list[View]) -> View:
    (view,), axes = operands, step.params["axes"]
    if step.outputs[0].dtype != bool:
      return _reduce(graph, operator, view, axes)
    numbers = View(graph.cast(view.tensor, np.int32), view.order, view.shape)
    found = _reduce(graph, operator, numbers, axes)
    return View(graph.cast(found.tensor, bool), found.order, found.shape)

  return rule


def _reduce(graph: Graph, operator: str, view: View, axes: Sequence[int]) -> View:
  shape = [view.shape[axis] for axis in inverse(view.order)]
  places = [view.order[axis] for axis in axes]
  if any(view.tensor.shape[place] != shape[place] for place in places):
    view = View(complete(graph, view, view.order), view.order, view.shape)
  sizes = [1 if place in places else n for place, n in enumerate(view.tensor.shape)]
  tensor = graph.emit(
    operator, [view.tensor, graph.constant(sorted(places), np.int64)], sizes, keepdims=1
  )
  kept = tuple(1 if axis in axes else n for axis, n in enumerate(view.shape))
  return without_axes(graph, View(tensor, view.order, kept), axes)


def _arg_reduction(operator: str) -> Callable[..., View]:
  def rule(graph: Graph, step: Step, operands: list[View]) -> View:
    (view,), (axis,) = operands, step.params["axes"]
    view = View(complete(graph, view, view.order), view.order, view.shape)
    place = view.order[axis]
    sizes = [1 if p == place else n for p, n in enumerate(view.tensor.shape)]
    tensor = graph.emit(operator, [view.tensor], sizes, np.int64, axis=place, keepdims=1)
    tensor = graph.cast(tensor, step.outputs[0].dtype)
    kept = tuple(1 if a == axis else n for a, n in enumerate(view.shape))
    return without_axes(graph, View(tensor, view.order, kept), [axis])

  return rule


def _cumulative_sum(graph: Graph, step: Step, operands: list[View]) -> View:
  (view,) = operands
  tensor = complete(graph, view, view.order)
  axis = graph.constant(np.int64(view.order[step.params["axis"]]))
  reverse = int(bool(step.params["reverse"]))
  return View(
    graph.emit("CumSum", [tensor, axis], tensor.shape, reverse=reverse), view.order, view.shape
  )


def _softmax(graph: Graph, step: Step, operands: list[View]) -> View:
  (view,) = operands
  tensor = complete(graph, view, view.order)
  place = view.order[step.params["axis"]]
  if place != len(view.shape) - 1:  # runtimes are fast along the last axis
    order = [p for p in range(len(view.shape)) if p != place] + [place]
    moved = graph.transpose(tensor, order)
    axes = tuple(order.index(p) for p in view.order)
    tensor = graph.emit("Softmax", [moved], moved.shape, axis=-1)
    return View(tensor, axes, view.shape)
  return View(graph.emit("Softmax", [tensor], tensor.shape, axis=-1), view.order, view.shape)


def _layer_norm(graph: Graph, step: Step, operands: list[View]) -> View:
  view, scale, bias = operands
  last, order = len(view.shape) - 1, view.order
  direct = (
    view
    if view.order[-1] == last
    else View(ordered(graph, view), tuple(range(last + 1)), view.shape)
  )
  tensor = complete(graph, direct, direct.order)
  tensor = graph.emit(
    "LayerNormalization",
    [tensor, scale.tensor, bias.tensor],
    tensor.shape,
    axis=-1,
    epsilon=float(step.params["epsilon"]),
  )
  found = View(tensor, direct.order, view.shape)
  if graph.layout == CHANNELS_FIRST and order != found.order:
    return View(ordered(graph, found, order), order, view.shape)
  return found


# --- Selections -----------------------------------------------------------------------------------


def _top_k(graph: Graph, step: Step, operands: list[View]) -> list[View]:
  tensor = complete(graph, operands[0])
  values, index = step.outputs
  count = graph.constant([values.shape[-1]], np.int64)
  found, places = graph.emit_several(
    "TopK", [tensor, count], [(values.shape, values.dtype), (values.shape, np.int64)], axis=-1
  )
  return [plain_view(found), plain_view(graph.cast(places, index.dtype))]


def _sort(graph: Graph, step: Step, operands: list[View]) -> list[View]:
  if step.params["num_keys"] != 1:
    raise UserError("the model sorts by several keys; export it with --format=stablehlo.")
  tensors = [complete(graph, view) for view in operands]
  axis, shape = step.params["dimension"] % len(step.outputs[0].shape), step.outputs[0].shape
  count = graph.constant([shape[axis]], np.int64)
  found, places = graph.emit_several(
    "TopK",
    [tensors[0], count],
    [(shape, tensors[0].dtype), (shape, np.int64)],
    axis=axis,
    largest=0,
  )
  others = [graph.emit("GatherElements", [t, places], shape, axis=axis) for t in tensors[1:]]
  return [plain_view(tensor) for tensor in (found, *others)]


def _gather(graph: Graph, step: Step, operands: list[View]) -> View:
  view, index = operands
  numbers, sizes, output = (
    step.params["dimension_numbers"],
    step.params["slice_sizes"],
    step.outputs[0],
  )
  axes, collapsed = (
    tuple(map(int, numbers.start_index_map)),
    tuple(map(int, numbers.collapsed_slice_dims)),
  )
  batched = tuple(map(int, numbers.operand_batching_dims))
  starts = index.constant
  if starts is not None and index.shape == (len(axes),) and not batched:
    begin, end = [0] * len(sizes), list(sizes)
    for axis, start in zip(axes, starts, strict=True):
      begin[axis] = int(np.clip(start, 0, view.shape[axis] - sizes[axis]))
      end[axis] = begin[axis] + sizes[axis]
    found = cropped(graph, view, begin, end, [1] * len(sizes))
    return without_axes(graph, found, collapsed)
  whole = all(size == view.shape[a] for a, size in enumerate(sizes) if a not in axes + batched)
  if len(axes) == 1 and collapsed == axes and whole:
    (axis,) = axes
    if not batched:
      return _take(graph, view, index, axis, output)
    if batched == tuple(range(axis)) and tuple(numbers.start_indices_batching_dims) == batched:
      tensor, places = complete(graph, view), complete(graph, index)
      found = graph.emit(
        "GatherND", [tensor, graph.cast(places, np.int64)], output.shape, batch_dims=axis
      )
      if tuple(numbers.offset_dims) == tuple(range(len(output.shape)))[len(index.shape) - 1 :]:
        return plain_view(found)
  raise UserError(
    f"the model gathers in a way that has no ONNX operator ({numbers}); export it with"
    " --format=stablehlo."
  )


def _take(graph: Graph, view: View, index: View, axis: int, output: Value) -> View:
  """Elements along one axis by their number."""
  chosen = without_axes(graph, index, [len(index.shape) - 1])
  positions = complete(graph, chosen)
  view = View(complete(graph, view, view.order), view.order, view.shape)
  if len(chosen.shape) != 1:
    tensor = ordered(graph, view)
    shape = (*tensor.shape[:axis], *positions.shape, *tensor.shape[axis + 1 :])
    found = plain_view(graph.emit("Gather", [tensor, positions], shape, axis=axis))
  else:
    place = view.order[axis]
    shape = [positions.shape[0] if p == place else n for p, n in enumerate(view.tensor.shape)]
    tensor = graph.emit("Gather", [view.tensor, positions], shape, axis=place)
    logical = tuple(positions.shape[0] if a == axis else n for a, n in enumerate(view.shape))
    found = View(tensor, view.order, logical)
  # JAX may want the axes of the index elsewhere than in the place of the axis they choose from.
  if found.shape == output.shape:
    return found
  raise UserError("the model gathers into another order of axes; export it with stablehlo.")


def _dynamic_slice(graph: Graph, step: Step, operands: list[View]) -> View:
  view, *starts = operands
  if any(start.constant is None for start in starts):
    raise UserError("the model slices at a computed place; export it with --format=stablehlo.")
  sizes = step.params["slice_sizes"]
  begin = [
    int(np.clip(start.constant, 0, n - size))
    for start, n, size in zip(starts, view.shape, sizes, strict=True)
  ]
  end = [b + size for b, size in zip(begin, sizes, strict=True)]
  return cropped(graph, view, begin, end, [1] * len(sizes))


_UNARY = {
  "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp", "floor": "Floor",
  "log": "Log", "logistic": "Sigmoid", "neg": "Neg", "not": "Not", "round": "Round",
  "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "tanh": "Tanh",
  "gelu": "Gelu", "hard_swish": "HardSwish",
}  # fmt: skip
_BINARY = {
  "add": "Add", "sub": "Sub", "mul": "Mul", "min": "Min", "pow": "Pow", "eq": "Equal",
  "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "add_any": "Add",
}  # fmt: skip
_REDUCTIONS = {
  "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
  "reduce_and": "ReduceMin", "reduce_or": "ReduceMax", "reduce_prod": "ReduceProd",
  "reduce_mean": "ReduceMean",
}  # fmt: skip

_RULES: dict[str, Callable[..., View | list[View]]] = {
  **{name: _elementwise(operator) for name, operator in {**_UNARY, **_BINARY}.items()},
  **{name: _reduction(operator) for name, operator in _REDUCTIONS.items()},
  "and": _logical("And"),
  "argmax": _arg_reduction("ArgMax"),
  "argmin": _arg_reduction("ArgMin"),
  "broadcast_in_dim": _broadcast,
  "clamp": _clamp,
  "concatenate": _concatenate,
  "conv_general_dilated": products.convolution,
  "convert_element_type": _cast,
  "cumsum": _cumulative_sum,
  "div": _divide,
  "dot_general": products.product,
  "dynamic_slice": _dynamic_slice,
  "erfc": _erfc,
  "gather": _gather,
  "grid_sample": products.grid_sample,
  "group_norm": products.group_norm,
  "integer_pow": _integer_power,
  "iota": _iota,
  "layer_norm": _layer_norm,
  "max": _maximum,
  "ne": _not_equal,
  "or": _logical("Or"),
  "pad": _pad,
  "reduce_window_max": products.max_pool,
  "reshape": _reshape,
  "resize_bilinear": products.resize,
  "rev": _reverse,
  "rsqrt": _inverse_root,
  "select_n": _select,
  "slice": _slice,
  "softmax": _softmax,
  "sort": _sort,
  "split": _split,
  "square": _square,
  "squeeze": _squeeze,
  "stack": _stack,
  "top_k": _top_k,
  "transpose": _transpose,
}
