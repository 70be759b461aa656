"""The platform and devices that formulations are chosen for; the only place that queries them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# How the names of `as_operator` begin in a traced function.
OPERATOR = "operator:"

_BATCH: contextvars.ContextVar[NamedSharding | None] = contextvars.ContextVar("batch", default=None)
_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
  """Returns `"cpu"`, `"gpu"`, `"tpu"` or `"export"`: where the function being traced will run.

  This is `jax.default_backend()` unless `target_platform` says otherwise. It is read while a
  function is traced, so it selects a formulation and costs nothing at run time. "export" stands for
  inference runtimes such as ONNX Runtime: plain convolutions, pools and resizes, which they know.
  """
  return _PLATFORM.get() or jax.default_backend()


def as_operator(name: str, function: Callable[..., Any], *arrays: Any) -> Any:
  """Calls a function; traced for "export", the call stays one step of that name.

  Inference runtimes have operators for some of what XLA is given as many. An exporter that knows
  the name writes its operator, and any other one finds the function behind it.

  Args:
    name: of the operator, with its settings: "resize_bilinear:half_pixel".
    function: of `arrays`.
    *arrays: what the operator works on.
  """
  if platform() != "export":
    return function(*arrays)

  def call(*arrays: Any) -> Any:
    return function(*arrays)

  call.__name__ = call.__qualname__ = OPERATOR + name
  return jax.jit(call)(*arrays)


def batch_is_cut() -> bool:
  """Whether the function being traced is going to have a batch that several devices share."""
  return _BATCH.get() is not None


def on_each_device(function: Callable[..., Any], axis: int) -> Callable[..., Any]:
  """Runs a function on every device's shard of the batch independently.

  A loop that ends when the last example is done would otherwise ask all devices in every turn.

  Args:
    function: of arrays, to arrays, each with the batch along `axis`.
    axis: the same for all.
  """
  batch = _BATCH.get()
  if batch is None:
    return function
  spec = PartitionSpec(*[None] * axis, batch.spec[0])
  return jax.shard_map(function, mesh=batch.mesh, in_specs=spec, out_specs=spec, check_vma=False)


@contextlib.contextmanager
def several_devices(batch: NamedSharding) -> Iterator[None]:
  """Traces for devices that share a batch: avoids operations that cannot be sharded along it.

  Args:
    batch: how its leading axis is sharded.
  """
  token = _BATCH.set(batch)
  try:
    yield
  finally:
    _BATCH.reset(token)


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
