"""The one error a user is meant to read.

A wrong flag, a missing data set or a corrupt file raises `UserError`; its message says what was
found, what was expected and what to do. The command-line entry points print that message alone,
without a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class UserError(ValueError):
  """A mistake in what the user gave us: the message is the whole explanation."""


def suggestion(name: str, known: Iterable[str]) -> str:
  """Returns `" Did you mean 'x'?"` for the closest known name, or an empty string."""
  match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" Did you mean {match[0]!r}?" if match else ""


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


def parse_flags(argv: list[str]) -> list[str]:
  """Parses absl flags for `app.run(main, flags_parser=parse_flags)`; a mistake is one line.

  A misspelt field of a configuration would otherwise end in a traceback of ml_collections. A field
  of several words can be written plainly: `--config.model.stage_types=attn,attn`.
  """
  from absl import flags

  with friendly_exit():
    try:
      rest = flags.FLAGS(argv)
      if "config" in flags.FLAGS and flags.FLAGS.config is not None:
        flags.FLAGS.config.is_locked  # noqa: B018 (a file that failed to load says so only now)
        _split_words(flags.FLAGS.config, argv)
      return rest
    except (flags.Error, AttributeError, KeyError, OSError) as error:
      cause: BaseException = error
      while cause.args and isinstance(cause.args[0], BaseException):
        cause = cause.args[0]
      text = str(cause.args[0] if len(cause.args) == 1 else cause)
      message = " ".join(line.strip() for line in text.splitlines())
      raise UserError(f"{message} (see --help)") from None


def _split_words(config: Any, argv: Sequence[str]) -> None:
  """Makes ("a", "b") of `--config.field=a,b`, which ml_collections takes for one word."""
  for argument in argv:
    match = re.fullmatch(r"--?config\.([\w.]+)=(\w+(?:,\w+)+)", argument)
    if match is None:
      continue
    *path, field = match[1].split(".")
    owner = config
    for name in path:
      owner = owner[name]
    if owner[field] == (match[2],):
      owner[field] = tuple(match[2].split(","))
