"""Several processes are one run: the same curve, one stop, and any number goes on from another."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import small_config
import tiny_run
from command import ENVIRONMENT, ROOT

from effseg_jax import experiment
from effseg_jax.cli import train
from effseg_jax.errors import UserError
from effseg_jax.run import finite, processes

STEPS, ONE_STOPS, TWO_STOP = 80, 12, 30
SETTINGS = {
  "train.num_steps": STEPS,
  "log.every": 1,
  "eval.every": 20,
  "checkpoint.every": 1000,
}


def run_here(workdir: Path, monkeypatch, terminate_at: int = 0, **settings: object) -> str:
  """Trains in this process, which has four devices; returns what was said."""
  monkeypatch.setattr(experiment, "make_model", experiment.make_model)
  monkeypatch.setattr(finite, "check_finite", finite.check_finite)
  tiny_run.use_net(terminate_at)
  config = small_config.get_config()
  config.update_from_flattened_dict({**SETTINGS, **settings})
  with contextlib.redirect_stdout(io.StringIO()) as said:
    train.train(config, str(workdir))
  return said.getvalue()


def run_together(workdir: Path, terminate_at: int = 0, **settings: object) -> list[str]:
  """Trains in two processes of two devices each; returns what each of them said."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  words = [sys.executable, "tests/tiny_run.py", "--config=tests/small_config.py"]
  words += [f"--config.{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
  words += [f"--workdir={workdir}", f"--coordinator=localhost:{port}", "--num_processes=2"]
  environment = {**ENVIRONMENT, "JAX_NUM_CPU_DEVICES": "2", "TERMINATE_AT": str(terminate_at)}
  started = [
    subprocess.Popen(
      [*words, f"--process_id={index}"],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    said = [process.communicate(timeout=240)[0] for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [0, 0], said
  return said


def curve(workdir: Path) -> dict[tuple[int, str], float]:
  """What is a function of the training, by step and name."""
  names = ("loss", "gradient_norm", "accuracy", "mIoU", "learning_rate")
  found = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    step = record.pop("step")
    found.update({(step, k): v for k, v in record.items() if k.endswith(names)})
  return found


def last_checkpoint(workdir: Path) -> int:
  return max(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_processes_and_devices_do_not_change_the_run(tmp_path, monkeypatch):
  run_here(tmp_path / "whole", monkeypatch)
  expected = curve(tmp_path / "whole")

  # One process on another mesh is told to stop; it saves first.
  workdir = tmp_path / "parts"
  before = signal.getsignal(signal.SIGTERM)
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "data.num_threads": 1}
  said = run_here(workdir, monkeypatch, terminate_at=ONE_STOPS, **mesh)
  assert "devices   4 x cpu (cpu): data 2, fsdp 2" in said
  assert last_checkpoint(workdir) == ONE_STOPS + 1
  assert signal.getsignal(signal.SIGTERM) is before

  # Two processes go on, and evaluate. One of them is told to stop: both do, at the same step.
  first, second = run_together(workdir, terminate_at=TWO_STOP)
  assert f"resuming from step {ONE_STOPS + 1}" in first
  assert "4 x cpu (cpu) of 2 processes" in first
  stopped = last_checkpoint(workdir)
  assert TWO_STOP <= stopped < STEPS
  assert f"stopped at step {stopped}" in first
  assert "stopped at" not in second  # only the first one talks

  # One process finishes what two have saved.
  said = run_here(workdir, monkeypatch)
  assert f"resuming from step {stopped}" in said

  found = curve(workdir)
  assert found.keys() == expected.keys()
  for (step, name), value in expected.items():
    # A pixel may fall on the other side; an example too many would move the metrics more.
    tolerance = {"abs": 1e-5, "rel": 0} if name == "train/loss" else {"abs": 1e-3, "rel": 1e-3}
    assert found[step, name] == pytest.approx(value, **tolerance), (step, name)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ((None, 2, None), "--coordinator and --process_id missing"),
    (("localhost:1", 2, 2), "--process_id=2 of --num_processes=2; expected 0 to 1"),
    (("localhost", 2, 0), "expected host:port"),
  ],
)
def test_flags_that_do_not_fit_are_explained(given, message):
  with pytest.raises(UserError, match=message):
    processes.start(*given)


def test_one_process_agrees_with_itself():
  processes.agree(None)
  with pytest.raises(UserError, match="mistake"):
    processes.agree(UserError("mistake"))
  assert processes.any_of(True)
  assert not processes.any_of(False)
