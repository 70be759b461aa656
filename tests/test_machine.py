"""What a machine may lack: a home folder, a GPU that jax uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from effseg_jax import platform

_CACHE = "from effseg_jax import platform; print(platform.use_compilation_cache())"


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])
def test_without_a_home_nothing_is_kept(home):
  done = subprocess.run(
    [sys.executable, "-c", _CACHE],
    env={"HOME": home, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "None\n"
  assert done.stderr == ""


def test_without_an_account_nothing_is_kept(monkeypatch):
  def home():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setattr(platform.Path, "home", home)
  kept = []
  monkeypatch.setattr(platform, "_without_cache", lambda: kept.append(None))
  assert platform.use_compilation_cache() is None
  assert kept == [None]


def test_an_unused_gpu_is_told_with_the_cure(monkeypatch, tmp_path):
  import jax

  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setattr(platform, "_NVIDIA", (tmp_path / "nothing",))
  assert platform.unused_gpu() is None
  monkeypatch.setattr(platform, "_NVIDIA", (tmp_path,))
  before = jax.config.jax_platforms
  try:
    jax.config.update("jax_platforms", "")
    assert "pip install 'effseg_jax[cuda]'" in platform.unused_gpu()
  finally:
    jax.config.update("jax_platforms", before)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert platform.unused_gpu() is None
