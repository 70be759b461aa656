"""A trace of chosen steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from effseg_jax.errors import UserError


class StepProfiler:
  """Traces host and devices of the first process in a range of steps.

  The trace has a span for each step, and one for each wait for data or for the devices (see
  `Pace.waiting`).
  """

  def __init__(self, steps: str | None, workdir: str | Path):
    """Plans the trace.

    Args:
      steps: "100:105" for the steps 100 to 104, "100" for one; None: no trace.
      workdir: the trace goes to `workdir/profile`.

    Raises:
      UserError: for another form.
    """
    self._first = self._end = 0
    self._folder, self._tracing = Path(workdir) / "profile", False
    if steps is None:
      return
    first, _, end = steps.partition(":")
    if not first.isdigit() or not (end or "1").isdigit():
      raise UserError(f"--profile={steps}; expected steps such as 100:105.")
    self._first, self._end = int(first), int(end or int(first) + 1)
    if not 0 < self._first < self._end:
      raise UserError(f"--profile={steps} holds no step; the first step is 1.")

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Surrounds the start of a step."""
    if self._first <= number < self._end and not self._tracing and jax.process_index() == 0:
      jax.profiler.start_trace(str(self._folder))
      self._tracing = True
    if number > self._end:  # when step n + 2 starts, the loop has waited for step n
      self.close()
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def close(self) -> None:
    """Writes the trace, if there is one to write."""
    if self._tracing:
      self._tracing, self._first = False, self._end
      jax.profiler.stop_trace()
      print(f"profile of the steps: {self._folder} (tensorboard --logdir={self._folder})")
