"""What a run logs: a line for people, a line of JSON, and event files for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.run import chips, clu_parts, processes, watch
from effseg_jax.run.pace import Split
from effseg_jax.run.workdir import Claim, storage_errors
from effseg_jax.tasks import Task
from effseg_jax.training.step import StepReport

with extra("train"):
  from tensorboardX import summary as summaries
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto.event_pb2 import Event, SessionLog

# The most important numbers come first in a line.
_FIRST = ("loss", "mIoU", "PQ", "M_J", "accuracy", "top1")

# Scalars of these beginnings lie between 0 and 1 and are shown in percent.
_SHARES = (
  *("mIoU", "accuracy", "mean_accuracy", "pixel_accuracy", "top1"),
  *("PQ", "SQ", "RQ", "AP", "M_J", "M_F"),
)


_MFU = "model_flops_utilisation"


class RunLog:
  """Writes one run's numbers and pictures; only the first process writes.

  Files in the working directory: `metrics.jsonl` (one object per log line, with `step`; a number
  that is not finite is null), event files for TensorBoard, and pictures as PNG under `pictures/`.
  Steps after the last checkpoint of a killed run are logged again when it resumes: of two lines
  with the same step, the later one counts.
  """

  def __init__(self, workdir: str | Path, num_steps: int, batch_size: int, best_by: str):
    """Claims the working directory and opens the files for appending; every process does.

    Args:
      workdir: created if it is missing.
      num_steps: length of the run, for the time left.
      batch_size: images per step over all processes, for images/s.
      best_by: the metric whose best value so far is reported.

    Raises:
      UserError: if the folder cannot be written to, or another run uses it.
    """
    self._workdir = Path(workdir)
    self._num_steps, self._batch_size = num_steps, batch_size
    self._active = jax.process_index() == 0
    self._best_by, self._best = best_by, -math.inf
    found = None
    if self._active:
      try:
        self._claim = Claim(self._workdir)
        with self._writing():
          self._jsonl = _continue_lines(self._workdir / "metrics.jsonl")
          self._best = _largest(self._workdir / "metrics.jsonl", f"eval/{best_by}")
          self._events = _EventFile(self._workdir)
      except UserError as error:
        found = error
    processes.agree(found)

  def begin(self, step: int) -> None:
    """Sets the step from which the run trains; later lines of an earlier start are void."""
    if self._active:
      with self._writing():
        self._events.begin(step + 1)

  def text(self, message: str) -> None:
    """Prints a message as it is."""
    if self._active:
      print(message, flush=True)

  def train(self, step: int, scalars: Mapping[str, float], split: Split, flops: float) -> None:
    """Logs a window of training steps; every process does.

    Besides the scalars `metrics.jsonl` gets images/s, the seconds of a step by what was waited for,
    the devices' speed (see `chips.speed`) and their memory.

    Args:
      step: the last one of the window.
      scalars: their means.
      split: where their time went.
      flops: of a step's part on one device.
    """
    device = jax.local_devices()[0]
    speed, cost = self._batch_size / split.total, chips.speed(split.total, flops, device)
    slow = watch.falling_behind(split)
    first = [name for name in _FIRST if name in scalars]
    order = first + [name for name in scalars if name not in first]
    shown = "  ".join(f"{name} {_short(name, scalars[name])}" for name in order)
    name, value = self._best_by, self._best
    best = f"  best {name} {_short(name, value)}" if math.isfinite(value) else ""
    used = f"  {100 * cost[_MFU]:.0f}% of peak" if _MFU in cost else ""
    waiting = split.data / split.total
    waits = f"  {100 * waiting:.0f}% waiting for data" if waiting > 0.05 else ""
    width = len(str(self._num_steps))
    self.text(
      f"step {step:{width}d}/{self._num_steps}  {shown}{best}  {speed:.1f} images/s{used}{waits}"
      f"  left {duration((self._num_steps - step) * split.total)}"
    )
    if slow:
      self.text(slow)
    times = {f"seconds_{name}": value for name, value in split._asdict().items()}
    speeds = {"images_per_second": speed, **times, **cost, **chips.memory_in_use(device)}
    self._write("train", step, {**scalars, **speeds})

  def evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs the metrics of an evaluation and remembers the best."""
    if math.isfinite(scalars.get(self._best_by, math.nan)):
      self._best = max(self._best, scalars[self._best_by])
    shown = "  ".join(f"{name} {_short(name, value)}" for name, value in scalars.items())
    self.text(f"step {step}  evaluation  {shown}")
    self._write("eval", step, scalars)

  def document(self, name: str, content: str) -> None:
    """Writes a text file that describes the run."""
    if self._active:
      with self._writing():
        (self._workdir / name).write_text(content + "\n", encoding="utf-8")

  def picture(self, step: int, name: str, image: np.ndarray) -> Path | None:
    """Writes a uint8 (H, W, 3) picture; returns its path."""
    if not self._active:
      return None
    from PIL import Image

    path = self._workdir / "pictures" / f"{name}_{step:06d}.png"
    with self._writing():
      path.parent.mkdir(exist_ok=True)
      Image.fromarray(image).save(path)
      self._events.add(step, [summaries.image(name, image, dataformats="HWC")])
    return path

  def close(self) -> None:
    """Flushes and closes the files, and releases the folder."""
    if self._active:
      with self._writing():
        self._jsonl.close()
        self._events.close()
      self._claim.release()

  def _write(self, prefix: str, step: int, scalars: Mapping[str, float]) -> None:
    if not self._active:
      return
    record = {f"{prefix}/{name}": float(value) for name, value in scalars.items()}
    line = {name: value if math.isfinite(value) else None for name, value in record.items()}
    with self._writing():
      self._jsonl.write(json.dumps({"step": step, **line}) + "\n")
      self._jsonl.flush()
      self._events.add(step, [summaries.scalar(name, value) for name, value in record.items()])

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    with storage_errors(self._workdir):
      yield


class _EventFile:
  """TensorBoard's file; written at once and in this thread, so that a kill loses nothing."""

  def __init__(self, folder: Path):
    self._writer = EventsWriter(str(folder / "events"))

  def add(self, step: int, parts: Sequence[Any]) -> None:
    for part in parts:
      self._writer.write_event(Event(wall_time=time.time(), step=step, summary=part))
    self._writer.flush()

  def begin(self, step: int) -> None:
    """TensorBoard drops the events of earlier files for this step and later ones."""
    session = SessionLog(status=SessionLog.START)
    self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=session))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class ReportWindow:
  """Collects step reports without waiting for the device; reads them all at once.

  Attributes:
    skipped: steps of the run whose gradient was not finite, as far as reports have been read.
  """

  def __init__(self, task: Task, skipped: int = 0):
    """Begins a window.

    Args:
      task: summarises its counts.
      skipped: steps that were skipped before.
    """
    self._task, self.skipped = task, skipped
    self._reports: list[StepReport] = []

  def add(self, report: StepReport) -> None:
    """Keeps a report (device arrays)."""
    self._reports.append(report)

  def summary(self) -> dict[str, float]:
    """Means of the scalars and the task's summary of the summed counts; empties the window.

    Steps that were skipped take no part in them. Their number in the whole run is `skipped_steps`,
    which is there if it is not 0.
    """
    reports = jax.device_get(self._reports)
    self._reports = []
    counted = [report for report in reports if report.finite]
    self.skipped += len(reports) - len(counted)
    skipped = {"skipped_steps": float(self.skipped)} if self.skipped else {}
    if not counted:
      return {"loss": math.nan, **skipped}
    series = {name: [report.scalars[name] for report in counted] for name in counted[0].scalars}
    series["gradient_norm"] = [np.linalg.norm(report.gradient_norms) for report in counted]
    scalars = {name: clu_parts.mean(values) for name, values in series.items()}
    if counted[0].counts is not None:
      counts = jax.tree.map(
        lambda *c: np.sum(np.stack(c), axis=0, dtype=np.int64),
        *(report.counts for report in counted),
      )
      scalars.update(self._task.summarise(counts))
    return {**scalars, **skipped}


def _continue_lines(path: Path) -> TextIO:
  """Opens a file of lines for appending, without the part of a line that a killed process left."""
  if path.is_file():
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
      path.write_bytes(content[: content.rfind(b"\n") + 1])
  return path.open("a", encoding="utf-8")


def _largest(path: Path, name: str) -> float:
  """The largest value of a number in a file of lines; minus infinity if there is none."""
  values = [-math.inf]
  for line in path.read_text(encoding="utf-8").splitlines():
    with contextlib.suppress(ValueError, KeyError, TypeError):  # no line of ours, or without it
      values.append(float(json.loads(line)[name]))
  return max(values)


def duration(seconds: float) -> str:
  """`3723 -> 1h02m`, `75 -> 1m15s`, `9 -> 9s`."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _short(name: str, value: float) -> str:
  """Shares such as mIoU in percent, small numbers in scientific form."""
  if name.startswith(_SHARES):
    return f"{100 * value:.1f}%"
  return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"


def run_summary(items: Mapping[str, Any]) -> str:
  """The lines a run begins with: one `name  value` a line."""
  width = max(len(name) for name in items)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in items.items())
