"""SIGTERM and Ctrl-C: the run saves, then ends."""

from __future__ import annotations

import os
import signal
import sys

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Turns the first Ctrl-C or SIGTERM into "save after this step, then stop".

  With `jax.distributed`, its preemption service listens to SIGTERM, and all processes stop at one
  step that they agree on, whichever of them received the signal; Ctrl-C is passed on to it.
  Otherwise the signals are handled here.
  """

  def __init__(self) -> None:
    """Listens from now on; in the main thread."""
    self._signalled = self._agreed = False
    self._together = jax.distributed.is_initialized()
    ours = {signal.SIGINT: self._remember, signal.SIGTERM: self._remember}
    if self._together:
      ours = {signal.SIGINT: self._pass_on}
    self._before = {number: signal.signal(number, handler) for number, handler in ours.items()}

  def at(self, step: int) -> bool:
    """Whether the run ends after this step; called once after each, by every process."""
    if self._together and not self._agreed:
      self._agreed = multihost_utils.reached_preemption_sync_point(step)
    return self._signalled or self._agreed

  def close(self) -> None:
    """Gives the signals back to whom they belonged."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _remember(self, number: int, _: object) -> None:
    self._signalled = True
    signal.signal(number, signal.default_int_handler)  # a second one does not wait
    print("stopping after this step ...", file=sys.stderr, flush=True)

  def _pass_on(self, number: int, _: object) -> None:
    signal.signal(number, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)
    print("stopping after a step that all processes agree on ...", file=sys.stderr, flush=True)
