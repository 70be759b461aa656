"""Measurements as tables and as JSON, with the machine that they were taken on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "opencv-python-headless")


def ratio(reference: Sequence[float], seconds: Sequence[float]) -> float:
  """How many times as fast as the reference: median seconds of the reference over the own ones.

  Args:
    reference: seconds of the reference, one per round.
    seconds: of the contender.
  """
  return statistics.median(reference) / statistics.median(seconds)


def ratio_range(reference: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
  """Quartiles of the ratio round by round; a wide range means that the machine was busy.

  Args:
    reference: seconds of the reference, one per round.
    seconds: of the contender in the same rounds.
  """
  ratios = [a / b for a, b in zip(reference, seconds, strict=True)]
  if len(ratios) < 2:
    return ratios[0], ratios[0]
  low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
  return low, high


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
  """Aligned columns: the first `text_columns` left-aligned, the others right-aligned."""
  lines = [header, *rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if index < text_columns else cell.rjust(width)
      for index, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def milliseconds(seconds: Sequence[float]) -> tuple[str, str]:
  """Median and minimum, for a table."""
  return f"{1e3 * statistics.median(seconds):.2f}", f"{1e3 * min(seconds):.2f}"


def megabytes(count: int | None) -> str:
  """Bytes as 10^6 bytes, or `-` where there is no number."""
  return "-" if count is None else f"{count / 1e6:.0f}"


def machine() -> dict[str, Any]:
  """The machine of the measurement: processor, usable cores, memory, system, load."""
  usable = getattr(os, "sched_getaffinity", None)
  cores = len(usable(0)) if usable else os.cpu_count() or 1
  load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
  return {
    "processor": _processor(),
    "cores": cores,
    "memory_gb": _memory_gb(),
    "system": f"{platform.system()} {platform.machine()}",
    "load_before": load,
  }


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that are timed, as far as they are installed."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def heading(machine_facts: Mapping[str, Any], version_facts: Mapping[str, str]) -> str:
  """The lines above all tables: machine, versions, and a warning if others use the machine."""
  memory = machine_facts["memory_gb"]
  lines = [
    f"machine: {machine_facts['processor']}, {machine_facts['cores']} cores"
    + (f", {memory:.0f} GB" if memory else "")
    + f", {machine_facts['system']}",
    "versions: " + ", ".join(f"{name} {version}" for name, version in version_facts.items()),
  ]
  load = machine_facts["load_before"]
  if load is not None and load > 0.5:
    lines.append(
      f"busy: the load was {load:.1f} before the first measurement. Neither times nor ratios hold:"
      " PyTorch's threads wait for each other at every operation and lose most."
    )
  return "\n".join(lines)


def write_json(path: str, mode: str, results: Any, facts: Mapping[str, Any]) -> None:
  """Writes all numbers of a run.

  Args:
    path: of the file; its folder is made.
    mode: "inference", "train", "filters", "ops" or "data".
    results: of that mode, plain lists and dictionaries.
    facts: `machine` and `versions`.
  """
  target = Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  # The script's folder is the machine's business: only the flags are kept.
  document = {"mode": mode, "flags": sys.argv[1:], **facts, "results": results}
  target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
  """The model name on Linux: `platform.processor()` is empty or `x86_64` there."""
  try:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except OSError:
    lines = []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  except (ValueError, OSError, AttributeError):
    return None
