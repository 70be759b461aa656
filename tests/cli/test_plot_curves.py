"""Curves of runs: what is read, and that names stand beside the ends of their lines."""

from __future__ import annotations

import json
import warnings

import pytest

from effseg_jax import UserError
from effseg_jax.cli import plot_curves


def _run(folder, records):
  folder.mkdir()
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (folder / "metrics.jsonl").write_text(lines)
  return folder


@pytest.fixture
def run(tmp_path):
  losses = [{"step": step, "train/loss": 60.0 - step / 20} for step in range(0, 1001, 50)]
  scores = [{"step": step, "eval/PQ": step / 1100, "eval/mIoU": 0.1} for step in (500, 1000)]
  return _run(tmp_path / "run", losses + scores)


def test_a_repeated_step_counts_once(tmp_path):
  records = [{"step": 2, "train/loss": 9.0}, {"step": 1, "train/loss": 5}]
  curves = plot_curves.read_curves(_run(tmp_path / "again", [*records, {**records[0], "x": 1}]))
  assert curves["train/loss"] == ([1, 2], [5.0, 9.0])
  assert curves["x"] == ([2], [1.0])


def test_a_line_that_is_being_written_is_left_out(run):
  with (run / "metrics.jsonl").open("a") as file:
    file.write('{"step": 11')
  assert plot_curves.read_curves(run)["eval/PQ"][0] == [500, 1000]


def test_a_broken_line_is_named(run):
  path = run / "metrics.jsonl"
  path.write_text("nonsense\n" + path.read_text())
  with pytest.raises(UserError, match="line 1 is no log line"):
    plot_curves.read_curves(run)


def test_runs_are_called_by_what_tells_them_apart():
  assert plot_curves.run_names(["a/x/run", "b/x/run"]) == ["a/x/run", "b/x/run"]
  assert plot_curves.run_names(["runs/a", "runs/b/metrics.jsonl"]) == ["a", "b"]


def test_names_stand_beside_the_ends_of_their_lines(run, tmp_path, monkeypatch):
  pyplot = pytest.importorskip("matplotlib.pyplot")
  drawn = []
  monkeypatch.setattr(pyplot, "close", drawn.append)
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # a name far outside leaves no room for the axes
    plot_curves.plot([run], tmp_path / "new" / "curves.png")
  (figure,) = drawn
  left, right = figure.axes
  assert right.get_title(loc="left") == "PQ, %"
  for axes, name in ((left, "run"), (right, "run  90.9")):
    (text,) = [text for text in axes.texts if text.get_text() == name]
    end = axes.lines[0].get_ydata()[-1]
    low, high = axes.get_ylim()
    assert text.xy[1] == pytest.approx((end - low) / (high - low), abs=1e-6)
