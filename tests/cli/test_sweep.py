"""Sweeps: lists of trials, running them, going on, failures, the table and the plot."""

import pytest
from command import call

from effseg_jax.cli import sweep
from effseg_jax.configs import sweeps
from effseg_jax.errors import UserError

# Stands for train.py: finishes at once, or fails, as the trial says.
TRAINER = """
import json, pathlib, sys
values = dict(word[2:].split("=", 1) for word in sys.argv[1:])
rate = float(values["config.optimizer.learning_rate"])
workdir = pathlib.Path(values["workdir"])
with (workdir / "calls").open("a") as calls:
  calls.write("called\\n")
if rate > 0.5 and not (workdir / "repaired").exists():
  sys.exit("error: step 3: the loss is nan")
with (workdir / "metrics.jsonl").open("w") as log:
  for step, value in ((4, rate / 2), (8, rate)):
    log.write(json.dumps({"step": step, "eval/mIoU": value}) + "\\n")
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
  path = tmp_path / "trainer.py"
  path.write_text(TRAINER)
  monkeypatch.setattr(sweep, "_TRAINER", str(path))
  return path


def _trials(workdir, rates=(0.1, 0.9, 0.3)):
  plan = sweeps.Sweep(
    "configs/afformer/synthetic.py:tiny",
    sweeps.product({"optimizer.learning_rate": rates, "train.num_steps": (8,)}),
  )
  return sweep.make_trials(plan, workdir, {"seed": "3"})


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


def test_a_trial_is_a_command(tmp_path):
  trials = _trials(tmp_path)
  assert [trial.name for trial in trials] == [
    "0_learning_rate=0.1",
    "1_learning_rate=0.9",
    "2_learning_rate=0.3",
  ]
  assert trials[0].num_steps == 8 and trials[0].metric == "mIoU"
  assert trials[0].command[1:] == [
    "--config=configs/afformer/synthetic.py:tiny",
    f"--workdir={tmp_path / '0_learning_rate=0.1'}",
    "--config.optimizer.learning_rate=0.1",
    "--config.train.num_steps=8",
    "--config.seed=3",
  ]


def test_trials_need_not_change_the_same_fields(tmp_path, trainer):
  rates = sweeps.product({"optimizer.learning_rate": (0.1, 0.3)})
  more = [{"optimizer.learning_rate": 0.2, "train.batch_size": 16}]
  plan = sweeps.Sweep("configs/afformer/synthetic.py:tiny", rates + more)
  trials = sweep.make_trials(plan, tmp_path, {"train.num_steps": "8"})
  assert trials[0].name == "0_learning_rate=0.1"
  assert trials[2].name == "2_learning_rate=0.2_batch_size=16"
  assert sweep.run(trials) == {}
  lines = sweep.table(sweep.results(trials, {})).splitlines()
  assert lines[0].split()[:2] == ["learning_rate", "batch_size"]
  assert lines[1].split()[:3] == ["1", "0.3", "-"] and lines[2].split()[:3] == ["2", "0.2", "16"]


def test_a_failure_stops_no_other_and_finished_trials_are_left_alone(tmp_path, trainer, capsys):
  workdir = tmp_path / "sweep"
  trials = _trials(workdir)
  failed = sweep.run(trials)
  assert list(failed) == ["1_learning_rate=0.9"]
  assert "the loss is nan" in failed["1_learning_rate=0.9"]
  assert "exit status 1" in capsys.readouterr().out
  rows = sweep.results(trials, failed)
  assert [row["state"] for row in rows] == ["finished", "finished", "failed"]
  assert [row["best"] for row in rows[:2]] == [0.3, 0.1]
  text = sweep.table(rows)
  assert "best mIoU, %" in text and "the loss is nan" in text

  (workdir / "1_learning_rate=0.9" / "repaired").touch()
  assert sweep.run(trials) == {}
  calls = {trial.name: (trial.workdir / "calls").read_text().count("called") for trial in trials}
  assert list(calls.values()) == [1, 2, 1]
  assert sweep.results(trials, {})[0]["best"] == 0.9


def test_the_plot(tmp_path, trainer):
  pytest.importorskip("matplotlib")
  trials = _trials(tmp_path)
  sweep.run(trials)
  assert sweep.plot(trials, tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize(
  ("arguments", "hint"),
  [
    (["--sweep=configs/sweeps/none.py"], "does not exist"),
    (["--sweep=configs/afformer/synthetic.py"], "no get_sweep"),
    (["--sweep=configs/sweeps/afformer_lr.py", "--config.train.steps=4"], "train.steps"),
    (["--sweep=configs/sweeps/afformer_lr.py", "--lr=4"], "--lr=4"),
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
  assert all(line.startswith("python train.py --config=configs/afformer/") for line in lines)
  assert all("--config.train.num_steps=8" in line for line in lines)
