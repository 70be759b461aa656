"""Several processes that are one run: how they find each other, and how they end together."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from effseg_jax.errors import UserError, friendly_exit
from effseg_jax.run import memory


def define_flags(values: flags.FlagValues) -> None:
  """The flags that connect processes started without a cluster's scheduler."""
  flags.DEFINE_string(
    "coordinator",
    None,
    "Several processes: host:port of process 0, the same for all of them.",
    flag_values=values,
  )
  flags.DEFINE_integer("num_processes", None, "Several processes: how many.", flag_values=values)
  flags.DEFINE_integer(
    "process_id", None, "Several processes: which one this is, from 0.", flag_values=values
  )


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Joins the other processes of the run, before the first use of a device.

  Args:
    coordinator: host:port of process 0. All three None: TPU hosts and the tasks of SLURM and Open
      MPI are found by jax, and everything else is one process alone.
    num_processes: how many there are.
    process_id: which one this is.

  Raises:
    UserError: for flags that do not fit together, or if the other processes cannot be reached.
  """
  import jax

  given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if _in_cluster():
      jax.distributed.initialize()
    return
  if missing:
    raise UserError(
      f"{' and '.join(missing)} missing; the three flags of several processes go"
      " together: --coordinator=HOST:PORT --num_processes=N --process_id=I."
    )
  if not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id={process_id} of --num_processes={num_processes}; expected 0 to"
      f" {num_processes - 1}."
    )
  if ":" not in coordinator:
    raise UserError(f"--coordinator={coordinator}; expected host:port, 10.0.0.1:8476 for example.")
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f"--coordinator={coordinator}: process {process_id} of {num_processes} found nobody"
      f" ({reason})."
    ) from None


def agree(error: UserError | None) -> None:
  """Raises an error of one process on all of them, so that none waits for it forever.

  Every process calls it at the same place.

  Args:
    error: the error of this process, if any.

  Raises:
    UserError: if there was an error anywhere; the message of the first process that had one.
  """
  import jax
  from jax.experimental import multihost_utils

  if jax.process_count() > 1:
    text = np.zeros(1024, np.uint8)
    message = (str(error) if error else "").encode()[: len(text)]
    text[: len(message)] = np.frombuffer(message, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(text))
    found = [(i, row.tobytes().rstrip(b"\0").decode(errors="ignore")) for i, row in enumerate(rows)]
    told = [f"process {index}: {words}" for index, words in found if words]
    error = UserError(told[0]) if told else None
  if error is not None:
    raise error


def require_same(found: Mapping[str, Any], what: str) -> None:
  """Raises `UserError` if processes differ, for example by another data set on one host.

  Every process calls it at the same place.

  Args:
    found: JSON-compatible, by name.
    what: the subject of the message.
  """
  import jax
  from jax.experimental import multihost_utils

  if jax.process_count() == 1:
    return
  lines = [f"{name} = {json.dumps(value, sort_keys=True)}" for name, value in found.items()]
  digests = [hashlib.sha256(line.encode()).digest() for line in lines]
  rows = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint8))
  rows = np.asarray(rows).reshape(jax.process_count(), len(lines), -1)
  different = np.argwhere((rows != rows[0]).any(axis=-1))
  error = None
  if len(different):
    process, line = map(int, different[0])
    error = UserError(
      f"{what} of process {process} differ from those of process 0: here {lines[line][:200]}."
      " All processes need the same files and the same command."
    )
  agree(error)


def any_of(flag: bool) -> bool:
  """Whether a flag is true on any process; every process calls it at the same place."""
  import jax
  from jax.experimental import multihost_utils

  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def location() -> str:
  """Which process on which host this is, for messages."""
  import jax

  return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


@contextlib.contextmanager
def run(values: flags.FlagValues) -> Iterator[None]:
  """Joins the other processes, and ends all of them if one fails.

  On failure, exits immediately instead of going through jax's shutdown barrier, which would block
  for minutes; the coordination service then terminates the other processes.

  Args:
    values: parsed flags of `define_flags`.
  """
  logging.set_verbosity(logging.ERROR)  # jax tells where it connects to
  with friendly_exit():
    start(values.coordinator, values.num_processes, values.process_id)
    try:
      yield
    except UserError as error:
      if not _several():
        raise
      print(f"error: {error}", file=sys.stderr, flush=True)
      _leave(2)
    except BaseException as error:
      if not _several():
        raise
      text = memory.explanation(error)
      if text is not None:
        print(f"error: {location()}: {text}", file=sys.stderr, flush=True)
        _leave(2)
      traceback.print_exc()
      if "JaxRuntimeError" in type(error).__name__:
        print(
          "error: another process of this run has ended or does not answer; its own message says"
          " why. Start all of them again: the run resumes from its last checkpoint.",
          file=sys.stderr,
        )
      _leave(1)


def _several() -> bool:
  import jax

  return jax.distributed.is_initialized() and jax.process_count() > 1


def _leave(status: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _in_cluster() -> bool:
  """Whether a scheduler has started several processes that jax can join."""
  environment = os.environ
  # Within a step of srun alone: a batch script's own shell has the other variables, too.
  if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
    return True
  if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
    return True
  chips = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*"))
  wanted = environment.get("JAX_PLATFORMS", "tpu").split(",")
  return bool(chips) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None
