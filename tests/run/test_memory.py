"""Running out of memory is one line, and nothing else is mistaken for it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from effseg_jax import cli
from effseg_jax.errors import UserError
from effseg_jax.run.memory import explanation, memory_errors

MESSAGES = (
  "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\n [tf-allocator]",
  "RESOURCE_EXHAUSTED: Failed to allocate request for 1.50GiB (1610612736B) on device ordinal 0",
  "INTERNAL: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_full_device_is_one_line(message):
  with pytest.raises(UserError) as caught, memory_errors():
    raise jax.errors.JaxRuntimeError(message)
  said = str(caught.value)
  assert said.startswith("out of memory")
  assert "\n" not in said
  for remedy in ("batch_size", "train.accumulate", "model.remat", "bfloat16", "--dry_run"):
    assert remedy in said
  if "allocate" in message:
    assert "while 17179869184 bytes" in said or "while 1.50GiB" in said


def test_a_full_host_is_one_line():
  with (
    pytest.raises(UserError, match=r"^out of memory"),
    memory_errors(),
  ):
    np.zeros((2**60,), np.int8)


def test_other_errors_pass():
  for error in (
    jax.errors.JaxRuntimeError("INTERNAL: broken"),
    ValueError("Out of memory"),
    OSError(),
  ):
    assert explanation(error) is None
    with pytest.raises(type(error)), memory_errors():
      raise error


class Command:
  """A command that needs more than there is."""

  __doc__ = "Fails."

  @staticmethod
  def define_flags(values):
    """Has none."""

  @staticmethod
  def run(values, arguments):
    raise MemoryError


def test_every_command_says_so(capsys):
  with pytest.raises(SystemExit) as end:
    cli.execute_module(Command, "effseg command", [])
  assert end.value.code == 2
  assert capsys.readouterr().err.startswith("error: out of memory")


def test_windows_is_refused_in_one_line(monkeypatch, capsys):
  monkeypatch.setattr(cli.sys, "platform", "win32")
  with pytest.raises(SystemExit) as end:
    cli.execute_module(Command, "effseg command", [])
  assert end.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "WSL2" in line
