"""Time per step by phase (throughput), and the current phase of the run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Split(NamedTuple):
  """Mean seconds of a step, by what the training loop waited for.

  Attributes:
    total: of a step.
    data: until the next batch was on the devices; 0 while the input pipeline keeps up.
    device: until the devices had finished the step before. While this is most of the total, the
      devices are never idle.
    host: the rest: starting steps, logging.
  """

  total: float
  data: float
  device: float
  host: float


class Pace:
  """Measures steps, excluding the parts inside `pause` (evaluation, saving).

  Attributes:
    step_number: of the last finished step.
    phase: the current one: "step", "data", "device" or the argument of `pause`.
    since: `time.monotonic()` of the last sign of life: a step, a phase, or `touch`.
  """

  def __init__(self, step_number: int = 0) -> None:
    self.step_number, self.phase = step_number, "step"
    self.restart()

  def restart(self) -> None:
    """Begins a new window."""
    self._start, self._steps = time.monotonic(), 0
    self._waited = {"data": 0.0, "device": 0.0}
    self.touch()

  def step(self) -> None:
    """Counts one step."""
    self._steps += 1
    self.step_number += 1
    self.touch()

  def touch(self) -> None:
    """Marks the run as alive; called repeatedly in a phase with many parts."""
    self.since = time.monotonic()

  @contextlib.contextmanager
  def waiting(self, phase: str) -> Iterator[None]:
    """Surrounds a wait for "data" or "device"."""
    begin = time.monotonic()
    with self._in(phase), jax.profiler.TraceAnnotation(f"wait for {phase}"):
      yield
    self._waited[phase] += time.monotonic() - begin

  @contextlib.contextmanager
  def pause(self, phase: str) -> Iterator[None]:
    """Surrounds work that does not count as training."""
    begin = time.monotonic()
    with self._in(phase):
      yield
    self._start += time.monotonic() - begin

  def split(self) -> Split:
    """Means over the window."""
    steps = max(self._steps, 1)
    total = max(time.monotonic() - self._start, 1e-9) / steps
    data, device = self._waited["data"] / steps, self._waited["device"] / steps
    return Split(total, data, device, max(total - data - device, 0.0))

  @contextlib.contextmanager
  def _in(self, phase: str) -> Iterator[None]:
    self.phase = phase
    self.touch()
    yield
    self.phase = "step"
    self.touch()
