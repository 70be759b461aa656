"""The folder of a run: one process writes there, and storage errors are reported in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from effseg_jax.errors import UserError

_LOCK = "run.lock"

# Errors of the storage, not of the program.
_REFUSALS = {
  errno.ENOSPC: "no space is left",
  errno.EDQUOT: "the quota is used up",
  errno.EROFS: "it is read-only",
  errno.EACCES: "permission is denied",
  errno.EPERM: "permission is denied",
  errno.EIO: "the storage does not answer",
  errno.ENOTDIR: "a part of the path is a file",
  errno.EEXIST: "it is a file",
  errno.ENOENT: "a folder above it cannot be made",
  # Of network file systems and mounted drives.
  errno.ENOTCONN: "it is not connected any more",
  errno.ECONNRESET: "the connection to the storage was lost",
  errno.ECONNABORTED: "the connection to the storage was lost",
  errno.EHOSTDOWN: "the storage's host is down",
  errno.EHOSTUNREACH: "the storage's host cannot be reached",
  errno.ENETUNREACH: "the storage's network cannot be reached",
  errno.ETIMEDOUT: "the storage does not answer in time",
  errno.ESTALE: "the storage has forgotten the file (a stale handle)",
  errno.EBUSY: "the storage is busy",
  errno.EAGAIN: "the storage is busy",
  errno.ENOLCK: "the storage has no locks left",
}


class Claim:
  """A working directory that this process alone writes to.

  The lock is one of the kernel's (`flock`), so it ends with the process that holds it, however that
  ends. Between hosts it holds where the shared file system passes locks on (NFS version 4 does;
  object stores mounted as folders do not).
  """

  def __init__(self, workdir: str | Path):
    """Makes the folder if it is missing, and claims it.

    Raises:
      UserError: if it cannot be written to, or if another process has it.
    """
    self._path = Path(workdir) / _LOCK
    with storage_errors(workdir):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = self._path.open("a+", encoding="utf-8")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      owner = _read_owner(self._file)
      if owner.get("pid") != os.getpid() or owner.get("host") != socket.gethostname():
        who = f"process {owner.get('pid', '?')} on {owner.get('host', 'another host')}"
        self._file.close()
        raise UserError(
          f"{workdir} is in use by {who}, which is still running; wait for its end, or choose"
          " another --workdir."
        ) from None
    except OSError as error:
      warnings.warn(
        f"{workdir} is on storage without locks ({error.strerror}); make sure that no second run"
        " uses it.",
        stacklevel=2,
      )
    with storage_errors(workdir):
      self._file.truncate(0)
      self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
      self._file.flush()

  def release(self) -> None:
    """Releases it."""
    self._file.close()


@contextlib.contextmanager
def storage_errors(folder: str | Path) -> Iterator[None]:
  """Turns a storage error into one line.

  Raises:
    UserError: for a full disk, a missing permission and the like; other errors pass.
  """
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    reason = _refusal(error)
    if isinstance(error, UserError) or reason is None:
      raise
    raise UserError(
      f"{folder} cannot be written to: {reason}. What was saved there before is intact; put this"
      " right or choose another --workdir, and start again: a run resumes from its last checkpoint."
    ) from None


def _refusal(error: Exception) -> str | None:
  """What went wrong, if it was the storage; the checkpoints' library tells the number in words."""
  if isinstance(error, OSError):
    return _REFUSALS.get(error.errno)
  for number, reason in _REFUSALS.items():
    if f"os_error_code='{number}'" in str(error) or os.strerror(number) in str(error):
      return reason
  return None


def _read_owner(file: IO[str]) -> dict[str, object]:
  file.seek(0)
  try:
    return json.loads(file.read())
  except ValueError:
    return {}
