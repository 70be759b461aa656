"""The training pipeline's speed beside the decoding of the same files and nothing else."""

from __future__ import annotations

import concurrent.futures
import runpy
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from effseg_jax.errors import UserError
from input_pipeline import codecs, datasets, loader, tasks
from tools.benchmark_report import table


def load_config(flag: str, root: str | None) -> ConfigDict:
  """Reads an experiment, `configs/afformer/camvid.py:tiny` for example.

  Args:
    flag: path of the file, and after a colon what is passed to its `get_config`.
    root: of the data set; None: what the experiment says.

  Raises:
    UserError: if there is no such file, or it is no experiment.
  """
  path, _, variant = flag.partition(":")
  if not Path(path).is_file():
    raise UserError(f"--config={flag}: {path} does not exist; expected configs/.../X.py[:variant].")
  get_config = runpy.run_path(path).get("get_config")
  if get_config is None:
    raise UserError(f"--config={flag}: {path} has no get_config; expected an experiment's file.")
  config = get_config(variant) if variant else get_config()
  if root:
    config.data.root = root
  return config


def image_paths(dataset: Any) -> list[Path]:
  """The photographs of a data set, as it reads them.

  Raises:
    UserError: for a data set that reads no files.
  """
  if hasattr(dataset, "pairs"):
    return [image for image, _ in dataset.pairs]
  if hasattr(dataset, "file_names"):
    folders = [dataset.folder / name for name in dataset.classes]
    return [
      folders[label] / name for label, name in zip(dataset.labels, dataset.file_names, strict=True)
    ]
  raise UserError(
    f"{dataset.name} is drawn and not read from files: there is nothing to decode; choose another"
    " --config."
  )


def measure(
  config: ConfigDict, threads: Sequence[int], *, images: int, rounds: int
) -> dict[str, Any]:
  """Times pipeline and decoding in turns for each number of threads.

  Decoding means `codecs.read_image` of as many photographs of the same data set, in a pool of as
  many threads; the pipeline reads the labels besides, augments and stacks.

  Args:
    config: an experiment; its batch size and augmentation are used.
    threads: numbers of threads.
    images: per round, at least; whole batches.
    rounds: turns of each.

  Returns:
    `data`, `suffix`, `batch_size`, and `rows`: `threads`, `pipeline` and `decoding` (images per
    second, one number per round) and `ratio` (pipeline / decoding).
  """
  data = config.data
  dataset = datasets.open_dataset(
    data.name, root=data.root or None, split=data.train_split, **data.options.to_dict()
  )
  paths = image_paths(dataset)
  steps = tasks.train_transforms(config.task.name, **data.augment.to_dict())
  batch_size = min(config.train.batch_size, len(paths))
  batches = -(-images // batch_size)
  read = [paths[index % len(paths)] for index in range(batches * batch_size)]
  rows = []
  for count in threads:
    _decode(read, count)  # from now on the files are in the system's cache
    pipeline, decoding = [], []
    for number in range(rounds):
      pipeline.append(
        _pipeline(
          dataset, steps, batch_size=batch_size, batches=batches, threads=count, seed=number
        )
      )
      decoding.append(_decode(read, count))
    rows.append(
      {
        "threads": count,
        "pipeline": pipeline,
        "decoding": decoding,
        "ratio": statistics.median(pipeline) / statistics.median(decoding),
      }
    )
  return {
    "data": f"{data.name} {data.train_split}",
    "suffix": paths[0].suffix.lower().lstrip("."),
    "batch_size": batch_size,
    "rows": rows,
  }


def data_table(results: Mapping[str, Any]) -> str:
  """The table of `measure`."""
  header = ("threads", "pipeline images/s", f"bare {results['suffix']} decoding images/s", "ratio")
  lines = [
    (
      str(row["threads"]),
      f"{statistics.median(row['pipeline']):.0f}",
      f"{statistics.median(row['decoding']):.0f}",
      f"{row['ratio']:.2f}",
    )
    for row in results["rows"]
  ]
  title = f"{results['data']}, batches of {results['batch_size']}"
  return f"{title}\n{table(header, lines)}"


def _pipeline(
  dataset: Any, steps: Sequence[Any], *, batch_size: int, batches: int, threads: int, seed: int
) -> float:
  """Images per second, from the first batch on: starting the threads is not counted."""
  stream = loader.train_batches(
    dataset, steps, batch_size=batch_size, seed=seed, num_threads=threads
  )
  try:
    next(stream)
    start = time.perf_counter()
    for _ in range(batches):
      next(stream)
    return batches * batch_size / (time.perf_counter() - start)
  finally:
    stream.close()  # otherwise it goes on reading ahead while others are timed


def _decode(paths: Sequence[Path], threads: int) -> float:
  """Images per second."""
  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for _ in pool.map(codecs.read_image, paths):
      pass
  return len(paths) / (time.perf_counter() - start)
