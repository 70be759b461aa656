"""One evaluation loop for every task, for training and for `eval.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from effseg_jax.evaluators import EvaluationResult, Evaluator
from effseg_jax.ops import backend
from effseg_jax.training import sharding
from effseg_jax.training.state import Variables


class Evaluate(Protocol):
  """Evaluates variables over a data set, each example once."""

  def __call__(
    self, variables: Variables, on_batch: Callable[[], None] = lambda: None
  ) -> EvaluationResult:
    """Every process calls it; `on_batch` is called after each batch."""


def compile_evaluation(
  make: Callable[[], Evaluator],
  batches: Iterable[Mapping[str, np.ndarray]],
  mesh: Mesh,
) -> Evaluate:
  """Returns a function that evaluates variables over a data set, each example once.

  Args:
    make: gives an evaluator with nothing counted yet; all have the same step.
    batches: this process's part of each global batch, in the same order on every process.
    mesh: from `sharding.make_mesh`.
  """
  step = _jit(make().step, mesh)

  def evaluate(
    variables: Variables, on_batch: Callable[[], None] = lambda: None
  ) -> EvaluationResult:
    evaluator = make()
    for batch in batches:
      totals, examples = step(variables, sharding.put_batch(batch, mesh))
      totals = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), totals)
      evaluator.update(batch, totals, jax.tree.map(sharding.local_rows, examples))
      on_batch()
    return evaluator.result()

  return evaluate


def variables_on(variables: Any, mesh: Mesh) -> Any:
  """Puts host arrays on every device of the mesh."""
  return jax.device_put(jax.tree.map(jnp.asarray, dict(variables)), sharding.replicated(mesh))


def _jit(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Compiles a step: batches and examples sharded over the mesh, totals on every device."""
  cut, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def evaluation_step(variables: Variables, batch: Mapping[str, jax.Array]) -> Any:
    if mesh.size == 1:
      return step(variables, batch)
    with backend.several_devices(cut):
      return step(variables, batch)

  return jax.jit(evaluation_step, in_shardings=(None, cut), out_shardings=(everywhere, cut))
