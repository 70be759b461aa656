"""Which platform a formulation is chosen for: asked here, and nowhere else."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
  """Returns `"cpu"`, `"gpu"` or `"tpu"`: where the function being traced is going to run.

  This is `jax.default_backend()` unless `target_platform` says otherwise. It is read while a
  function is traced, so it selects a formulation and costs nothing at run time.
  """
  return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def target_platform(name: str) -> Iterator[None]:
  """Traces for another platform than the default one (compiling ahead of time, and tests).

  `jax.jit` keys its cache on the function and its arguments, not on this choice: give each
  platform a jitted function of its own.
  """
  token = _PLATFORM.set(name)
  try:
    yield
  finally:
    _PLATFORM.reset(token)
