"""Sweeps: plans, workers that die, failures, pruning, objectives, the table."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import call

optuna = pytest.importorskip("optuna")

from effseg_jax.configs import sweeps
from effseg_jax.errors import UserError
from effseg_jax.sweep import report, study, worker

TRAINER = Path(__file__).with_name("trainer.py")
RATE = "optimizer.learning_rate"


@pytest.fixture(autouse=True)
def trainer(monkeypatch):
  """Trials run in this process; the tests of killed workers start processes of their own."""
  module = runpy.run_path(str(TRAINER))
  monkeypatch.setattr(worker, "_train", lambda command, folder, lock: module["main"](command[1:]))


def _list(rates=(0.1, 0.9, 0.3), **options):
  return sweeps.Sweep("afformer/synthetic:tiny", sweeps.product({RATE: rates}), **options)


def _run(plan, workdir, **options):
  url = study.storage_url(workdir, None)
  workdir.mkdir(exist_ok=True)
  opened = study.create(plan, url, "mIoU", **options)
  worker.work(worker.Job(plan, url, workdir, ["--config.seed=3"], "mIoU"))
  return opened, report.results(plan, opened, workdir, "mIoU")


def _calls(workdir):
  return [p.read_text().count("called") for p in sorted(workdir.glob("*/calls"))]


def test_lists_of_trials():
  product = sweeps.product({"a": (1, 2), "b": (3, 4)})
  assert product == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
  assert sweeps.together({"a": (1, 2), "b": (3, 4)}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
  with pytest.raises(UserError, match="as many"):
    sweeps.together({"a": (1, 2), "b": (3,)})
  assert sweeps.combined([{"a": 1}], [{"b": 1}, {"b": 2}]) == [{"a": 1, "b": 1}, {"a": 1, "b": 2}]


def test_more_draws_begin_with_the_same():
  draws = {"lr": sweeps.log_uniform(1e-4, 1e-2), "kind": sweeps.one_of("abc")}
  few, many = sweeps.drawn(3, draws), sweeps.drawn(50, draws)
  assert many[:3] == few
  assert all(1e-4 <= trial["lr"] <= 1e-2 for trial in many)
  assert {trial["kind"] for trial in many} == set("abc")
  assert sum(trial["lr"] < 1e-3 for trial in many) > 15  # as many as above
  counts = sweeps.drawn(200, {"n": sweeps.integer(1, 4, log=True)})
  assert {trial["n"] for trial in counts} == {1, 2, 3, 4}


def test_a_failure_stops_no_other_and_is_run_again_on_request(tmp_path):
  opened, rows = _run(_list(), tmp_path)
  assert [row["state"] for row in rows] == ["finished", "finished", "failed"]
  assert [row["changes"][RATE] for row in rows] == [0.3, 0.1, 0.9]
  text = report.table(rows)
  assert "best mIoU, %" in text and "the loss is nan" in text
  _run(_list(), tmp_path)
  assert _calls(tmp_path) == [1, 1, 1]  # nothing runs twice

  (tmp_path / "01" / "repaired").touch()
  assert study.retry_failed(opened) == 1
  _, rows = _run(_list(), tmp_path)
  assert _calls(tmp_path) == [1, 2, 1]
  assert rows[0]["changes"][RATE] == 0.9 and rows[0]["state"] == "finished"
  assert study.retry_failed(opened) == 0


def test_a_list_has_one_plan(tmp_path):
  _run(_list((0.1,)), tmp_path)
  with pytest.raises(UserError, match="another sweep"):
    _run(_list((0.2,)), tmp_path)


def test_the_trial_of_a_dead_worker_is_resumed(tmp_path):
  plan, url = _list((0.1, 0.2)), study.storage_url(tmp_path, None)
  opened = study.create(plan, url, "mIoU")
  opened.ask()  # running by the storage's account, and nobody holds its lock
  _, rows = _run(plan, tmp_path)
  assert [row["state"] for row in rows] == ["finished", "finished"]
  assert _calls(tmp_path) == [1, 1]


def test_killed_workers_lose_nothing_and_repeat_nothing(tmp_path):
  rates = tuple(round(0.01 * k, 2) for k in range(1, 8))
  plan, url = _list(rates), study.storage_url(tmp_path, None)
  study.create(plan, url, "mIoU")
  code = (
    "import sys; from pathlib import Path; from effseg_jax.configs import sweeps;"
    "from effseg_jax.sweep import worker;"
    f"worker._TRAINER = [sys.executable, {str(TRAINER)!r}];"
    f"plan = sweeps.Sweep('afformer/synthetic:tiny', sweeps.product({{{RATE!r}: {rates!r}}}));"
    f"worker.work(worker.Job(plan, {url!r}, Path({str(tmp_path)!r}), [], 'mIoU'))"
  )
  environment = {**os.environ, "TRAINER_SECONDS": "0.3"}
  workers = [
    subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    for _ in range(3)
  ]
  deadline = time.monotonic() + 60
  while len(_calls(tmp_path)) < 3 and time.monotonic() < deadline:
    time.sleep(0.05)
  workers[0].send_signal(signal.SIGKILL)
  assert [process.wait(120) for process in workers[1:]] == [0, 0]
  workers[0].wait()
  rows = report.results(plan, study.join(plan, url), tmp_path, "mIoU")
  assert [row["state"] for row in rows] == ["finished"] * len(rates)
  assert rows[0]["changes"][RATE] == max(rates)
  # The trial of the killed worker may have been started a second time, and no other.
  assert sum(_calls(tmp_path)) <= len(rates) + 1


def test_asha_saves_steps_and_finds_the_same_best(tmp_path):
  rates = tuple(round(0.02 * k, 2) for k in range(20, 0, -1))
  pruned = _list(rates, pruner=sweeps.Pruner("asha", first_step=1, factor=2))
  _, rows = _run(pruned, tmp_path)
  assert rows[0]["changes"][RATE] == 0.4 and rows[0]["state"] == "finished"
  assert sum(row["steps"] for row in rows) <= 0.45 * 8 * len(rates)
  assert "of 20 trials to their end" in report.table(rows)


def test_a_search_with_a_condition_and_two_objectives(tmp_path):
  space = {
    RATE: sweeps.log_uniform(0.01, 0.4),
    "optimizer.name": sweeps.one_of(("adamw", "sgd")),
    "optimizer.b1": sweeps.when("optimizer.name", "adamw", sweeps.uniform(0.8, 0.95)),
    "data.augment.scale": sweeps.one_of(((64, 64), (96, 96))),
  }
  plan = sweeps.Search(
    "afformer/synthetic:tiny", space, 6, "nsga2", objectives=("mIoU", "train/speed")
  )
  opened, rows = _run(plan, tmp_path)
  assert {row["state"] for row in rows} == {"finished"}
  for row in rows:
    assert ("optimizer.b1" in row["changes"]) == (row["changes"]["optimizer.name"] == "adamw")
    assert row["values"]["train/speed"] == pytest.approx(1 / row["changes"][RATE])
  assert len(opened.best_trials) >= 1
  more, rows = _run(plan, tmp_path, count=8)
  assert len(rows) == 8 and sum(_calls(tmp_path)) == 8
  assert [path.name for path in report.plot(plan, more, tmp_path, "mIoU")] == ["pareto.png"]


def test_random_trials_do_not_depend_on_the_worker(tmp_path):
  plan = sweeps.Search("afformer/synthetic:tiny", {RATE: sweeps.uniform(0.1, 0.4)}, 3, "random")
  found = [sorted(r["changes"][RATE] for r in _run(plan, tmp_path / name)[1]) for name in "ab"]
  assert found[0] == found[1] and len(set(found[0])) == 3


def test_the_pictures(tmp_path):
  pytest.importorskip("matplotlib")
  plan = sweeps.Search("afformer/synthetic:tiny", {RATE: sweeps.uniform(0.1, 0.4)}, 4, "tpe")
  opened, _ = _run(plan, tmp_path)
  names = {path.stem for path in report.plot(plan, opened, tmp_path, "mIoU")}
  assert {"history", "curves", "parallel"} <= names


@pytest.mark.parametrize(
  ("plan", "hint"),
  [
    (_list(pruner=sweeps.Pruner("asah")), "Did you mean 'asha'"),
    (sweeps.Search("x", {RATE: sweeps.uniform(0, 1)}, 2, "tpee"), "Did you mean 'tpe'"),
    (sweeps.Search("x", {"a": sweeps.when("b", 1, sweeps.uniform(0, 1))}, 2), "stand before"),
    (sweeps.Search("x", {}, 2), "no trials"),
    (
      sweeps.Search(
        "x", {RATE: sweeps.uniform(0, 1)}, 2, "nsga2", sweeps.Pruner("asha"), ("mIoU", "x")
      ),
      "several objectives cannot prune",
    ),
  ],
)
def test_a_wrong_plan_is_one_line(tmp_path, plan, hint):
  with pytest.raises(UserError, match=hint):
    study.create(plan, study.storage_url(tmp_path, None), "mIoU")


@pytest.mark.parametrize(
  ("arguments", "hint"),
  [
    (["--sweep=configs/sweeps/none.py"], "does not exist"),
    (["--sweep=configs/afformer/synthetic.py"], "no get_sweep"),
    (["--sweep=afformer_lr", "--config.train.steps=4"], "train.steps"),
    (["--sweep=afformer_lr", "--lr=4"], "--lr=4"),
    ([], "--sweep"),
  ],
)
def test_a_mistake_ends_in_one_line(arguments, hint, capsys):
  with pytest.raises(SystemExit) as stopped:
    call("sweep", *arguments, "--print")
  assert stopped.value.code == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert hint in line


def test_printed_commands_are_all_there(capsys):
  call("sweep", "--sweep=configs/sweeps/afformer_lr.py", "--print", "--config.train.num_steps=8")
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 8
  assert all(line.startswith("effseg train --config=afformer/synthetic:tiny") for line in lines)
  assert all("--config.train.num_steps=8" in line for line in lines)


def test_results_are_json(tmp_path, monkeypatch, capsys):
  (tmp_path / "plan.py").write_text(
    "from effseg_jax.configs import sweeps\n"
    "def get_sweep():\n"
    f"  return sweeps.Sweep('afformer/synthetic:tiny', sweeps.product({{{RATE!r}: (0.1, 0.2)}}))\n"
  )
  call("sweep", f"--sweep={tmp_path / 'plan.py'}", f"--workdir={tmp_path / 'work'}")
  rows = json.loads((tmp_path / "work" / "results.json").read_text())
  assert [row["state"] for row in rows] == ["finished", "finished"]
  assert "trial 0" in capsys.readouterr().out
