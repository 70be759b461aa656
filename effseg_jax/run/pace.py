"""Where the time of the steps goes, and what the run is busy with right now."""

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
  """Measures steps, leaving out what `pause` surrounds (evaluation, saving).

  Attributes:
    step_number: of the last finished step.
    phase: what the run is doing: "step", "data", "device" or what `pause` was told.
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
    """Says that the run is alive; called where one phase has many parts."""
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
    """Surrounds what does not count as training."""
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
