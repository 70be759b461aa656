"""Arrays as JAX sees them, on tensors that may lie in another order.

A convolution of a runtime works on (batch, channels, rows, columns), our models on channels last.
Transposing around every convolution would cost more than many of them. So an array is kept as it
comes, with the order of its axes beside it; elementwise operators, reductions, slices and most
reshapes then work on the axes where they are. A broadcast, too, is only noted until someone needs
the elements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from effseg_jax.export.graph import Graph, Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class View:
  """An array, and the tensor that holds it.

  Attributes:
    tensor: its axes lie in another order, and may have one element where `shape` has more.
    order: axis i of the array is axis `order[i]` of the tensor.
    shape: of the array.
  """

  tensor: Tensor
  order: tuple[int, ...]
  shape: tuple[int, ...]

  @property
  def plain(self) -> bool:
    """Whether the axes lie in their own order."""
    return self.order == tuple(range(len(self.order)))

  @property
  def constant(self) -> np.ndarray | None:
    """The array, if it is constant; broadcast axes have one element."""
    array = self.tensor.array
    return None if array is None else array.transpose(self.order)


def plain_view(tensor: Tensor) -> View:
  """The view of a tensor as it is."""
  return View(tensor, tuple(range(len(tensor.shape))), tensor.shape)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
  """The order that undoes another."""
  return tuple(int(axis) for axis in np.argsort(order))


def ordered(graph: Graph, view: View, order: Sequence[int] | None = None) -> Tensor:
  """The tensor of a view with its axes in an order (None: the array's); broadcasts stay."""
  order = tuple(range(len(view.order))) if order is None else tuple(order)
  if order == view.order:
    return view.tensor
  moves = inverse(order)
  return graph.transpose(view.tensor, [view.order[axis] for axis in moves])


def complete(graph: Graph, view: View, order: Sequence[int] | None = None) -> Tensor:
  """`ordered` with broadcasts carried out."""
  order = tuple(range(len(view.order))) if order is None else tuple(order)
  shape = tuple(view.shape[axis] for axis in inverse(order))
  return graph.expand(ordered(graph, view, order), shape)


def without_axes(graph: Graph, view: View, axes: Sequence[int]) -> View:
  """Drops axes of one element."""
  kept = [axis for axis in range(len(view.shape)) if axis not in axes]
  places = sorted(view.order[axis] for axis in kept)
  tensor = graph.reshape(view.tensor, [view.tensor.shape[place] for place in places])
  order = tuple(places.index(view.order[axis]) for axis in kept)
  return View(tensor, order, tuple(view.shape[axis] for axis in kept))


def with_axes(graph: Graph, view: View, shape: Sequence[int], dimensions: Sequence[int]) -> View:
  """`broadcast_in_dim`: axis i becomes axis `dimensions[i]` of an array of this shape."""
  # New axes come first or last as they do in the array, which keeps the order of the others.
  spread = [1] * len(shape)
  for axis, dimension in enumerate(dimensions):
    spread[dimension] = view.tensor.shape[view.order[axis]]
  if view.plain and list(dimensions) == sorted(dimensions):
    return View(graph.reshape(view.tensor, spread), tuple(range(len(shape))), tuple(shape))
  new = [axis for axis in range(len(shape)) if axis not in dimensions]
  places = [dimensions[axis] for axis in inverse(view.order)]
  places = new + places
  tensor = graph.reshape(view.tensor, [spread[axis] for axis in places])
  return View(tensor, inverse(places), tuple(shape))


def reshaped(graph: Graph, view: View, shape: Sequence[int]) -> View:
  """Reshapes without transposing where the axes that merge lie side by side."""
  shape = tuple(shape)
  if shape == view.shape:
    return view
  sizes = tuple(view.tensor.shape[axis] for axis in view.order)
  if sizes != view.shape:
    if sorted(n for n in shape if n != 1) == sorted(n for n in view.shape if n != 1) and [
      n for n in shape if n != 1
    ] == [n for n in view.shape if n != 1]:
      return _moved_ones(graph, view, shape)
    view = View(complete(graph, view, view.order), view.order, view.shape)
  groups = _groups(view.shape, shape)
  if groups is not None and not view.plain:
    pieces = []
    for before, after in groups:
      places = [view.order[axis] for axis in before if view.shape[axis] != 1]
      if places != list(range(places[0], places[0] + len(places))) if places else False:
        # Axes of one element in between do no harm.
        between = range(min(places), max(places) + 1)
        others = [p for p in between if p not in places and view.tensor.shape[p] != 1]
        if others or places != sorted(places):
          break
      pieces.append((min(places) if places else -1, after))
    else:
      pieces.sort(key=lambda piece: piece[0])
      axes = [axis for _, after in pieces for axis in after]
      tensor = graph.reshape(view.tensor, [shape[axis] for axis in axes])
      return View(tensor, inverse(axes), shape)
  return plain_view(graph.reshape(complete(graph, view), shape))


def _moved_ones(graph: Graph, view: View, shape: tuple[int, ...]) -> View:
  """A reshape of a broadcast view that only adds or drops axes of one element."""
  ones = [axis for axis, n in enumerate(view.shape) if n == 1]
  core = without_axes(graph, view, ones)
  return with_axes(graph, core, shape, [axis for axis, n in enumerate(shape) if n != 1])


def _groups(
  before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
  """Which axes become which in a reshape, in the smallest pieces of equal size."""
  groups, i, j = [], 0, 0
  while i < len(before) or j < len(after):
    left, right = [], []
    if i < len(before):
      left.append(i)
      i += 1
    if j < len(after):
      right.append(j)
      j += 1
    while True:
      a, b = (math.prod(s[k] for k in g) for s, g in ((before, left), (after, right)))
      if a == b:
        break
      if a < b and i < len(before):
        left.append(i)
        i += 1
      elif b < a and j < len(after):
        right.append(j)
        j += 1
      else:
        return None
    groups.append((left, right))
  return groups
