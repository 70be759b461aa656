"""Runs the repository's commands as a user does, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]

# One device, and programs that compile in half the time and run a little slower. All commands
# share the cache of the tests' own process.
ENVIRONMENT = {
  **os.environ,
  "JAX_PLATFORMS": "cpu",
  "JAX_NUM_CPU_DEVICES": "1",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
  """Runs `python ARGUMENTS` in the repository; output and errors are text."""
  words = [sys.executable, *map(str, arguments)]
  return subprocess.run(
    words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
  )


def succeed(*arguments: object) -> str:
  """Runs a command that must end well; returns what it printed."""
  done = command(*arguments)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def call(name: str, *words: object) -> None:
  """Runs a command in this process.

  Raises:
    SystemExit: if its exit status is not 0.
  """
  from effseg_jax import cli

  try:
    cli.execute(name, [*map(str, words)])
  except SystemExit as end:
    if end.code:
      raise


def fail(*arguments: object) -> str:
  """Runs a command that must end in one line; returns the line."""
  done = command(*arguments)
  assert done.returncode == 2, done.stdout + done.stderr
  assert "Traceback" not in done.stderr
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ")
  return line
