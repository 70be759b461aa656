"""The allocator's settings, each in a process of its own: what is set stays set."""

import os
import subprocess
import sys

import pytest

from effseg_jax import platform

# Whether the middle of a large block lies in the heap, and whether it requests huge pages there.
_LOOK = """
import re, threading
import numpy as np
from effseg_jax import platform
{first_use}
blocks = []
make = lambda: blocks.append(np.ones(96 << 20, np.uint8).__array_interface__["data"][0])
thread = threading.Thread(target=make)  # whose arena could be one of its own
thread.start()
thread.join()
block = blocks[0] + (48 << 20)
areas, heap = [], False
for line in open("/proc/self/smaps"):
  if re.match("[0-9a-f]+-", line):
    heap = "[heap]" in line
    if heap:
      areas.append([*(int(word, 16) for word in line.split()[0].split("-")), ""])
  elif heap and line.startswith("VmFlags:"):
    areas[-1][2] = line
print(
  any(begin <= block < end for begin, end, _ in areas),
  any(begin <= block < end and " hg" in flags for begin, end, flags in areas),
)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


def _look(first_use, choice):
  # numpy requests huge pages for large blocks by itself, unless it is asked not to.
  environment = {**os.environ, platform.MALLOC_VARIABLE: choice, "NUMPY_MADVISE_HUGEPAGE": "0"}
  result = subprocess.run(
    [sys.executable, "-c", _LOOK.format(first_use=first_use)],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  return result.stdout.split(), result.stderr


@pytest.mark.parametrize("choice", ["off", "heap", "huge"])
def test_the_variable_chooses(choice):
  found, _ = _look("platform.tune_host_malloc()", choice)
  requested = choice == "huge" and platform.huge_pages() == "madvise"
  assert found == [str(choice != "off"), str(requested)]


def test_creating_a_model_is_a_first_use():
  found, _ = _look("import effseg_jax; effseg_jax.create_model('afformer_tiny')", "heap")
  assert found == ["True", "False"]


def test_another_value_is_explained():
  found, error = _look("platform.tune_host_malloc()", "on")
  assert not found and "EFFSEG_MALLOC is 'on'; expected off, heap or huge." in error
