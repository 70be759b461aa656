"""A traced function as a flat list of steps, with everything constant computed already.

Calls are inlined, and what depends on no input is evaluated once. What JAX writes as several
primitives but inference runtimes know as one operator (softmax, layer normalisation, GELU,
hardswish, mean) becomes one step. A step whose results nobody reads is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effseg_jax.ops import backend

# Stands for the number of examples in shapes; a prime that no other dimension contains.
BATCH = 1_000_003

# Constants above this size are kept as a recipe (a broadcast) and not as an array.
_LARGEST_FOLDED = 2**22


class Value:
  """What a step computes: a shape and a dtype; `BATCH` divides the dimension along the batch."""

  def __init__(self, shape: Sequence[int], dtype: Any):
    """Shape of integers, and a NumPy dtype."""
    self.shape, self.dtype = tuple(shape), np.dtype(dtype)


Operand = Value | np.ndarray


@dataclasses.dataclass
class Step:
  """One operation.

  Attributes:
    name: JAX's primitive, or an operator of `_FUSED`, or `operator:...` of `backend.as_operator`.
    inputs: values and constants.
    outputs: what is computed.
    params: of the primitive.
  """

  name: str
  inputs: list[Operand]
  outputs: list[Value]
  params: dict[str, Any]


@dataclasses.dataclass
class Program:
  """A flat function: inputs, steps in order, and outputs."""

  inputs: list[Value]
  steps: list[Step]
  outputs: list[Operand]


def trace(
  function: Callable[..., Any], inputs: Sequence[tuple[Sequence[int | None], Any]]
) -> Program:
  """Traces a function for export.

  Args:
    function: of arrays, to a tuple of arrays.
    inputs: shapes and dtypes; a leading dimension of None is the batch.
  """
  shapes = [
    jax.ShapeDtypeStruct(tuple(BATCH if n is None else n for n in shape), dtype)
    for shape, dtype in inputs
  ]
  with backend.target_platform("export"):
    closed = jax.make_jaxpr(function)(*shapes)
  recorder = _Recorder()
  values = [Value(var.aval.shape, var.aval.dtype) for var in closed.jaxpr.invars]
  outputs = recorder.inline(closed.jaxpr, [np.asarray(c) for c in closed.consts], values)
  steps = _fuse(recorder.steps, outputs)
  return Program(values, steps, outputs)


class _Recorder:
  """Walks a jaxpr and its calls, and collects steps."""

  def __init__(self):
    self.steps: list[Step] = []

  def inline(self, jaxpr: Any, consts: Sequence[Operand], inputs: Sequence[Operand]) -> list:
    """Records a jaxpr's equations; returns its outputs."""
    known: dict[Any, Operand] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Operand:
      if type(atom).__name__ == "Literal":
        return np.asarray(atom.val, atom.aval.dtype)
      return known[atom]

    for equation in jaxpr.eqns:
      found = self._record(equation, [read(atom) for atom in equation.invars])
      known.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _record(self, equation: Any, inputs: list[Operand]) -> Sequence[Operand]:
    name, params = equation.primitive.name, equation.params
    inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
    label = params.get("name") or ""
    if inner is not None and name not in ("while", "scan", "cond"):
      if not label.startswith(backend.OPERATOR):
        jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
        return self.inline(jaxpr, list(map(np.asarray, consts)), inputs)
      name, params = label, {}
    if name in ("stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint"):
      return inputs
    shapes = [tuple(var.aval.shape) for var in equation.outvars]
    if self._is_constant(equation, inputs, shapes):
      return _evaluate(equation, inputs)
    outputs = [
      Value(shape, var.aval.dtype) for shape, var in zip(shapes, equation.outvars, strict=True)
    ]
    self.steps.append(
      Step(name, inputs, outputs, {k: v for k, v in params.items() if k != "jaxpr"})
    )
    return outputs

  def _is_constant(self, equation: Any, inputs: list[Operand], shapes: Sequence) -> bool:
    if any(isinstance(operand, Value) for operand in inputs):
      return False
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    if any(n and n % BATCH == 0 for shape in shapes for n in shape):
      return False
    grown = equation.primitive.name in ("broadcast_in_dim", "iota")
    return not grown or max(sizes) <= _LARGEST_FOLDED


def _evaluate(equation: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
  with jax.ensure_compile_time_eval():
    found = equation.primitive.bind(*inputs, **equation.params)
  return [np.asarray(x) for x in (found if equation.primitive.multiple_results else [found])]


# --- One step for several primitives --------------------------------------------------------------


def _fuse(steps: list[Step], outputs: Sequence[Operand]) -> list[Step]:
  """Replaces what `_FUSED` recognises, and drops what is not read."""
  makers = {output: step for step in steps for output in step.outputs}
  fused = []
  for step in steps:
    for recognise in _FUSED.get(step.name, ()):
      found = recognise(step, makers)
      if found is not None:
        name, inputs, params = found
        step = Step(name, inputs, step.outputs, params)  # noqa: PLW2901
        makers[step.outputs[0]] = step
        break
    fused.append(step)
  read = {id(output) for output in outputs}
  kept = []
  for step in reversed(fused):
    if any(id(output) in read for output in step.outputs):
      read.update(id(operand) for operand in step.inputs)
      kept.append(step)
  return kept[::-1]


Makers = Mapping[Value, Step]
Found = tuple[str, list[Operand], dict[str, Any]] | None


def _made(operand: Operand, name: str, makers: Makers) -> Step | None:
  """The step that made an operand, if it has that name."""
  step = makers.get(operand) if isinstance(operand, Value) else None
  return step if step is not None and step.name == name else None


def _through(operand: Operand, names: Sequence[str], makers: Makers) -> Operand:
  """What an operand was before steps of these names."""
  while isinstance(operand, Value) and operand in makers and makers[operand].name in names:
    operand = next(
      (x for x in makers[operand].inputs if isinstance(x, Value)), makers[operand].inputs[0]
    )
  return operand


def _scalar(operand: Operand) -> float | None:
  """The number that a constant is everywhere."""
  if isinstance(operand, Value) or operand.size == 0:
    return None
  first = operand.ravel()[0]
  return float(first) if operand.dtype.kind in "fiu" and (operand == first).all() else None


def _times(step: Step | None, number: float | None = None) -> Operand | None:
  """The other factor of a product with a constant (of that value)."""
  if step is None:
    return None
  for one, other in (step.inputs, step.inputs[::-1]):
    found = _scalar(one)
    if found is not None and (number is None or np.isclose(found, number)):
      return other
  return None


def _mean(step: Step, makers: Makers) -> Found:
  """sum(x) / count."""
  total = _made(step.inputs[0], "reduce_sum", makers)
  if total is None:
    return None
  count = np.prod([total.inputs[0].shape[axis] for axis in total.params["axes"]])
  if _scalar(step.inputs[1]) != float(count):
    return None
  return "reduce_mean", total.inputs, {"axes": total.params["axes"]}


def _softmax(step: Step, makers: Makers) -> Found:
  """exp(x - max(x)) / sum(exp(x - max(x)))."""
  power = _made(step.inputs[0], "exp", makers)
  total = _made(
    _through(step.inputs[1], ("broadcast_in_dim", "reshape"), makers), "reduce_sum", makers
  )
  if power is None or total is None or total.inputs[0] is not step.inputs[0]:
    return None
  shifted = _made(power.inputs[0], "sub", makers)
  if shifted is None:
    return None
  most = _through(shifted.inputs[1], ("broadcast_in_dim", "reshape", "max"), makers)
  most = _made(most, "reduce_max", makers)
  axes = total.params["axes"]
  if most is None or most.inputs[0] is not shifted.inputs[0] or most.params["axes"] != axes:
    return None
  return ("softmax", [shifted.inputs[0]], {"axis": axes[0]}) if len(axes) == 1 else None


def _layer_norm(step: Step, makers: Makers) -> Found:
  """(x - mean(x)) * (rsqrt(var(x) + epsilon) * scale) + bias over the last axis."""
  for product, bias in (step.inputs, step.inputs[::-1]):
    product = _made(product, "mul", makers)  # noqa: PLW2901
    if product is None or isinstance(bias, Value):
      continue
    for centred, factor in (product.inputs, product.inputs[::-1]):
      centred, factor = _made(centred, "sub", makers), _made(factor, "mul", makers)  # noqa: PLW2901
      if centred is None or factor is None:
        continue
      for inverse, scale in (factor.inputs, factor.inputs[::-1]):
        inverse = _made(inverse, "rsqrt", makers)  # noqa: PLW2901
        if inverse is None or isinstance(scale, Value):
          continue
        found = _normalised(centred, inverse, makers)
        if found is not None:
          x, epsilon = found
          width = (x.shape[-1],)
          if scale.size == bias.size == width[0]:
            return (
              "layer_norm",
              [x, scale.reshape(width), bias.reshape(width)],
              {"epsilon": epsilon},
            )
  return None


def _normalised(centred: Step, inverse: Step, makers: Makers) -> tuple[Value, float] | None:
  """x and epsilon of (x - mean(x)) and rsqrt(var(x) + epsilon), over the last axis."""
  unbroadcast = ("broadcast_in_dim", "reshape")
  x = centred.inputs[0]
  mean = _made(_through(centred.inputs[1], unbroadcast, makers), "reduce_mean", makers)
  shifted = _made(inverse.inputs[0], "add", makers)
  if mean is None or shifted is None or mean.inputs[0] is not x:
    return None
  epsilon = next((n for n in map(_scalar, shifted.inputs) if n is not None), None)
  spread = _through(_times(shifted), unbroadcast, makers)
  if epsilon is None or mean.params["axes"] != (len(x.shape) - 1,):
    return None
  direct = _made(spread, "reduce_mean", makers)
  if direct is not None:  # mean((x - mean)^2)
    squares = _made(direct.inputs[0], "square", makers)
    squared = None if squares is None else _made(squares.inputs[0], "sub", makers)
    if squared is None or squared.inputs[0] is not x:
      return None
    other = _made(_through(squared.inputs[1], unbroadcast, makers), "reduce_mean", makers)
    return (x, epsilon) if other is mean else None
  positive = _made(spread, "max", makers)  # max(0, mean(x^2) - mean^2)
  difference = None if positive is None else _made(_times(positive, 0.0), "sub", makers)
  if difference is None:
    return None
  of_squares = _made(difference.inputs[0], "reduce_mean", makers)
  squares = None if of_squares is None else _made(of_squares.inputs[0], "square", makers)
  return (x, epsilon) if squares is not None and squares.inputs[0] is x else None


def _gelu(step: Step, makers: Makers) -> Found:
  """x / 2 * erfc(-x / sqrt(2))."""
  for half, tail in (step.inputs, step.inputs[::-1]):
    tail = _made(tail, "erfc", makers)  # noqa: PLW2901
    x = _times(_made(half, "mul", makers), 0.5)
    if tail is None or x is None:
      continue
    scaled = _times(_made(tail.inputs[0], "mul", makers), 0.5**0.5)
    if scaled is not None and _through(scaled, ("neg",), makers) is x:
      return "gelu", [x], {}
  return None


def _hard_swish(step: Step, makers: Makers) -> Found:
  """x * min(max(x + 3, 0), 6) / 6."""
  for x, gate in (step.inputs, step.inputs[::-1]):
    gate = _made(gate, "div", makers)  # noqa: PLW2901
    if gate is None or _scalar(gate.inputs[1]) != 6.0:
      continue
    lower = _times(_made(gate.inputs[0], "min", makers), 6.0)
    shifted = None if lower is None else _times(_made(lower, "max", makers), 0.0)
    if shifted is not None and _times(_made(shifted, "add", makers), 3.0) is x:
      return "hard_swish", [x], {}
  return None


# Name of the last primitive -> what it may be the end of.
_FUSED: dict[str, tuple[Callable[[Step, Makers], Found], ...]] = {
  "div": (_mean, _softmax),
  "add": (_layer_norm,),
  "mul": (_gelu, _hard_swish),
}
