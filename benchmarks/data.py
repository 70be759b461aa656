"""The speed of the training pipeline, compared with only decoding the same files."""

from __future__ import annotations

import concurrent.futures
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from benchmarks.report import table
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs, datasets, loader, pipelines

_WORKS = ("pipeline", "reading", "decoding")


def encoded_pictures(dataset: Any, count: int) -> list[list[bytes]]:
  """The encoded photographs of the first examples.

  Raises:
    UserError: for a data set that decodes none.
  """
  found = []
  for index in range(min(count, len(dataset))):
    with codecs.recording() as files:
      dataset[index]
    found.append([content for content, _ in files])
  if not found[0]:
    raise UserError(
      f"{dataset.name} is drawn and not read from files: there is nothing to decode; choose another"
      " --config."
    )
  return found


def measure(
  config: ConfigDict, threads: Sequence[int], *, images: int, rounds: int
) -> dict[str, Any]:
  """Times the pipeline, the reading of examples and the decoding of their pictures, in turns.

  Decoding means the photographs alone, from memory; reading means examples as the data set gives
  them, with their labels; the pipeline augments and stacks besides.

  Args:
    config: an experiment; its batch size and augmentation are used.
    threads: numbers of threads.
    images: examples per round, at least; whole batches.
    rounds: turns of each.

  Returns:
    `data`, `batch_size`, and `rows`: `threads`, and for each of `pipeline`, `reading` and
    `decoding` the examples per second and `..._cpu` the CPU seconds per example, one number per
    round; the latter are meaningful on a busy machine as well.
  """
  data = config.data
  dataset = datasets.open_dataset(
    data.name, root=data.root or None, split=data.train_split, **data.options.to_dict()
  )
  dataset = pipelines.as_task_reads(config.task.name, dataset)
  steps = pipelines.train_transforms(config.task.name, **data.augment.to_dict())
  batch_size = min(config.train.batch_size, len(dataset))
  count = -(-images // batch_size) * batch_size
  pictures = encoded_pictures(dataset, count)
  rows = []
  for number in threads:
    works = {
      "pipeline": lambda seed, number=number: _pipeline(
        dataset, steps, batch_size=batch_size, count=count, threads=number, seed=seed
      ),
      "reading": lambda _, number=number: _each(
        lambda place: dataset[place % len(dataset)], count, number
      ),
      "decoding": lambda _, number=number: _each(
        lambda place: [codecs.decode_image(c, place) for c in pictures[place % len(pictures)]],
        count,
        number,
      ),
    }
    row: dict[str, Any] = {"threads": number}
    works["reading"](0)  # from now on the files are in the system's cache
    for turn in range(rounds):
      for name, work in works.items():
        wall, cpu = work(turn)
        row.setdefault(name, []).append(count / wall)
        row.setdefault(f"{name}_cpu", []).append(cpu / count)
    rows.append(row)
  return {"data": f"{data.name} {data.train_split}", "batch_size": batch_size, "rows": rows}


def data_table(results: Mapping[str, Any]) -> str:
  """The table of `measure`."""
  header = ["threads", *(f"{name}/s" for name in _WORKS), *(f"{name} CPU ms" for name in _WORKS)]
  header += ["of decoding", "of reading"]
  lines = []
  for row in results["rows"]:
    speed = [statistics.median(row[name]) for name in _WORKS]
    cpu = [statistics.median(row[f"{name}_cpu"]) for name in _WORKS]
    lines.append(
      (
        str(row["threads"]),
        *(f"{value:.0f}" for value in speed),
        *(f"{1000 * value:.2f}" for value in cpu),
        f"{100 * cpu[2] / cpu[0]:.0f}%",
        f"{100 * cpu[1] / cpu[0]:.0f}%",
      )
    )
  title = f"{results['data']}, batches of {results['batch_size']}; decoding: photographs alone;"
  title += " reading: with their labels. Shares: of CPU time per example"
  return f"{title}\n{table(header, lines)}"


def _pipeline(
  dataset: Any, steps: Sequence[Any], *, batch_size: int, count: int, threads: int, seed: int
) -> tuple[float, float]:
  """Wall and CPU seconds, from the second batch on: starting the threads is not counted."""
  stream = loader.train_batches(
    dataset, steps, batch_size=batch_size, seed=seed, num_threads=threads
  )
  try:
    next(stream)
    with _clock() as seconds:
      for _ in range(count // batch_size):
        next(stream)
    return seconds()
  finally:
    stream.close()  # otherwise it keeps reading ahead while others are timed


def _each(work: Callable[[int], Any], count: int, threads: int) -> tuple[float, float]:
  """Wall and CPU seconds of `work(0)` to `work(count - 1)`."""
  with _clock() as seconds, concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for _ in pool.map(work, range(count)):
      pass
  return seconds()


@contextlib.contextmanager
def _clock() -> Iterator[Callable[[], tuple[float, float]]]:
  """Yields a function that returns, afterwards, the wall and CPU seconds."""
  begin = time.perf_counter(), time.process_time()
  end: list[float] = []
  yield lambda: (end[0] - begin[0], end[1] - begin[1])
  end += [time.perf_counter(), time.process_time()]
