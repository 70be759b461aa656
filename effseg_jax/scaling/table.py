"""The table of docs/scaling.md: every experiment on a slice, stored row by row beside the document.

A row is compiled once; `scaling.json` beside the document stores its numbers, so that the
table can be completed over several evenings and drawn anew without compiling.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effseg_jax import configs
from effseg_jax.errors import UserError
from effseg_jax.scaling.account import Account, account_for

# Experiment -> slices. Where the published batch is 8, eight chips take one example each.
ROWS: Mapping[str, Sequence[str]] = {
  "afformer/ade20k:tiny": (
    *("v5e:4x4", "v5e:16x16", "v6e:4x4", "v4:2x2x4", "v5p:2x2x4", "TPU7x:2x2x2"),
  ),
  "afformer/ade20k:base": ("v5e:4x4",),
  "afformer/ade20k:base_fft": ("v5e:4x4",),
  "afformer/cityscapes:base": ("v5e:2x4",),
  "afformer/coco_stuff:base": ("v5e:4x4",),
  "afformer/imagenet:base": ("v5e:4x4",),
  "afformer/camvid:tiny": ("v5e:2x4",),
  "afformer/folder:tiny": ("v5e:2x4",),
  "afformer/pets:tiny": ("v5e:4x4",),
  "afformer/synthetic:tiny": ("v5e:2x4",),
  "mask2former/coco_panoptic:r50": ("v5e:4x4",),
  "mask2former/coco_instances:r50": ("v5e:4x4",),
  "mask2former/ade20k_panoptic:r50": ("v5e:4x4",),
  "mask2former/ade20k_semantic:swin_tiny": ("v5e:4x4",),
  "mask2former/cityscapes_panoptic:r50": ("v5e:4x4",),
  "proscale/coco_panoptic:swin_tiny,333": ("v5e:4x4", "v5e:16x16"),
  "proscale/coco_instances:r50,333": ("v5e:4x4",),
  "proscale/ade20k_panoptic:r50,333": ("v5e:4x4",),
  "proscale/ade20k_semantic:swin_tiny,333": ("v5e:4x4",),
  "proscale/cityscapes_panoptic:swin_tiny,333": ("v5e:4x4",),
  "proscale/synthetic:r50,111": ("v5e:2x4",),
  "proscale/overfit:swin_tiny,111": ("v5e:1x1",),
  "eco_m2f/coco_panoptic:swin_tiny": ("v5e:4x4",),
  "eco_m2f/synthetic:r50": ("v5e:2x4",),
  "avesformer/s4:r50": ("v5e:4x4",),
  "avesformer/ms3:r50": ("v5e:4x4",),
  "avesformer/avss:r50": ("v5e:4x4",),
  "avesformer/synthetic:lite": ("v5e:2x4",),
  "segformer/ade20k:b0": ("v5e:4x4",),
  "segformer/cityscapes:b0": ("v5e:2x4",),
  "segformer/coco_stuff:b0": ("v5e:4x4",),
  "segformer/imagenet:b0": ("v5e:4x4",),
  "segformer/camvid:b0": ("v5e:2x4",),
  "efficientvit/ade20k:b1": ("v5e:4x4",),
  "efficientvit/cityscapes:b0": ("v5e:4x4",),
  "efficientvit/camvid:b0": ("v5e:2x4",),
  "ssa_seg/ade20k:base": ("v5e:4x4",),
  "ssa_seg/coco_stuff:base": ("v5e:4x4",),
  "eomt/coco_panoptic:l": ("v5e:4x4",),
  "eomt/coco_instances:l": ("v5e:4x4",),
  "eomt/ade20k_panoptic:l": ("v5e:4x4",),
  "eomt/ade20k_semantic:l": ("v5e:4x4",),
  "eomt/cityscapes_semantic:l": ("v5e:4x4",),
  "eomt/synthetic": ("v5e:2x4",),
  "segvit/ade20k": ("v5e:4x4",),
  "segvit/coco_stuff": ("v5e:4x4",),
  "setr/ade20k": ("v5e:4x4",),
  "setr/cityscapes": ("v5e:2x4",),
  "proscale/folder_instances:r50,111": ("v5e:2x4",),
}

_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
_HEADER = (
  *("experiment", "slice", "batch (a device)", "parameters", "memory, GiB a device"),
  *("GFLOP", "GB moved", "bound, ms", "examples/s, at most", "collectives", "MB", "compile s"),
)


def complete(document: Path, *, only: str = "", again: bool = False) -> None:
  """Compiles the rows that are missing, and writes the table after each.

  Args:
    document: a Markdown file with the two comment lines between which the table stands.
    only: rows whose experiment and slice, as the table names them, contain this.
    again: compile rows that are there, too.

  Raises:
    UserError: if the document has no place for the table, or no row is called so.
  """
  rows = read_rows(document)
  write_table(document, rows)
  chosen = [
    (config, topology)
    for config, topologies in ROWS.items()
    for topology in topologies
    if only in f"{config} {topology}"
  ]
  if not chosen:
    raise UserError(
      f"--only={only}: no row of the table is called so; expected a part of"
      " 'afformer/ade20k:tiny v5e:4x4', for example."
    )
  for config, topology in chosen:
    key = f"{config} {topology}"
    if again or key not in rows:
      print(f"compiling {key} ...", flush=True)
      try:
        account = account_for(configs.load(config), config, topology)
      except UserError as error:
        print(f"  {error}", flush=True)
        continue
      rows[key] = dataclasses.asdict(account)
      _rows_file(document).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
      write_table(document, rows)
      print(f"  {account.compile_seconds:.0f} s; {'; '.join(account.warnings) or 'no warnings'}")


def read_rows(document: Path) -> dict[str, dict[str, Any]]:
  """The rows that are known, by experiment and slice."""
  path = _rows_file(document)
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_table(document: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
  """Puts the rows into the document, in the order of `ROWS`."""
  if not document.is_file():
    raise UserError(f"--table={document} does not exist; expected docs/scaling.md.")
  text = document.read_text(encoding="utf-8")
  if _BEGIN not in text or _END not in text:
    raise UserError(f"{document} has no lines {_BEGIN} and {_END}, between which the table goes.")
  head, _, rest = text.partition(_BEGIN)
  tail = rest.partition(_END)[2]
  document.write_text(f"{head}{_BEGIN}\n{table(rows)}\n{_END}{tail}", encoding="utf-8")


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """Markdown; a row without a program says how much memory it would need."""
  lines = [_HEADER, ["---"] * len(_HEADER)]
  for config, topologies in ROWS.items():
    for topology in topologies:
      row = rows.get(f"{config} {topology}")
      if row is not None:
        lines.append(_cells(Account(**row)))
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(a: Account) -> list[str]:
  choices = [a.dtype] * (a.dtype != "float32") + ["remat"] * a.remat
  choices += [f"{a.accumulate} parts"] * (a.accumulate > 1)
  memory = f"{a.peak_bytes / 2**30:.2f} of {a.hbm_bytes / 2**30:.0f}"
  cells = [
    f"`{a.config}`" + (f" {', '.join(choices)}" if choices else ""),
    a.topology,
    f"{a.global_batch} ({a.global_batch / a.devices:g})",
    f"{a.parameters / 1e6:.1f} M",
    memory if a.fits else f"**{memory}**",
  ]
  if not a.fits:
    return [*cells, "does not fit", *([""] * 5), f"{a.compile_seconds:.0f}"]
  return [
    *cells,
    f"{a.flops / 1e9:,.0f}",
    f"{a.moved_bytes / 1e9:.2f}",
    f"{a.step_seconds * 1e3:.2f} {a.bound}",
    f"{a.global_batch / a.step_seconds:,.0f}",
    ", ".join(f"{count} {kind}" for kind, _, count, _ in a.collectives) or "none",
    f"{sum(entry[3] for entry in a.collectives) / 1e6:.1f}",
    f"{a.compile_seconds:.0f} ({a.compile_cpu_seconds:.0f})",
  ]


def _rows_file(document: Path) -> Path:
  return document.with_suffix(".json")
