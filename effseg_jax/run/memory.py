"""Memory that runs out, in one line instead of a library's traceback."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

from effseg_jax.errors import UserError

_SIGNS = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|Failed to allocate|ERROR_OUT_OF_MEMORY")
_REMEDIES = (
  "What helps: a smaller batch_size (in training --config.train.accumulate=N computes it in N parts"
  " instead), --config.model.remat=True, --config.model.dtype=bfloat16, smaller crops or scales."
  " effseg train --dry_run says what a step needs. If another process holds the device, set"
  " XLA_PYTHON_CLIENT_PREALLOCATE=false for both, or JAX_PLATFORMS=cpu here."
)


def explanation(error: BaseException) -> str | None:
  """What ran out and what helps, for an error that says that memory did; None for another one.

  Args:
    error: from jax, numpy or Python.
  """
  text = " ".join(str(error).split())
  from_jax = "JaxRuntimeError" in type(error).__name__ or "XlaRuntimeError" in type(error).__name__
  if not isinstance(error, MemoryError) and not (from_jax and _SIGNS.search(text)):
    return None
  size = re.search(r"allocat\w*(?: request for)? ([\d.]+ ?(?:[KMGT]i?B|bytes))", text)
  wanted = f" while {size[1]} more were requested" if size else ""
  return f"out of memory{_limit()}{wanted}. {_REMEDIES}"


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
  """Turns running out of memory into one line.

  Raises:
    UserError: in place of the library's error.
  """
  try:
    yield
  except Exception as error:
    text = explanation(error)
    if text is None:
      raise
    raise UserError(text) from None


def _limit() -> str:
  """The memory of a device, where jax is in use and says so."""
  jax = sys.modules.get("jax")
  try:
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
  except Exception:  # the device may be what is broken
    return ""
  return f": {device.device_kind} has {limit / 2**30:.1f} GiB" if limit else ""
