"""Videos through a model for pictures: each frame by itself, times and sound kept."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import clip_reader
from effseg_jax.pictures import semantic as pictures
from effseg_jax.prediction.pictures import PictureSegmenter
from effseg_jax.prediction.results import UniversalResult
from effseg_jax.prediction.tracking import Tracker
from effseg_jax.prediction.writing import complete, save_indexed, save_picture

# Frames that wait for being drawn and encoded, while the network is at the next ones.
_WAITING_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class VideoOptions:
  """What is segmented of a video, and what is written.

  Attributes:
    every: segments each n-th frame; the others are left out.
    start: seconds from which on.
    stop: seconds until which; None: the end.
    masks: also writes `STEM_masks`, a PNG for each frame: class ids with a palette, or ids of
      segments as COCO codes them.
    progress: shows frames a second and the time left on the terminal.
  """

  every: int = 1
  start: float = 0.0
  stop: float | None = None
  masks: bool = False
  progress: bool = False

  def __post_init__(self) -> None:
    if self.every < 1:
      raise UserError(f"--every={self.every}; expected 1 or more.")
    if self.start < 0 or (self.stop is not None and self.stop <= self.start):
      raise UserError(
        f"--start={self.start:g} --stop={self.stop}; expected seconds, 0 or more, the stop later."
      )


def is_url(source: Any) -> bool:
  """Whether a source is the address of a stream."""
  return isinstance(source, str) and re.match(r"\w{2,}://", source) is not None


def is_video(path: Any) -> bool:
  """Whether a path is a video file, or the address of a stream."""
  if is_url(path):
    return True
  return Path(path).is_file() and Path(path).suffix.lower() in clip_reader.VIDEO_SUFFIXES


def name_of_url(url: str) -> str:
  """A file name for what a stream's address gives."""
  return re.sub(r"[^\w.-]+", "_", url.split("://", 1)[1]).strip("_.") or "stream"


@dataclasses.dataclass(frozen=True, eq=False)
class FrameResult:
  """A segmented frame.

  Attributes:
    time: in seconds since the beginning of the part that was asked for.
    result: a `SemanticResult` or `UniversalResult`; ids of segments stay with their objects, see
      `prediction.tracking`.
  """

  time: float
  result: Any


class VideoReading:
  """Reads and segments a video; what is odd about it is in `notes` at the end."""

  def __init__(self, segmenter: PictureSegmenter, path: Any, options: VideoOptions, **call: Any):
    """Opens the video.

    Args:
      segmenter: of `effseg_jax.load`.
      path: of the video, or a URL.
      options: which frames.
      **call: options of the segmenter's call.

    Raises:
      UserError: if it cannot be opened.
    """
    self._segmenter, self._options, self._call = segmenter, options, call
    self.clip = clip_reader.open_clip(path, sound=False)
    self.notes: list[str] = []
    self.sound: collections.deque[np.ndarray] = collections.deque()

  def __iter__(self) -> Iterator[FrameResult]:
    """Frames in their order; `sound` has what was read up to a little beyond each."""
    times: collections.deque[float] = collections.deque()
    tracker = Tracker()

    def frames() -> Iterator[np.ndarray]:
      for moment, frame in self._frames():
        times.append(moment)
        yield frame

    for result in self._segmenter.map(frames(), **self._call):
      moment = times.popleft()
      yield FrameResult(moment, tracker(result) if isinstance(result, UniversalResult) else result)

  def _frames(self) -> Iterator[tuple[float, np.ndarray]]:
    """Times and frames of the wanted part; its sound goes to `sound`."""
    start, stop, rate = self._options.start, self._options.stop, self.clip.sample_rate
    index = 0
    with contextlib.closing(_ahead(self.clip.seconds(self.notes))) as seconds:
      for number, second in enumerate(seconds):
        if stop is not None and number >= stop:
          return
        first = round(max(start - number, 0.0) * rate)
        last = rate if stop is None else round(min(stop - number, 1.0) * rate)
        if number + 1 > start:
          self.sound.append(second.waveform[first:last])
        for moment, frame in zip(second.times, second.frames, strict=True):
          inside = moment >= start and (stop is None or moment < stop)
          if inside and index % self._options.every == 0:
            yield float(moment) - start, frame
          index += inside


def stream_video(
  segmenter: PictureSegmenter, path: Any, *, every: int = 1, start: float = 0.0, stop=None, **call
) -> Iterator[FrameResult]:
  """Segments a video frame by frame; a few seconds of frames are in memory.

  Args:
    segmenter: of `effseg_jax.load`.
    path: of the video, or a URL.
    every: each n-th frame.
    start: seconds from which on.
    stop: seconds until which; None: the end.
    **call: options of the segmenter's call: `score_threshold`, `batch_size`.

  Raises:
    UserError: if the video cannot be read.
  """
  options = VideoOptions(every=every, start=start, stop=stop)
  return iter(VideoReading(segmenter, path, options, **call))


def save_video(segmenter: PictureSegmenter, path: Any, stem: str | Path, **options: Any) -> str:
  """Writes `STEM_overlay.mp4`: the video tinted, with its times, upright, and its sound.

  Reading, the network and writing run side by side.

  Args:
    segmenter: of `effseg_jax.load`.
    path: of the video, or a URL.
    stem: path without suffix.
    **options: see `VideoOptions`.

  Returns:
    The line to print.

  Raises:
    UserError: if the video cannot be read, or nothing of it was wanted; then nothing is written.
  """
  from effseg_jax.prediction.clip_writer import ClipWriter  # needs PyAV

  settings, stem = VideoOptions(**options), Path(stem)
  reading = VideoReading(segmenter, path, settings)
  clip, begin = reading.clip, time.perf_counter()
  shown: collections.Counter[str] = collections.Counter()
  count, network = 0, 0.0
  with contextlib.ExitStack() as stack:
    masks = None
    if settings.masks:
      masks = stack.enter_context(complete(stem.with_name(f"{stem.name}_masks")))
      masks.mkdir()
    part = stack.enter_context(complete(stem.with_name(f"{stem.name}_overlay.mp4")))
    sound = {"sample_rate": clip.sample_rate, "channels": clip.channels}
    writer = stack.enter_context(ClipWriter(part, clip.rate / settings.every, clip.size, **sound))
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    bar = stack.enter_context(_bar(clip, settings))
    waiting: collections.deque[concurrent.futures.Future[None]] = collections.deque()
    for frame in reading:
      pieces = [reading.sound.popleft() for _ in range(len(reading.sound))]
      waiting.append(pool.submit(_write, writer, frame, pieces, masks, count))
      while len(waiting) > _WAITING_FRAMES:
        waiting.popleft().result()
      count, network = count + 1, network + frame.result.milliseconds / 1000
      shown.update(frame.result.shares())
      bar.update()
    for future in waiting:
      future.result()
    writer.add(np.zeros((0, *clip.size, 3), np.uint8), _joined(reading.sound))
    if not count:
      raise UserError(f"{path} has no frame between --start and --stop.")
  seconds = time.perf_counter() - begin
  shares = ", ".join(f"{name} {100 * total / count:.0f}%" for name, total in shown.most_common(6))
  speed = f"{count / seconds:.1f} frames/s from file to file, {count / network:.1f} in the network"
  return "; ".join([f"{count} frames in {seconds:.1f} s ({speed}): {shares}", *reading.notes])


def _write(
  writer: Any, frame: FrameResult, sound: list[np.ndarray], masks: Path | None, number: int
) -> None:
  """Draws and encodes a frame, in a thread of its own."""
  result = frame.result
  universal = isinstance(result, UniversalResult) and result.panoptic_map is not None
  if universal:
    overlay = result.overlay()
  else:  # a legend's width depends on the classes
    overlay = pictures.overlay(result.image, result.class_map, result.palette)
  writer.add(overlay[None], _joined(sound), [frame.time])
  if masks is None:
    return
  path = masks / f"{number:06d}.png"
  if universal:
    save_picture(result.coded_map(), path)
  else:
    save_indexed(result.class_map, result.palette, path)


def _joined(pieces: Iterable[np.ndarray]) -> np.ndarray | None:
  """Sound in one piece; None if there is none."""
  pieces = [piece for piece in pieces if len(piece)]
  return np.concatenate(pieces) if pieces else None


def _bar(clip: clip_reader.Clip, options: VideoOptions) -> Any:
  """A progress bar with frames a second and the time left."""
  with extra("train"):
    from tqdm import tqdm

  length = max(min(options.stop or clip.duration, clip.duration) - options.start, 0.0)
  total = round(length * float(clip.rate) / options.every) or None
  return tqdm(total=total, unit=" frames", disable=None if options.progress else True, leave=False)


def _ahead(source: Iterator[Any], count: int = 1) -> Iterator[Any]:
  """Runs an iterator in a thread, `count` items ahead."""
  items: queue.Queue[tuple[str, Any]] = queue.Queue(count)
  stopped = threading.Event()

  def put(kind: str, item: Any) -> bool:
    while not stopped.is_set():
      with contextlib.suppress(queue.Full):
        items.put((kind, item), timeout=0.1)
        return True
    return False

  def run() -> None:
    try:
      for item in source:
        if not put("item", item):
          return
    except BaseException as error:
      put("error", error)
    else:
      put("end", None)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  try:
    while True:
      kind, item = items.get()
      if kind == "error":
        raise item
      if kind == "end":
        return
      yield item
  finally:
    stopped.set()
    thread.join()
