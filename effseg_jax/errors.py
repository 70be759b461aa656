"""The error that is meant for users.

A wrong flag, a missing data set or a corrupt file raises `UserError`; its message says what was
found, what was expected and what to do. The command-line entry points print that message alone,
without a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator


class UserError(ValueError):
  """A mistake in the user's input: the message is the whole explanation."""


class DataWarning(UserWarning):
  """What is odd about a data set and does not stop a run; the commands print it as one line."""


_warned: set[str] = set()


def warn_once(key: str, message: str) -> None:
  """Issues a `DataWarning`, once per process for each key: what is said of one file of a kind."""
  if key not in _warned:
    _warned.add(key)
    warnings.warn(message, DataWarning, stacklevel=3)


def suggestion(name: str, known: Iterable[str]) -> str:
  """Returns `" Did you mean 'x'?"` for the closest known name, or an empty string."""
  match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" Did you mean {match[0]!r}?" if match else ""


def require_one_of(field: str, value: str, known: Iterable[str]) -> None:
  """Raises `UserError` for a word that is none of the known ones."""
  known = tuple(known)
  if value not in known:
    raise UserError(
      f"{field} is {value!r}; expected one of {', '.join(known)}.{suggestion(value, known)}"
    )


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
  """Names the extra that provides an optional dependency which is imported inside the block.

  `with extra("audio"): import soundfile`

  Args:
    name: the extra of `pyproject.toml` that lists the imported packages.

  Raises:
    UserError: if one of them is not installed.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    raise UserError(
      f"{package} is not installed; it belongs to an extra: pip install 'effseg_jax[{name}]'."
    ) from None


@contextlib.contextmanager
def friendly_exit() -> Iterator[None]:
  """Turns a `UserError` into one line on stderr and exit status 2; Ctrl-C into status 130."""
  try:
    yield
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
