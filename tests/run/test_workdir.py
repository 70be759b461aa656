"""The folder of a run: nobody else's, and storage that refuses is told in a line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from effseg_jax.errors import UserError
from effseg_jax.run import workdir
from effseg_jax.run.workdir import Claim, storage_errors

# Another process claims the folder, says so, and waits to be killed.
_OTHER = """
import sys, time
from effseg_jax.run.workdir import Claim
claim = Claim(sys.argv[1])
print("claimed", flush=True)
time.sleep(60)
"""


def test_another_process_keeps_us_out_until_it_is_dead(tmp_path):
  other = subprocess.Popen(
    [sys.executable, "-c", _OTHER, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  try:
    assert other.stdout.readline() == "claimed\n"
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on .* still running"):
      Claim(tmp_path)
  finally:
    other.kill()
    other.communicate()
  Claim(tmp_path).release()  # what it left behind does not block


def test_a_claim_of_this_process_is_no_obstacle(tmp_path):
  """A notebook may have been interrupted in the middle of a run."""
  first = Claim(tmp_path)
  Claim(tmp_path).release()
  first.release()


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / "file").write_text("")
  for name in ("file", "file/run"):
    with pytest.raises(UserError, match=r"cannot be written to: .*file"):
      Claim(tmp_path / name)


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("RESOURCE_EXHAUSTED: failed to write [os_error_code='28']"),
    RuntimeError(f"writing: {os.strerror(errno.ENOSPC)}"),
  ],
)
def test_a_full_disk_is_one_line(error):
  expected = pytest.raises(UserError, match="runs/x cannot be written to: no space is left")
  with expected, storage_errors("runs/x"):
    raise error


@pytest.mark.parametrize(
  "name", ["ENOTCONN", "ESTALE", "ETIMEDOUT", "EBUSY", "ECONNRESET", "EAGAIN", "ENOLCK"]
)
def test_what_network_file_systems_say_is_one_line(name):
  number = getattr(errno, name)
  with (
    pytest.raises(UserError, match="resumes from its last checkpoint"),
    storage_errors("/content/drive/run"),
  ):
    raise OSError(number, os.strerror(number))


def test_other_errors_stay_what_they_are():
  for error in (ValueError("shapes differ"), OSError(errno.EPIPE, "broken pipe"), UserError("x")):
    with pytest.raises(type(error)) as caught, storage_errors("runs/x"):
      raise error
    assert caught.value is error


def test_storage_without_locks_is_a_warning(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(workdir.fcntl, "flock", refuse)
  with pytest.warns(UserWarning, match="without locks"):
    Claim(tmp_path).release()
