"""Stops a run whose gradient is not finite, and keeps the data to find the cause."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from effseg_jax.errors import UserError
from effseg_jax.run import processes
from effseg_jax.training import trees
from effseg_jax.training.state import TrainState
from effseg_jax.training.step import StepReport


def check_finite(
  previous: tuple[int, StepReport] | None, state: TrainState, on_nonfinite: str, workdir: str
) -> None:
  """Waits for a step, and stops a run whose loss or gradient is not finite.

  Args:
    previous: number and report of the step before the one that was just started.
    state: to save for inspection. The step with the bad gradient has left it unchanged.
    on_nonfinite: "stop", or "skip": the run continues, and the state counts such steps.
    workdir: where `nonfinite_<step>.npz` is written.

  Raises:
    UserError: naming the step and the parameters whose gradient is not finite.
  """
  if previous is None or bool(previous[1].finite) or on_nonfinite == "skip":
    return
  step, report = previous
  path = Path(workdir) / f"nonfinite_{step:06d}.npz"
  variables = dict(state.variables())
  if jax.process_count() > 1:
    variables = multihost_utils.process_allgather(variables, tiled=True)
  if jax.process_index() == 0:
    np.savez(path, **flatten_dict(jax.device_get(variables), sep="/"))
  names = trees.leaf_names(state.params)
  norms = np.asarray(report.gradient_norms)
  bad = [name for name, norm in zip(names, norms, strict=True) if not np.isfinite(norm)]
  shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
  raise UserError(
    f"step {step} ({processes.location()}): the loss is {float(report.scalars['loss']):g} and the"
    f" gradient is not finite in {len(bad)} of {len(names)} parameters ({shown}). The variables"
    f" are in {path}; the last checkpoint is intact. Lower the learning rate, set"
    " optimizer.clip_norm, or set --config.on_nonfinite=skip."
  )
