"""Packs a data set into a few large files, which shared storage reads much faster than many small.

  effseg prepare --config=afformer/ade20k \
    --config.data.root=data/ADEChallengeData2016 --output=data/ade20k_packed

Then train with `--config.data.root=data/ade20k_packed`: the batches are the same. Started again
after an interruption, it goes on. `--verify` compares a packed data set with its checksums.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from effseg_jax.cli import Flags, define_config, no_arguments
from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import datasets, packed, records


def prepare(
  config: ConfigDict, output: str | Path, splits: list[str], examples_per_shard: int
) -> None:
  """Packs splits of the configured data set, with a progress bar each.

  Args:
    config: an experiment; its `data` is used.
    output: folder of the packed data set.
    splits: names; those that are there already are passed over.
    examples_per_shard: see `records.write_split`.

  Raises:
    UserError: see `packed.pack`.
  """
  with extra("train"):
    from tqdm import tqdm

  options = config.data.options.to_dict()
  if records.is_packed(config.data.root or None):
    raise UserError(f"--config.data.root={config.data.root} is packed already.")
  for split in splits:
    if records.is_packed(output) and split in records.read_manifest(output)["splits"]:
      print(f"{split}: is there already; delete {Path(output) / split} and its entry to pack anew")
      continue
    dataset = datasets.open_dataset(
      config.data.name, root=config.data.root or None, split=split, **options
    )
    with tqdm(total=len(dataset), desc=split, unit=" examples", disable=None) as bar:
      entry = packed.pack(
        dataset,
        output,
        name=config.data.name,
        options=options,
        examples_per_shard=examples_per_shard,
        num_threads=config.data.num_threads,
        on_error=config.data.on_error,
        on_example=lambda done, bar=bar: bar.update(done - bar.n),
      )
    size = sum(shard["bytes"] for shard in entry["shards"])
    print(
      f"{split}: {entry['examples']:,} examples in {len(entry['shards'])} shards, {size / 1e6:,.0f}"
      f" MB, in {Path(output) / split}"
    )
    for line in entry["skipped"]:
      print(f"  left out: {line}")


def verify(output: str | Path) -> bool:
  """Compares all shards with their checksums, and lists those that differ."""
  sound = True
  for split in records.read_manifest(output)["splits"]:
    bad = [name for name, same in records.verify(output, split) if not same]
    sound &= not bad
    print(f"{split}: " + ("; ".join(f"{name} is damaged" for name in bad) or "as it was packed"))
  return sound


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  define_config(values)
  flags.DEFINE_string("output", None, "Folder of the packed data set.", flag_values=values)
  flags.DEFINE_list(
    "splits",
    None,
    "Splits; default: those that the experiment trains and evaluates on.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "examples_per_shard",
    1000,
    "Examples of every shard but the last.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_bool(
    "verify", False, "Compare --output with its checksums; pack nothing.", flag_values=values
  )


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and packs."""
  no_arguments(arguments)
  if not values.output or (values.config is None and not values.verify):
    raise UserError("--config and --output are needed; see effseg prepare --help.")
  if values.verify:
    return 0 if verify(values.output) else 1
  config = values.config
  splits = values.splits or list(dict.fromkeys([config.data.train_split, config.eval.split]))
  prepare(config, values.output, splits, values.examples_per_shard)
  return 0
