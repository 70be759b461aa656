"""Contenders in processes of their own, timed in turns: A B C A B C.

Whatever disturbs the machine for a while then disturbs all of them, and no contender's threads or
allocator settings reach another. A worker builds once, writes one JSON line, and waits:

  worker  {"ready": {...facts...}}          or {"error": "why not"}
  parent  go 3
  worker  {"seconds": [...], "peak_bytes": n, "device_bytes": n or null}

The parent closes the worker's input when the race is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Result:
  """The measurements of one contender.

  Attributes:
    facts: reported by the worker when it was ready: `compile_seconds`, `temp_bytes`, `device`.
    seconds: per call, one median per round.
    peak_bytes: largest resident memory of the worker, building and compiling included.
    device_bytes: largest memory in use on an accelerator, or None.
  """

  facts: dict[str, Any]
  seconds: list[float] = dataclasses.field(default_factory=list)
  peak_bytes: int | None = None
  device_bytes: int | None = None


_FATAL = re.compile(r"F\d{4} ")  # how absl's C++ logging begins a message that ends the process


class WorkerFailed(Exception):
  """A contender could not be built or died; the message is one line."""


class Worker:
  """One contender's process."""

  def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
    """Starts it; `environment` is added to this process's."""
    self._errors = tempfile.TemporaryFile(  # noqa: SIM115 (closed with the process)
      mode="w+", encoding="utf-8", errors="replace"
    )
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      cwd=ROOT,
      env={**os.environ, **environment},
    )

  def ready(self) -> dict[str, Any]:
    """Waits until it is built; returns its facts."""
    return self._reply()["ready"]

  def go(self, calls: int) -> dict[str, Any]:
    """Lets it time `calls` calls."""
    try:
      self._process.stdin.write(f"go {calls}\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      raise WorkerFailed(self._last_words()) from None
    return self._reply()

  def close(self) -> None:
    """Ends it: politely, then not."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._errors.close()

  def _reply(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise WorkerFailed(self._last_words())
    reply = json.loads(line)
    if "error" in reply:
      raise WorkerFailed(reply["error"])
    return reply

  def _last_words(self) -> str:
    """The last lines that a process wrote to stderr before it died without a reply.

    A failed check in XLA's C++ is followed by a trace of the stack; the check is more informative.
    """
    status = self._process.wait()
    self._errors.seek(0)
    lines = [line.strip() for line in self._errors if line.strip()]
    fatal = [line for line in lines if _FATAL.match(line)]
    return f"exit status {status}" + "".join(f": {line}" for line in (fatal or lines)[-1:])


def race(
  commands: Mapping[str, Sequence[str]],
  *,
  rounds: int,
  calls: int,
  environment: Mapping[str, str] | None = None,
  say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> tuple[dict[str, Result], dict[str, str]]:
  """Builds the contenders one after the other, then times them in turns.

  Args:
    commands: contender -> command line of its worker.
    rounds: how often each has its turn.
    calls: timed calls in a turn; one before them is not timed, because the caches are another's.
    environment: variables for all workers.
    say: called with progress messages.

  Returns:
    The results, and for each contender that is left out the reason.
  """
  results: dict[str, Result] = {}
  left_out: dict[str, str] = {}
  with contextlib.ExitStack() as stack:
    workers = {}
    for name, command in commands.items():
      say(f"building {name} ...")
      worker = Worker(command, environment or {})
      stack.callback(worker.close)
      try:
        results[name] = Result(worker.ready())
        workers[name] = worker
      except WorkerFailed as failure:
        left_out[name] = str(failure)
    for number in range(rounds):
      say(f"round {number + 1} of {rounds}")
      for name, worker in list(workers.items()):
        try:
          reply = worker.go(calls)
        except WorkerFailed as failure:
          left_out[name] = str(failure)
          del workers[name], results[name]
          continue
        results[name].seconds.append(statistics.median(reply["seconds"]))
        results[name].peak_bytes = reply["peak_bytes"]
        results[name].device_bytes = reply["device_bytes"]
  return results, left_out
