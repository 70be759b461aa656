"""Settings of the process: memory allocation and the compilation cache."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import re
from pathlib import Path

from effseg_jax.errors import UserError

# Leaves the allocator alone ("off"), or only huge pages out ("heap"); unset or "huge": both.
MALLOC_VARIABLE = "EFFSEG_MALLOC"

# glibc's mallopt() parameter numbers.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Where the driver of an NVIDIA GPU shows itself.
_NVIDIA = (Path("/proc/driver/nvidia/gpus"), Path("/dev/nvidia0"))
# Address space of the heap for which huge pages are requested; memory is used once it is written.
_HUGE_HEAP = 4 << 30


@functools.cache
def tune_host_malloc() -> bool:
  """Keeps large blocks inside glibc's heap, and requests huge pages for it.

  XLA on the CPU allocates outputs and temporaries anew in every call. With the default settings
  each large block is an mmap whose pages fault again on every step, which costs up to 20x on
  memory-bound operations. All threads share one heap: in an arena of its own, glibc maps what
  exceeds 64 MB whatever the settings say, and it depends on the thread whether a process is slow.
  The heap never shrinks afterwards. Where Linux gives huge pages on
  request only (`madvise`), the next 4 GiB of the heap request them: one fault then fills 2 MB.

  `create_model`, `load_weights` and the commands call it; later calls do nothing. The environment
  variable `EFFSEG_MALLOC=off` leaves the allocator as it is, `EFFSEG_MALLOC=heap` only huge pages.
  Linux with glibc only.

  Returns:
    True if the settings of the heap took effect.

  Raises:
    UserError: for another value of the variable.
  """
  choice = os.environ.get(MALLOC_VARIABLE) or "huge"
  if choice not in ("off", "heap", "huge"):
    raise UserError(f"{MALLOC_VARIABLE} is {choice!r}; expected off, heap or huge.")
  if choice == "off" or platform.system() != "Linux":
    return False
  try:
    libc = ctypes.CDLL("libc.so.6")
  except OSError:  # musl
    return False
  # A threshold of -1 turns trimming off.
  settings = (
    (_M_ARENA_MAX, 1),
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, -1),
    (_M_TOP_PAD, 64 << 20),
  )
  kept = all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)
  if kept and choice == "huge" and huge_pages() == "madvise":
    _request_huge_pages(libc)
  return kept


def huge_pages() -> str:
  """When Linux uses transparent huge pages: `always`, `madvise` or `never`; empty: not known."""
  try:
    found = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text(encoding="ascii"))
  except OSError:
    return ""
  return found[1] if found else ""


def _request_huge_pages(libc: ctypes.CDLL) -> None:
  """Grows the heap without writing to it, and marks what was added; failing changes nothing."""
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  block = libc.malloc(_HUGE_HEAP)
  if not block:  # a limit on address space
    return
  begin = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
  libc.madvise(begin, block + _HUGE_HEAP - begin - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
  libc.free(block)


def use_compilation_cache(directory: str | os.PathLike[str] | None = None) -> Path | None:
  """Keeps compiled programs on disk, so that the second start of the same program is quick.

  Args:
    directory: where to; default `$JAX_COMPILATION_CACHE_DIR`, else `~/.cache/effseg_jax`.

  Returns:
    The directory; None where it cannot be written to, or there is no home folder: then nothing is
    kept.
  """
  directory = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
  try:
    if directory and "://" in str(directory):  # a bucket, which jax opens itself
      return _cache_in(str(directory))
    path = Path(directory) if directory else Path.home() / ".cache" / "effseg_jax"
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
      return _without_cache()
  except (OSError, RuntimeError):  # RuntimeError: no account, hence no home
    return _without_cache()
  return _cache_in(str(path))


def _cache_in(place: str) -> Path:
  import jax

  jax.config.update("jax_compilation_cache_dir", place)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  return Path(place)


def _without_cache() -> None:
  import jax

  jax.config.update("jax_compilation_cache_dir", None)


def unused_gpu() -> str | None:
  """A note where jax computes on the CPU although the machine has an NVIDIA GPU, and the cure."""
  import jax

  platforms = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
  if jax.default_backend() != "cpu" or platforms or not any(path.exists() for path in _NVIDIA):
    return None
  return (
    "note: this machine has an NVIDIA GPU, but jax does not use it and computes on the CPU."
    " pip install 'effseg_jax[cuda]' installs what is missing (or JAX_PLATFORMS=cpu says that the"
    " CPU is meant); nvidia-smi shows whether the driver works."
  )
