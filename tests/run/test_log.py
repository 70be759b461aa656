"""What a run writes: lines that survive a kill, and files that TensorBoard reads."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from effseg_jax.errors import UserError
from effseg_jax.run.log import ReportWindow, RunLog, duration
from effseg_jax.run.pace import Split
from effseg_jax.training.step import StepReport

SPLIT = Split(total=0.5, data=0.1, device=0.3, host=0.1)


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
  """The events of the newest file, in TensorFlow's record format."""
  content = max(workdir.glob("events*")).read_bytes()
  found = []
  while content:
    (size,) = struct.unpack("<Q", content[:8])
    found.append(Event.FromString(content[12 : 12 + size]))
    content = content[16 + size :]
  return found


@pytest.fixture
def log(tmp_path):
  run = RunLog(tmp_path, num_steps=100, batch_size=8, best_by="mIoU")
  yield run
  run.close()


def test_a_window_is_told_in_a_line_and_in_numbers(log, tmp_path, capsys):
  log.train(20, {"loss": 1.25, "mIoU": 0.5}, SPLIT, flops=1e9)
  said = capsys.readouterr().out
  assert said.startswith("step  20/100  loss 1.25  mIoU 50.0%  16.0 images/s")
  assert "20% waiting for data" in said
  assert "left 40s" in said
  (record,) = lines(tmp_path)
  assert record["step"] == 20
  assert record["train/images_per_second"] == 16.0
  assert record["train/flops_per_second_per_device"] == 2e9
  times = {name: record[f"train/seconds_{name}"] for name in SPLIT._fields}
  assert times == SPLIT._asdict()


def test_numbers_are_on_disk_at_once(log, tmp_path):
  log.evaluation(7, {"mIoU": 0.25})
  scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
  assert scalars == [(7, "eval/mIoU", 0.25)]
  assert lines(tmp_path) == [{"step": 7, "eval/mIoU": 0.25}]


def test_pictures_are_files_and_events(log, tmp_path):
  path = log.picture(3, "samples", np.full((4, 6, 3), 200, np.uint8))
  assert path == tmp_path / "pictures" / "samples_000003.png"
  image = events(tmp_path)[-1].summary.value[0]
  assert (image.tag, image.image.width, image.image.height) == ("samples", 6, 4)


def test_the_part_of_a_line_that_a_kill_left_is_cut_off(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tr')
  log = RunLog(tmp_path, num_steps=10, batch_size=1, best_by="mIoU")
  log.evaluation(2, {"mIoU": 0.5})
  log.close()
  assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_second_log_of_a_closed_run_goes_on(tmp_path):
  for step in (1, 2):
    log = RunLog(tmp_path, num_steps=100, batch_size=8, best_by="mIoU")
    log.evaluation(step, {"mIoU": 0.5})
    log.close()
  assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_run_that_goes_on_knows_its_best(tmp_path, capsys):
  for step, score in ((1, 0.75), (2, 0.5)):
    log = RunLog(tmp_path, num_steps=100, batch_size=8, best_by="mIoU")
    log.train(step, {"loss": 1.0}, SPLIT, flops=1e9)
    log.evaluation(step, {"mIoU": score})
    log.close()
  log = RunLog(tmp_path, num_steps=100, batch_size=8, best_by="mIoU")
  log.train(3, {"loss": 1.0}, SPLIT, flops=1e9)
  log.close()
  first, second, third = (line for line in capsys.readouterr().out.splitlines() if "loss" in line)
  assert "best" not in first
  assert "best mIoU 75.0%" in second and "best mIoU 75.0%" in third


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written to"):
    RunLog(tmp_path / "file", num_steps=1, batch_size=1, best_by="mIoU")


class Counting:
  """A task whose counts are steps."""

  def summarise(self, counts):
    return {"counted": float(counts)}


def report(loss):
  finite = bool(np.isfinite(loss))
  return StepReport({"loss": np.float32(loss)}, np.int32(1), np.array([3.0, 4.0 * loss]), finite)


def test_skipped_steps_are_counted_and_nothing_else(log, tmp_path, capsys):
  window = ReportWindow(Counting(), skipped=2)
  for loss in (1.0, np.nan, 2.0, np.inf):
    window.add(report(loss))
  numbers = window.summary()
  assert numbers["loss"] == pytest.approx(1.5)
  assert numbers["gradient_norm"] == pytest.approx((5 + 73**0.5) / 2)
  assert numbers["counted"] == 2
  assert numbers["skipped_steps"] == window.skipped == 4
  log.train(4, numbers, SPLIT, flops=1e9)
  assert "skipped_steps 4" in capsys.readouterr().out
  window.add(report(np.nan))
  log.train(5, window.summary(), SPLIT, flops=1e9)
  first, second = lines(tmp_path)
  assert (first["train/skipped_steps"], second["train/skipped_steps"]) == (4, 5)
  assert second["train/loss"] is None

  def refuse(word):
    raise ValueError(f"{word} is not JSON")

  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=refuse)


def test_a_window_without_skipped_steps_does_not_mention_them():
  window = ReportWindow(Counting())
  window.add(report(1.0))
  assert set(window.summary()) == {"loss", "gradient_norm", "counted"}


def test_tensorboard_is_told_where_a_resumed_run_begins(log, tmp_path):
  log.begin(40)
  (start,) = [event for event in events(tmp_path) if event.HasField("session_log")]
  assert start.session_log.status == SessionLog.START
  assert start.step == 41


def test_an_evaluation_without_the_chosen_metric_is_logged_all_the_same(log, tmp_path):
  log.evaluation(5, {"PQ": 0.5})
  log.evaluation(6, {"mIoU": float("nan")})
  assert lines(tmp_path) == [{"step": 5, "eval/PQ": 0.5}, {"step": 6, "eval/mIoU": None}]


@pytest.mark.parametrize(("seconds", "text"), [(3723, "1h02m"), (75, "1m15s"), (9.4, "9s")])
def test_durations_are_short(seconds, text):
  assert duration(seconds) == text
