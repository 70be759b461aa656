"""Puts the parts of `benchmarks/gpu.sh` into one JSON file, and prints them as Markdown tables.

  python -m benchmarks.collect runs/gpu

Reads `runs/gpu/parts`, and the logs of the trainings beside it; writes `runs/gpu/gpu.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from effseg_jax.errors import UserError, friendly_exit

_TIMED_OUT = (124, 137)  # exit statuses of timeout(1)


def collect(folder: Path) -> dict[str, Any]:
  """All that is known of a run: how each part ended, and what it measured.

  Args:
    folder: the output of `benchmarks/gpu.sh`.

  Returns:
    `parts`: by name `outcome` ("finished", "timed out", "failed" or "skipped"), `seconds`, and
    what there is of `results`, `machine` and `versions` (a race), `metrics` (a training: the last
    value of each number it logged) or `reason` (the log's last line).

  Raises:
    UserError: if there are no parts.
  """
  parts = {}
  for path in sorted((folder / "parts").glob("*.status"), key=lambda path: path.stat().st_mtime_ns):
    status, seconds = path.read_text(encoding="utf-8").split()
    part: dict[str, Any] = {"outcome": _outcome(status), "seconds": int(seconds)}
    measured = path.with_suffix(".json")
    if measured.is_file():
      part |= json.loads(measured.read_text(encoding="utf-8"))
    metrics = folder / path.stem / "metrics.jsonl"
    if metrics.is_file():
      part["metrics"] = _last_values(metrics)
    if part["outcome"] not in ("finished", "skipped"):
      lines = path.with_suffix(".log").read_text(encoding="utf-8", errors="replace").split("\n")
      part["reason"] = next((line for line in reversed(lines) if line.strip()), "no output")
    parts[path.stem] = part
  if not parts:
    raise UserError(f"{folder}/parts has no results; expected the output of benchmarks/gpu.sh.")
  return {"parts": parts}


def tables(document: Mapping[str, Any]) -> str:
  """Markdown: a table for each race, a line for everything else."""
  blocks = []
  for name, part in document["parts"].items():
    title = f"**{name}**: {part['outcome']} in {part['seconds']} s"
    if "flags" in part:
      flags = " ".join(flag for flag in part["flags"] if not flag.startswith("--json"))
      title += f", `python -m benchmarks {flags}`"
    lines = [title]
    if "results" in part:
      lines += ["", *_race_rows(part["results"])]
    if "metrics" in part:
      numbers = [f"{key} {value:.4g}" for key, value in part["metrics"].items() if "/" in key]
      lines.append(f"step {part['metrics']['step']:.0f}: " + ", ".join(numbers))
    if "reason" in part:
      lines.append(f"last line: {part['reason']}")
    blocks.append("\n".join(lines))
  return "\n\n".join(blocks)


def _race_rows(results: Sequence[Mapping[str, Any]]) -> list[str]:
  """Images a second and ratio of every contender."""
  rows = ["| | median ms | images/s | ratio | quartiles | compile s | device MB |"]
  rows.append("|---|---|---|---|---|---|---|")
  for entry in results:
    median, _ = report.milliseconds(entry["seconds"])
    low, high = entry["ratio_quartiles"]
    compile_seconds = entry["compile_seconds"]
    cells = [
      entry["title"],
      median,
      f"{1e3 * entry['spec']['batch'] / float(median):.0f}",
      f"{entry['ratio']:.2f}",
      f"{low:.2f}-{high:.2f}",
      "-" if compile_seconds is None else f"{compile_seconds:.0f}",
      report.megabytes(entry["device_bytes"]),
    ]
    rows.append("| " + " | ".join(cells) + " |")
  return rows


def _outcome(status: str) -> str:
  if status == "skipped":
    return status
  if int(status) in _TIMED_OUT:
    return "timed out"
  return "failed" if int(status) else "finished"


def _last_values(path: Path) -> dict[str, float]:
  """The last value of each number in a run's log; a line that is being written is left out."""
  values: dict[str, float] = {}
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      values |= json.loads(line)
    except ValueError:
      continue
  return values


def main(argv: Sequence[str] | None = None) -> None:
  """Checks the flags, writes the file, prints the tables."""
  with friendly_exit():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="output of benchmarks/gpu.sh")
    folder = parser.parse_args(argv).folder
    document = collect(folder)
    target = folder / "gpu.json"
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(tables(document), f"written to {target}", sep="\n\n")


if __name__ == "__main__":
  main()
