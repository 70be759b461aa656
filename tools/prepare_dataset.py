"""Packs a data set into a few large files, which shared storage reads much faster than many small.

  python tools/prepare_dataset.py --config=configs/afformer/ade20k.py \
    --config.data.root=data/ADEChallengeData2016 --output=data/ade20k_packed

Then train with `--config.data.root=data/ade20k_packed`: the batches are the same. Started again
after an interruption, it goes on. `--verify` compares a packed data set with its checksums.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from effseg_jax.errors import UserError, friendly_exit, parse_flags
from input_pipeline import datasets, packed, records


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
  """Compares all shards with their checksums, and says which differ."""
  sound = True
  for split in records.read_manifest(output)["splits"]:
    bad = [name for name, same in records.verify(output, split) if not same]
    sound &= not bad
    print(f"{split}: " + ("; ".join(f"{name} is damaged" for name in bad) or "as it was packed"))
  return sound


def define_flags() -> None:
  """Not at import: a notebook imports this file beside other entry points with flags alike."""
  config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
  flags.DEFINE_string("output", None, "Folder of the packed data set.")
  flags.DEFINE_list("splits", None, "Names; default: those the experiment trains and evaluates on.")
  flags.DEFINE_integer("examples_per_shard", 1000, "Of all shards but the last.", lower_bound=1)
  flags.DEFINE_bool("verify", False, "Compare --output with its checksums; pack nothing.")


def main(argv: list[str]) -> None:
  """Checks the flags and packs."""
  given = flags.FLAGS
  with friendly_exit():
    if len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
    if not given.output or (given.config is None and not given.verify):
      raise UserError(
        "--config and --output are needed; see python tools/prepare_dataset.py --help."
      )
    if given.verify:
      sys.exit(0 if verify(given.output) else 1)
    config = given.config
    splits = given.splits or list(dict.fromkeys([config.data.train_split, config.eval.split]))
    prepare(config, given.output, splits, given.examples_per_shard)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=parse_flags)
