"""What a formulation is chosen for, platform and devices: asked here, and nowhere else."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_BATCH_IS_CUT: contextvars.ContextVar[bool] = contextvars.ContextVar("batch_is_cut", default=False)
_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
  """Returns `"cpu"`, `"gpu"` or `"tpu"`: where the function being traced is going to run.

  This is `jax.default_backend()` unless `target_platform` says otherwise. It is read while a
  function is traced, so it selects a formulation and costs nothing at run time.
  """
  return _PLATFORM.get() or jax.default_backend()


def batch_is_cut() -> bool:
  """Whether the function being traced is going to have a batch that several devices share."""
  return _BATCH_IS_CUT.get()


@contextlib.contextmanager
def several_devices() -> Iterator[None]:
  """Traces for devices that share a batch: without what cannot be cut along it."""
  token = _BATCH_IS_CUT.set(True)
  try:
    yield
  finally:
    _BATCH_IS_CUT.reset(token)


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
