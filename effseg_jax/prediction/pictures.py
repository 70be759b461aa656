"""Segmenting pictures: one, a list, or an endless iterator, in batches of one network shape."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from effseg_jax.errors import UserError, suggestion
from effseg_jax.prediction.inputs import as_image

# Pictures read ahead: enough to find some of one shape, as few as a memory holds.
_WINDOW_BATCHES = 4
_WINDOW_PIXELS = 2**26

# Pixels that the network sees in one batch: a larger picture is a batch of its own.
_BATCH_PIXELS = {"cpu": 2**21, "other": 2**24}


class Engine(Protocol):
  """One task's network and how its output is read."""

  task: Any
  options: tuple[str, ...]

  def shape(self, size: tuple[int, int]) -> Hashable:
    """(rows, cols) of a picture -> (rows, cols) of the array that the network takes."""

  def prepare(self, image: np.ndarray) -> Any:
    """A picture as the network takes it."""

  def run(
    self, images: Sequence[np.ndarray], arrays: Sequence[Any], batch_size: int, **options: Any
  ) -> list[Any]:
    """Segments at most `batch_size` pictures of one shape."""


class PictureSegmenter:
  """A model that segments pictures: call it with one or a list, or `map` it over an iterator.

  A picture is an array uint8 (H, W, 3), a Pillow image or a path; a result has the picture's own
  size, whatever size the network sees.
  """

  def __init__(self, engine: Engine, batch_size: int | None = None):
    """Wraps an engine.

    Args:
      engine: of the task.
      batch_size: pictures that the network sees at once, where a list has as many of one shape;
        None: 8, and 1 on a CPU, where more is not faster.
    """
    self.engine = engine
    on_cpu = jax.default_backend() == "cpu"
    self._batch_size = batch_size or (1 if on_cpu else 8)
    self._batch_pixels = _BATCH_PIXELS["cpu" if on_cpu else "other"]

  @property
  def task(self) -> Any:
    """What the model was trained for: classes, palette, mean and std among its fields."""
    return self.engine.task

  @property
  def classes(self) -> tuple[str, ...]:
    """The name of each class id."""
    return tuple(self.engine.task.classes)

  @property
  def num_programs(self) -> int:
    """Programs that were compiled so far."""
    return self.engine.programs.compiled

  def __call__(self, pictures: Any, **options: Any) -> Any:
    """Segments a picture or a list of them.

    Args:
      pictures: an array uint8 (H, W, 3), a Pillow image, a path, or a list or tuple of these.
      **options: of the task: `score_threshold` of universal models.

    Returns:
      A `SemanticResult` or `UniversalResult`; for a list a list, in its order.

    Raises:
      UserError: for a picture that cannot be read, or an option that the task does not have.
    """
    if isinstance(pictures, (list, tuple)):
      return list(self.map(pictures, **options))
    return next(self.map([pictures], **options))

  def map(
    self, pictures: Iterable[Any], *, batch_size: int | None = None, **options: Any
  ) -> Iterator[Any]:
    """Segments pictures as they come; the results keep their order.

    Threads read ahead; a few batches of pictures are in memory, however many there are.

    Args:
      pictures: as in a call.
      batch_size: as in `load`, for this call.
      **options: as in a call.

    Yields:
      Results.

    Raises:
      UserError: for the first picture that cannot be read, or an unknown option.
    """
    for result in self.results(pictures, batch_size=batch_size, **options):
      if isinstance(result, UserError):
        raise result
      yield result

  def stream(self, video: Any, **options: Any) -> Iterator[Any]:
    """Segments a video frame by frame, however long it is.

    Args:
      video: path, or a URL that PyAV opens.
      **options: `every`, `start` and `stop` say which frames (see `prediction.video.VideoOptions`);
        and those of a call.

    Yields:
      A `FrameResult` for each frame: its `time` in seconds, and its `result`. Ids of segments stay
      with their objects.

    Raises:
      UserError: if the video cannot be read.
    """
    from effseg_jax.prediction.video import stream_video

    return stream_video(self, video, **options)

  def results(
    self, pictures: Iterable[Any], *, batch_size: int | None = None, **options: Any
  ) -> Iterator[Any]:
    """As `map`, but what cannot be read gives its `UserError` in place of a result."""
    for name in options:
      if name not in self.engine.options:
        known = ", ".join(self.engine.options) or "none"
        raise UserError(
          f"{name} means nothing to this model; its options are: {known}."
          f"{suggestion(name, self.engine.options)}"
        )
    size = batch_size or self._batch_size
    if size < 1:
      raise UserError(f"batch_size is {batch_size}; expected 1 or more.")
    for window in _windows(pictures, 1 if size == 1 else _WINDOW_BATCHES * size):
      yield from self._segment(window, size, options)

  def _segment(self, window: Sequence[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
    """The results of pictures that are in memory, in their order."""
    found: list[Any] = list(window)
    groups = collections.defaultdict(list)
    for index, image in enumerate(window):
      if not isinstance(image, UserError):
        groups[self.engine.shape(image.shape[:2])].append(index)
    for shape, indices in groups.items():
      limit = max(min(size, self._batch_pixels // int(np.prod(shape))), 1)
      for part in _parts(indices, limit):
        images = [window[index] for index in part]
        arrays = [self.engine.prepare(image) for image in images]
        rows = 1 if len(part) == 1 else limit
        for index, result in zip(
          part, self.engine.run(images, arrays, rows, **options), strict=True
        ):
          found[index] = result
    yield from found


def _windows(pictures: Iterable[Any], count: int) -> Iterator[list[Any]]:
  """Reads pictures in threads; yields some at a time, an error in place of a broken one."""
  source = iter(pictures)
  with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
    ahead: collections.deque[Any] = collections.deque()

    def fill(limit: int) -> None:
      for picture in itertools.islice(source, limit - len(ahead)):
        ahead.append(pool.submit(_read, picture))

    fill(1)
    while ahead:
      fill(min(count, 4))
      window, pixels = [], 0
      while ahead and len(window) < count and pixels < _WINDOW_PIXELS:
        window.append(ahead.popleft().result())
        pixels += 0 if isinstance(window[-1], UserError) else window[-1][..., 0].size
        fill(min(count - len(window), 4) or 1)
      yield window


def _read(picture: Any) -> np.ndarray | UserError:
  try:
    return as_image(picture)
  except UserError as error:
    return error


def _parts(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
  """Whole batches; what is left over is one if it fills half of it, and single pictures else."""
  whole = len(indices) // size * size
  if len(indices) - whole > size // 2:
    whole = len(indices)
  for begin in range(0, whole, size):
    yield indices[begin : begin + size]
  for index in indices[whole:]:
    yield [index]
