"""Looks at a data set before training, and says what is in it, what is odd and what is wrong.

  effseg inspect --config=afformer/folder --config.data.root=my_images --output=sheet.png

Prints the examples of each split, their sizes, the share of each class and of pixels without one,
and objects where there are any; then warnings and problems, each in a line. With `--output`, a
sheet of training examples is drawn, as by effseg browse. The exit status is 1 where something is
wrong. A shorter look is part of every training; `--config.data.check=off` leaves that out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from effseg_jax.cli import Flags, define_config, no_arguments
from effseg_jax.errors import DataWarning, UserError
from effseg_jax.input_pipeline import datasets, inspection, pipelines


def inspect(config: ConfigDict, splits: Sequence[str], labels: int) -> tuple[str, list[str]]:
  """Looks at splits of the configured data set.

  Args:
    config: an experiment; its `data` and `task` are used.
    splits: names; the first is the one that is trained on.
    labels: how many are read of each split at most.

  Returns:
    The page, and the problems.

  Raises:
    UserError: if a split cannot be opened.
  """
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", DataWarning)
    opened = [
      pipelines.as_task_reads(
        config.task.name,
        datasets.open_dataset(
          config.data.name,
          root=config.data.root or None,
          split=split,
          **config.data.options.to_dict(),
        ),
      )
      for split in splits
    ]
    reports = [inspection.look(dataset, labels=labels) for dataset in opened]
  problems, odd = inspection.judge(reports, config.task.name, training=splits[0])
  odd = [str(entry.message) for entry in caught if entry.category is DataWarning] + odd
  text = [f"{opened[0].name}, {len(opened[0].classes)} classes", inspection.page(reports)]
  text += [f"warning: {line}" for line in odd]
  text += [f"problem: {line}" for line in problems]
  if not (odd or problems):
    text.append("nothing odd was found")
  return "\n".join(text), problems


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  define_config(values)
  flags.DEFINE_list(
    "splits",
    None,
    "Names; default: those the experiment trains and evaluates on.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "labels", 300, "How many are read of each split.", lower_bound=1, flag_values=values
  )
  flags.DEFINE_string("output", None, "Where a sheet of examples is drawn.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and looks."""
  no_arguments(arguments)
  if values.config is None:
    raise UserError("--config is needed; see effseg inspect --help.")
  config = values.config
  splits = values.splits or list(dict.fromkeys([config.data.train_split, config.eval.split]))
  text, problems = inspect(config, splits, values.labels)
  print(text)
  if values.output and not problems:
    from effseg_jax.cli.browse import browse

    sheet, line = browse(config, split=splits[0], original=True)
    path = Path(values.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
    print(f"{path}: {line}")
  return 1 if problems else 0
