"""Detects stalled runs, and hosts that slow the others down."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from effseg_jax.run import processes
from effseg_jax.run.pace import Pace, Split

# How often the watch looks, in seconds.
_INTERVAL = 1.0


class Watch:
  """A thread that reports a stall, and writes a sign of life.

  A stall is reported on stderr with the step, the process, the host and what is waited for, and
  with the stacks of all threads; again after twice the time, and so on. Nothing is ended: what
  started the run decides that.
  """

  def __init__(self, pace: Pace, workdir: str | Path, *, stall_seconds: float, heartbeat: float):
    """Starts watching.

    Args:
      pace: of the run.
      workdir: heartbeats go to `heartbeat_<process>.json` there.
      stall_seconds: without a sign of life that are a stall; 0: stalls are not reported.
      heartbeat: seconds between two heartbeats; 0: none are written.
    """
    self._pace, self._limit, self._period = pace, stall_seconds, heartbeat
    self._path = Path(workdir) / f"heartbeat_{jax.process_index()}.json"
    self._where = processes.location()
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
    if stall_seconds or heartbeat:
      self._thread.start()

  def close(self) -> None:
    """Stops watching."""
    self._closing.set()
    if self._thread.is_alive():
      self._thread.join()

  def _watch(self) -> None:
    interval = min(period for period in (_INTERVAL, self._period, self._limit / 4) if period)
    told, written = 1.0, -float("inf")
    while not self._closing.wait(interval):
      now = time.monotonic()
      idle = now - self._pace.since
      if idle < self._limit:
        told = 1.0
      elif self._limit and idle >= told * self._limit:
        told *= 2
        self._report(idle)
      if self._period and now - written >= self._period:
        written = now
        self._beat(idle)

  def _report(self, idle: float) -> None:
    phase = {"data": "the next batch", "device": "the devices", "step": "the host"}
    print(
      f"warning: stalled after step {self._pace.step_number}: {self._where} has waited"
      f" {idle:.0f} s for {phase.get(self._pace.phase, self._pace.phase)}. Where its threads are:",
      file=sys.stderr,
      flush=True,
    )
    with contextlib.suppress(OSError, ValueError):  # stderr may be no real file, in a notebook
      faulthandler.dump_traceback(sys.stderr)

  def _beat(self, idle: float) -> None:
    beat = {
      "time": round(time.time(), 3),
      "step": self._pace.step_number,
      "phase": self._pace.phase,
      "seconds_in_phase": round(idle, 1),
      "process": jax.process_index(),
      "host": socket.gethostname(),
      "pid": os.getpid(),
    }
    new = self._path.with_suffix(".tmp")
    with contextlib.suppress(OSError):  # a full disk is reported where it matters
      new.write_text(json.dumps(beat) + "\n", encoding="utf-8")
      new.replace(self._path)


def falling_behind(split: Split) -> str | None:
  """Compares the processes; each of them calls it, at the same step.

  In a synchronous step the fast hosts wait for the slow one inside the device's time. So what tells
  is the time that a process spends on data and on itself.

  Args:
    split: of this process.

  Returns:
    A warning if one process needs a quarter of a step more than the median one, otherwise None.
  """
  if jax.process_count() == 1:
    return None
  name = np.frombuffer(socket.gethostname().encode()[:64].ljust(64, b"\0"), np.uint8)
  rows, names = multihost_utils.process_allgather((np.array(split, np.float32), name))
  data, host = np.asarray(rows)[:, 1], np.asarray(rows)[:, 3]
  own = data + host
  slowest = int(np.argmax(own))
  if own[slowest] - np.median(own) < 0.25 * split.total:
    return None
  where = np.asarray(names)[slowest].tobytes().rstrip(b"\0").decode()
  return (
    f"warning: process {slowest} on {where} falls behind: it spends {data[slowest]:.2f} s a step"
    f" on waiting for data and {host[slowest]:.2f} s on the host; the median process"
    f" {np.median(own):.2f} s"
  )
