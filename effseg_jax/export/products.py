"""From steps to an ONNX graph: convolutions, pools, resizes and matrix products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.export.graph import Graph, Tensor
from effseg_jax.export.steps import Step
from effseg_jax.export.views import View, complete, inverse, ordered, reshaped

_GROUPS = 32  # of all group normalisations


# --- On grids -------------------------------------------------------------------------------------


def convolution(graph: Graph, step: Step, operands: list[View]) -> View:
  """`conv_general_dilated`."""
  image, kernel = operands
  params, numbers = step.params, step.params["dimension_numbers"]
  if any(n != 1 for n in params["lhs_dilation"]) or params["batch_group_count"] != 1:
    raise UserError("the model has a transposed convolution; export it with --format=stablehlo.")
  x = complete(graph, image, inverse(numbers.lhs_spec))
  weights = complete(graph, kernel, inverse(numbers.rhs_spec))
  output = step.outputs[0]
  tensor = graph.emit(
    "Conv",
    [x, weights],
    [output.shape[axis] for axis in numbers.out_spec],
    dilations=list(params["rhs_dilation"]),
    group=params["feature_group_count"],
    kernel_shape=list(weights.shape[2:]),
    pads=[low for low, _ in params["padding"]] + [high for _, high in params["padding"]],
    strides=list(params["window_strides"]),
  )
  return View(tensor, inverse(numbers.out_spec), output.shape)


def max_pool(graph: Graph, step: Step, operands: list[View]) -> View:
  """`reduce_window_max` over two axes."""
  (view,), params = operands, step.params
  window, strides, padding = (
    params["window_dimensions"], params["window_strides"], params["padding"],
  )  # fmt: skip
  axes = [a for a, n in enumerate(window) if n > 1 or strides[a] > 1]
  dilated = any(n != 1 for n in (*params["base_dilation"], *params["window_dilation"]))
  if len(window) != 4 or len(axes) != 2 or dilated:
    raise UserError("the model pools over other than two axes; export it with stablehlo.")
  spec = [a for a in range(4) if a not in axes] + axes
  x, output = complete(graph, view, inverse(spec)), step.outputs[0]
  tensor = graph.emit(
    "MaxPool",
    [x],
    [output.shape[axis] for axis in spec],
    kernel_shape=[window[a] for a in axes],
    pads=[padding[a][0] for a in axes] + [padding[a][1] for a in axes],
    strides=[strides[a] for a in axes],
  )
  return View(tensor, inverse(spec), output.shape)


_FIRST = (0, 2, 3, 1)  # where a tensor with channels first has an array's axes


def resize(graph: Graph, step: Step, operands: list[View]) -> View:
  """`ops.resize.resize_bilinear`."""
  x, output = complete(graph, operands[0], _FIRST), step.outputs[0]
  rows, cols = output.shape[1:3]
  if x.shape[2:] == (rows, cols):
    return operands[0]
  rule = {"half_pixel": "half_pixel", "align_corners": "align_corners"}[step.name.split(":")[2]]
  # Factors, and not sizes: sizes would name the batch too.
  factors = graph.constant([1, 1, rows / x.shape[2], cols / x.shape[3]], np.float32)
  shape = (*x.shape[:2], rows, cols)
  if any(
    int(n * float(f)) != m
    for n, f, m in zip(x.shape[2:], factors.array[2:], shape[2:], strict=True)
  ):
    return _resize_to(graph, x, shape, rule, output.shape)
  tensor = graph.emit(
    "Resize", [x, None, factors], shape, mode="linear", coordinate_transformation_mode=rule
  )
  return View(tensor, _FIRST, output.shape)


def _resize_to(
  graph: Graph, x: Tensor, shape: Sequence[int], rule: str, logical: Sequence[int]
) -> View:
  """A resize to a size that no float32 factor gives exactly."""
  tensor = graph.emit(
    "Resize",
    [x, None, None, graph.constant(shape[2:], np.int64)],
    shape,
    mode="linear",
    coordinate_transformation_mode=rule,
    axes=[2, 3],
  )
  return View(tensor, _FIRST, tuple(logical))


def grid_sample(graph: Graph, step: Step, operands: list[View]) -> View:
  """`ops.deformable.grid_sample`: images (N, H, W, C) at points (N, h, w, 2)."""
  x = complete(graph, operands[0], _FIRST)
  grid, output = complete(graph, operands[1]), step.outputs[0]
  tensor = graph.emit(
    "GridSample",
    [x, grid],
    (*x.shape[:2], *grid.shape[1:3]),
    mode="linear",
    padding_mode="zeros",
    align_corners=0,
  )
  return View(tensor, _FIRST, output.shape)


def group_norm(graph: Graph, step: Step, operands: list[View]) -> View:
  """`models.layers.GroupNorm`: 32 groups, each normalised as one long row."""
  view, scale, bias = operands
  x = complete(graph, view, _FIRST)
  batch, channels, rows, cols = x.shape
  grouped = graph.reshape(x, (batch, _GROUPS, channels // _GROUPS * rows * cols))
  one, zero = (graph.constant(np.full(_GROUPS, n, x.dtype)) for n in (1, 0))
  normal = graph.emit("InstanceNormalization", [grouped, one, zero], grouped.shape, epsilon=1e-5)
  tensor = graph.reshape(normal, x.shape)
  scale, bias = (graph.reshape(v.tensor, (1, channels, 1, 1)) for v in (scale, bias))
  tensor = graph.emit("Mul", [tensor, scale], x.shape)
  return View(graph.emit("Add", [tensor, bias], x.shape), _FIRST, view.shape)


# --- Matrix products ------------------------------------------------------------------------------


def product(graph: Graph, step: Step, operands: list[View]) -> View:
  """`dot_general`."""
  contracting, batch = step.params["dimension_numbers"]
  sides = [
    _Side(view, tuple(map(int, b)), tuple(map(int, c)))
    for view, b, c in zip(operands, batch, contracting, strict=True)
  ]
  output = step.outputs[0].shape
  for own, other in ((0, 1), (1, 0)):
    if sides[other].view.tensor.array is not None and len(sides[own].contracting) == 1:
      found = _with_matrix(graph, sides[own], sides[other], swapped=own == 1, output=output)
      if found is not None:
        return found
  return _of_two(graph, sides, output)


class _Side:
  """One operand of a product: which axes it shares, sums over, and keeps."""

  def __init__(self, view: View, batch: tuple[int, ...], contracting: tuple[int, ...]):
    """Axes of the array."""
    self.view, self.batch, self.contracting = view, batch, contracting
    self.free = tuple(a for a in range(len(view.shape)) if a not in batch + contracting)


def _with_matrix(
  graph: Graph, side: _Side, matrix: _Side, swapped: bool, output: Sequence[int]
) -> View | None:
  """A constant matrix applied along one axis, wherever that axis lies.

  On channels of a grid it is a 1x1 convolution; on the last two axes a product from the right or
  from the left. The constant has one free axis, and batch axes that it shares with the array.
  """
  view = side.view
  if len(matrix.free) > 1 or len(matrix.contracting) != 1:
    return None
  constant = matrix.view.constant
  order = (*matrix.batch, *matrix.free, *matrix.contracting)
  full = np.broadcast_to(constant, matrix.view.shape).transpose(order)
  if not matrix.free:
    full = np.expand_dims(full, len(matrix.batch))
  rank, (axis,) = len(view.shape), side.contracting
  x = complete(graph, view, view.order)
  place, features = view.order[axis], full.shape[-2]
  if rank == 4 and place == 1 and not side.batch:
    kernel = graph.constant(full.reshape(*full.shape, 1, 1))
    shape = (x.shape[0], features, *x.shape[2:])
    tensor = graph.emit(
      "Conv", [x, kernel], shape, dilations=[1, 1], group=1, kernel_shape=[1, 1],
      pads=[0, 0, 0, 0], strides=[1, 1],
    )  # fmt: skip
    places = view.order
  elif rank > 1 and place >= rank - 2 and all(view.order[a] < rank - 2 for a in side.batch):
    tensor, places = _beside(graph, x, place, side, full), view.order
  else:
    x = graph.transpose(x, [p for p in range(rank) if p != place] + [place])
    places = tuple(rank - 1 if p == place else p - (p > place) for p in view.order)
    if any(places[a] >= rank - 2 for a in side.batch):
      return None
    side = _Side(View(x, places, view.shape), side.batch, side.contracting)
    tensor = _beside(graph, x, rank - 1, side, full)
  # Axes of the result as `dot_general` orders them, and where each of them lies.
  kept = list(side.free)
  new = [axis] if matrix.free else []
  logical = [*side.batch, *(new + kept if swapped else kept + new)]
  where = [places[a] for a in logical]
  if not matrix.free:
    gone = places[axis]
    sizes = [n for p, n in enumerate(tensor.shape) if p != gone]
    tensor = graph.reshape(tensor, sizes)
    where = [p - (p > gone) for p in where]
  return View(tensor, tuple(where), tuple(output))


def _beside(graph: Graph, x: Tensor, place: int, side: _Side, full: np.ndarray) -> Tensor:
  """A product with a constant (batch..., features, contracted) from the right or the left."""
  rank = len(x.shape)
  batch = len(side.batch)
  if batch:
    places = [side.view.order[a] for a in side.batch]
    moved = full.transpose(*np.argsort(places), batch, batch + 1)
    sizes = [1] * (rank - 2)
    for size, p in zip(moved.shape, sorted(places), strict=False):
      sizes[p] = size
    full = moved.reshape(*sizes, *full.shape[-2:])
  if place == rank - 1:
    matrix = graph.constant(full.swapaxes(-1, -2))
    return graph.emit("MatMul", [x, matrix], (*x.shape[:-1], full.shape[-2]))
  shape = (*x.shape[:-2], full.shape[-2], x.shape[-1])
  return graph.emit("MatMul", [graph.constant(full), x], shape, x.dtype)


def _of_two(graph: Graph, sides: Sequence[_Side], output: Sequence[int]) -> View:
  """A product of two computed arrays, in the orientation that transposes less."""
  best = None
  for first, second in itertools.permutations(range(2)):
    cost = _cost(sides[first], last="contracting") + _cost(sides[second], last="free")
    if best is None or cost < best[0]:
      best = (cost, first, second)
  _, first, second = best
  a = _matrices(graph, sides[first], last="contracting")
  b = _matrices(graph, sides[second], last="free")
  shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
  tensor = graph.emit("MatMul", [a, b], shape)
  sizes = [[side.view.shape[x] for x in side.free] for side in sides]
  batch = [
    max(one.view.shape[i], two.view.shape[j])
    for one, two in [sides]
    for i, j in zip(one.batch, two.batch, strict=True)
  ]
  full = (*batch, *sizes[first], *sizes[second])
  view = View(
    tensor,
    tuple(range(len(shape))),
    (*batch, *(math.prod(s) for s in (sizes[first], sizes[second]))),
  )
  view = reshaped(graph, view, full)
  if first == 0:
    return View(view.tensor, view.order, tuple(output))
  count, (ours, theirs) = len(batch), map(len, sizes)
  places = [
    *range(count),
    *range(count + theirs, count + theirs + ours),
    *range(count, count + theirs),
  ]
  order = tuple(view.order[place] for place in places)
  return View(view.tensor, order, tuple(output))


def _arranged(side: _Side, last: str) -> list[int]:
  """Axes in the order a matrix product wants them."""
  tail = [side.free, side.contracting] if last == "contracting" else [side.contracting, side.free]
  return [*side.batch, *tail[0], *tail[1]]


def _cost(side: _Side, last: str) -> int:
  """Elements to move so that the axes lie as a matrix product wants them."""
  places = [side.view.order[axis] for axis in _arranged(side, last)]
  places = [place for place in places if side.view.tensor.shape[place] != 1]
  return 0 if places == sorted(places) else math.prod(side.view.tensor.shape)


def _matrices(graph: Graph, side: _Side, last: str) -> Tensor:
  """An operand as (batch..., rows, columns); batch axes may be broadcast."""
  axes = _arranged(side, last)
  tensor = ordered(graph, side.view, inverse(axes))
  tail = axes[len(side.batch) :]
  full = [*tensor.shape[: len(side.batch)], *(side.view.shape[axis] for axis in tail)]
  tensor = graph.expand(tensor, full)
  free = math.prod(side.view.shape[axis] for axis in side.free)
  contracted = math.prod(side.view.shape[axis] for axis in side.contracting)
  pair = (free, contracted) if last == "contracting" else (contracted, free)
  return graph.reshape(tensor, (*tensor.shape[: len(side.batch)], *pair))
