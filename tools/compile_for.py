r"""Compiles the training step for TPUs that are not here, and says what it will need and cost.

  python tools/compile_for.py --config=configs/afformer/ade20k.py:tiny --topology=v5e:4x4
  python tools/compile_for.py --config=configs/proscale/coco_panoptic.py --topology=v5e:16x16 \
    --config.model.dtype=bfloat16
  python tools/compile_for.py --table=docs/scaling.md      # all that is missing in the table

Runs on any machine: it needs libtpu (`pip install 'effseg_jax[tpu]'`), no TPU and no data. It is
the step that train.py runs, with its shardings. How to read the page: docs/scaling.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The host is asked for nothing but its compiler.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app, flags
from ml_collections import config_flags

from effseg_jax.errors import UserError, friendly_exit, parse_flags
from tools import compile_table
from tools.compile_account import account_for, page


def _config_name() -> str:
  """The experiment as it was asked for: its file and what was changed."""
  flag = flags.FLAGS["config"]
  changes = config_flags.get_override_values(flag)
  words = [f"{key}={value}" for key, value in changes.items()]
  return " ".join([config_flags.get_config_filename(flag), *words])


def define_flags() -> None:
  """Not at import: tests import this file beside other entry points with flags alike."""
  config_flags.DEFINE_config_file(
    "config", None, "The experiment: configs/afformer/ade20k.py[:variant].", lock_config=True
  )
  flags.DEFINE_string("topology", "v5e:4x4", "The slice: v4, v5e, v5p, v6e or TPU7x, and chips.")
  flags.DEFINE_string("table", None, "Complete the table of all experiments in this document.")
  flags.DEFINE_string("only", "", "With --table: rows whose experiment and slice contain this.")
  flags.DEFINE_bool("again", False, "With --table: compile also what the table has.")


def main(argv: list[str]) -> None:
  """Checks the flags; prints a page, or completes the table."""
  given = flags.FLAGS
  with friendly_exit():
    if len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
    if (given.config is None) == (given.table is None):
      raise UserError("either --config or --table is needed; see --help.")
    if given.table is None:
      name = _config_name()
      print(page(account_for(given.config, name, given.topology)))
      return
    compile_table.complete(Path(given.table), only=given.only, again=given.again)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=parse_flags)
