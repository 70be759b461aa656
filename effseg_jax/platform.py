"""What the process asks of its host before the first array is made."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

# glibc's mallopt() parameter numbers.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_host_malloc() -> bool:
  """Keeps large blocks inside glibc's heap instead of mapping and unmapping each of them.

  XLA on the CPU allocates outputs and temporaries anew in every call. With the default
  settings each large block is an mmap whose pages fault again on every step, which costs up to
  20x on memory-bound operations. Linux with glibc only; memory use grows a little.

  Returns:
    True if the settings took effect.
  """
  if platform.system() != "Linux":
    return False
  try:
    libc = ctypes.CDLL("libc.so.6")
  except OSError:  # musl
    return False
  settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
  return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)


def use_compilation_cache(directory: str | os.PathLike[str] | None = None) -> Path:
  """Keeps compiled programs on disk, so that the second start of the same program is quick.

  Args:
    directory: where to; default `$JAX_COMPILATION_CACHE_DIR`, else `~/.cache/effseg_jax`.

  Returns:
    The directory.
  """
  import jax  # deferred: this module is imported before a device is chosen

  directory = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
  path = Path(directory) if directory else Path.home() / ".cache" / "effseg_jax"
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  return path
