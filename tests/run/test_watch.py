"""Speed, stalls, slow hosts and traces."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax.errors import UserError
from effseg_jax.run import chips, watch
from effseg_jax.run.pace import Pace, Split
from effseg_jax.run.profile import StepProfiler
from effseg_jax.run.watch import Watch, falling_behind


def test_the_time_of_a_step_is_split(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: clock[0])
  pace = Pace(step_number=7)
  for _ in range(2):
    with pace.waiting("data"):
      assert pace.phase == "data"
      clock[0] += 1.0
    with pace.waiting("device"):
      clock[0] += 4.0
    clock[0] += 0.5
    pace.step()
  with pace.pause("the evaluation"):
    assert pace.phase == "the evaluation"
    clock[0] += 100.0
  assert pace.split() == Split(total=5.5, data=1.0, device=4.0, host=0.5)
  assert pace.step_number == 9
  pace.restart()
  pace.step()
  clock[0] += 1.0
  assert pace.split() == Split(1.0, 0.0, 0.0, 1.0)


def _until(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_stall_is_reported_with_step_host_and_cause(tmp_path, capsys):
  pace = Pace(step_number=12)
  watching = Watch(pace, tmp_path, stall_seconds=0.05, heartbeat=0.0)
  said = []

  def told():
    said.append(capsys.readouterr().err)
    return "stalled" in "".join(said)

  with pace.waiting("data"):
    _until(told)
  watching.close()
  text = "".join(said)
  assert "warning: stalled after step 12: process 0 of 1 on " in text
  assert "for the next batch" in text
  assert not list(tmp_path.iterdir())


def test_signs_of_life_prevent_the_report(tmp_path, capsys):
  pace = Pace()
  watching = Watch(pace, tmp_path, stall_seconds=1.0, heartbeat=0.0)
  for _ in range(12):
    time.sleep(0.1)
    pace.touch()
  watching.close()
  assert "stalled" not in capsys.readouterr().err


def test_the_heartbeat_tells_step_and_phase(tmp_path):
  pace = Pace(step_number=3)
  watching = Watch(pace, tmp_path, stall_seconds=0.0, heartbeat=0.02)
  path = tmp_path / "heartbeat_0.json"
  with pace.pause("the checkpoint"):
    _until(lambda: path.is_file() and json.loads(path.read_text())["phase"] == "the checkpoint")
  watching.close()
  beat = json.loads(path.read_text())
  assert beat["step"] == 3
  assert {"time", "host", "pid", "process", "seconds_in_phase"} <= beat.keys()


def test_a_slow_host_is_found(monkeypatch):
  names = [np.frombuffer(name.ljust(64, b"\0"), np.uint8) for name in (b"a", b"b", b"c")]

  def gather(rows):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(
      watch.multihost_utils, "process_allgather", lambda _: (np.array(rows), np.array(names))
    )

  assert falling_behind(Split(1.0, 0.0, 0.9, 0.1)) is None  # alone
  gather([(1.0, 0.0, 0.9, 0.1)] * 3)
  assert falling_behind(Split(1.0, 0.0, 0.9, 0.1)) is None
  gather([(1.0, 0.0, 0.9, 0.1), (1.0, 0.7, 0.2, 0.1), (1.0, 0.0, 0.9, 0.1)])
  warning = falling_behind(Split(1.0, 0.0, 0.9, 0.1))
  assert "process 1 on b falls behind: it spends 0.70 s a step on waiting for data" in warning


def test_utilisation_is_against_the_device_that_is_there():
  device = lambda kind: SimpleNamespace(device_kind=kind)  # noqa: E731
  assert chips.peak_flops(device("TPU v5 lite")) == 197e12
  assert chips.peak_flops(device("TPU v5p")) == 459e12
  assert chips.peak_flops(device("NVIDIA H100 80GB HBM3")) == 989e12
  assert chips.peak_flops(device("cpu")) is None
  assert chips.speed(0.5, 1e14, device("TPU v4")) == {
    "flops_per_second_per_device": 2e14,
    "model_flops_utilisation": pytest.approx(2e14 / 275e12),
  }
  assert chips.speed(0.5, 1e14, device("cpu")) == {"flops_per_second_per_device": 2e14}
  assert chips.speed(0.5, 0.0, device("cpu")) == {}


def test_the_compiler_counts_a_product():
  program = jax.jit(jnp.dot).lower(jnp.ones((8, 16)), jnp.ones((16, 4))).compile()
  assert chips.flops_per_device(program) == pytest.approx(2 * 8 * 16 * 4, rel=0.1)


def test_chosen_steps_are_traced(tmp_path, capsys):
  profiler = StepProfiler("2:3", tmp_path)
  double = jax.jit(lambda x: x * 2)
  for step in range(1, 6):
    with profiler.step(step):
      double(jnp.ones(4)).block_until_ready()
    assert profiler._tracing == (step in (2, 3))
  profiler.close()
  traces = list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
  assert len(traces) == 1
  assert traces[0].stat().st_size > 0
  assert "tensorboard --logdir" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["x", "3:x", "5:5", "0:2"])
def test_steps_that_are_none_are_explained(tmp_path, steps):
  with pytest.raises(UserError, match="--profile"):
    StepProfiler(steps, tmp_path)
