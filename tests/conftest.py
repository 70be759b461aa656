"""Four virtual devices, a compilation cache and the allocator settings, before any test runs."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the suite's time, and its arrays are tiny: code is left unoptimised.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib") < "0.11":  # which no longer knows it; half the time to compile a training step
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])

import jax
import pytest

from effseg_jax import platform

ROOT = Path(__file__).resolve().parents[1]

platform.tune_host_malloc()
platform.use_compilation_cache(
  os.environ.get("JAX_COMPILATION_CACHE_DIR") or ROOT / ".cache" / "jax"
)
jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(scope="session")
def shared() -> Path:
  """The folder of real data and reference outputs beside the checkout; skips without it."""
  path = ROOT.parent / "shared"
  if not path.is_dir():
    pytest.skip("needs the shared reference folder beside the checkout")
  return path
