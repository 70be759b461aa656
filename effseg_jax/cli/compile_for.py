r"""Compiles the training step for TPUs that are not attached, and reports its memory and cost.

  effseg compile_for --config=afformer/ade20k:tiny --topology=v5e:4x4
  effseg compile_for --config=proscale/coco_panoptic --topology=v5e:16x16 \
    --config.model.dtype=bfloat16
  effseg compile_for --table=docs/scaling.md      # adds the missing rows of the table

Runs on any machine; it needs libtpu (`pip install 'effseg_jax[tpu]'`), but no TPU and no data. The
step is that of `effseg train`, with its shardings. docs/scaling.md explains the report.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Only the host's compiler is used.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags
from ml_collections import config_flags

from effseg_jax import configs
from effseg_jax.cli import Flags, define_config, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.scaling import table as compile_table
from effseg_jax.scaling.account import account_for, page


def _config_name(values: Flags) -> str:
  """The requested experiment: its name and the changed fields."""
  changes = config_flags.get_override_values(values["config"])
  words = [f"{key}={value}" for key, value in changes.items()]
  return " ".join([configs.label(values.experiment), *words])


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  define_config(values)
  flags.DEFINE_string(
    "topology", "v5e:4x4", "The slice: v4, v5e, v5p, v6e or TPU7x, and chips.", flag_values=values
  )
  flags.DEFINE_string(
    "table", None, "Complete the table of all experiments in this document.", flag_values=values
  )
  flags.DEFINE_string(
    "only", "", "With --table: rows whose experiment and slice contain this.", flag_values=values
  )
  flags.DEFINE_bool(
    "again", False, "With --table: compile existing rows as well.", flag_values=values
  )


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags; prints a page, or completes the table."""
  no_arguments(arguments)
  if (values.config is None) == (values.table is None):
    raise UserError("either --config or --table is needed; see --help.")
  if values.table is None:
    name = _config_name(values)
    print(page(account_for(values.config, name, values.topology)))
    return
  compile_table.complete(Path(values.table), only=values.only, again=values.again)
