"""Draws the curves of runs: the loss and the metrics of their evaluations.

  effseg plot_curves runs/a runs/b --output=curves.png

Reads `metrics.jsonl`. If an interrupted run repeated some steps, the last values are used. Needs
matplotlib: `pip install 'effseg_jax[train]'`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from effseg_jax.cli import Flags
from effseg_jax.errors import UserError, extra

# Distinguishable with the common colour-vision deficiencies (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _GRID = "#333333", "#E4E4E0"

# Of universal, audio-visual and semantic segmentation, and of classification.
SCORES = ("PQ", "AP", "M_J", "mIoU", "top1")

Curve = tuple[list[int], list[float]]


def read_curves(run: str | Path) -> dict[str, Curve]:
  """Reads a run's log.

  Args:
    run: a working directory, or its `metrics.jsonl`.

  Returns:
    Steps (ascending) and values by name, e.g. `train/loss`, `eval/mIoU`.

  Raises:
    UserError: if there is no log, or a line of it is no JSON object with a `step`.
  """
  path = Path(run)
  path = path / "metrics.jsonl" if path.is_dir() else path
  if not path.is_file():
    raise UserError(f"{path} is missing; expected the --workdir of a training run.")
  values: dict[str, dict[int, float]] = {}
  lines = path.read_text(encoding="utf-8").splitlines()
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      step = int(record.pop("step"))
    except (ValueError, KeyError, AttributeError, TypeError):
      if number == len(lines):  # the run is writing it, or was killed while it did
        break
      raise UserError(f"{path}, line {number} is no log line: {line[:60]!r}.") from None
    for name, value in record.items():
      if value is not None:  # a number that was not finite
        values.setdefault(name, {})[step] = float(value)
  if not values:
    raise UserError(f"{path} is empty; nothing has been logged yet.")
  return {
    name: (sorted(points), [points[step] for step in sorted(points)])
    for name, points in values.items()
  }


def run_names(runs: Sequence[str | Path]) -> list[str]:
  """The shortest end of each path that distinguishes the runs."""
  parts = [(path.parent if path.suffix == ".jsonl" else path).parts for path in map(Path, runs)]
  for depth in range(1, max(map(len, parts)) + 1):
    names = ["/".join(part[-depth:]) for part in parts]
    if len(set(names)) == len(names):
      return names
  return [str(run) for run in runs]


def plot(runs: Sequence[str | Path], output: str | Path) -> Path:
  """Draws the training loss on the left and the main number of the evaluations on the right.

  That is the first of `SCORES` that any of the runs has.

  Args:
    runs: working directories.
    output: the picture; its folder is made if it is missing.

  Returns:
    The path written.

  Raises:
    UserError: if matplotlib is not installed or a log cannot be read.
  """
  curves = [read_curves(run) for run in runs]
  with extra("train"):
    import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot

  names = run_names(runs)
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
  losses = [c.get("train/loss") for c in curves]
  values = [value for c in losses if c for value in c[1]]
  wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
  _panel(left, "training loss", losses, names, scale="log" if wide else "linear")
  score = next((name for name in SCORES if any(f"eval/{name}" in c for c in curves)), SCORES[0])
  scores = [c.get(f"eval/{score}") for c in curves]
  percent = [None if c is None else (c[0], [100 * value for value in c[1]]) for c in scores]
  _panel(right, f"{score}, %", percent, names, marked=True)

  path = Path(output)
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    figure.savefig(path, dpi=150, facecolor="white")
  except ValueError as error:
    raise UserError(f"--output={output}: {error}.") from None
  finally:
    pyplot.close(figure)
  return path


def _panel(
  axes: Any,
  title: str,
  curves: Sequence[Curve | None],
  names: Sequence[str],
  *,
  scale: str = "linear",
  marked: bool = False,
) -> None:
  """One set of axes: a line per run, its name (and last value, if marked) written at its end."""
  axes.set_title(title, loc="left", fontsize=11, color=_INK)
  axes.set_xlabel("step", color=_INK, fontsize=9)
  axes.grid(axis="y", color=_GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(_GRID)
  axes.tick_params(which="both", colors=_INK, labelsize=9, length=0)
  ends = []
  for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
    if curve is None:
      continue
    colour = _COLOURS[index % len(_COLOURS)]
    marker = {"marker": "o", "markersize": 3.5} if marked else {}
    axes.plot(*curve, color=colour, linewidth=1.6, **marker)
    label = f"{name}  {curve[1][-1]:.1f}" if marked else name
    ends.append((curve[1][-1], label, colour))
  if not ends:
    axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", color=_INK)
    return
  axes.set_yscale(scale)
  axes.xaxis.get_major_locator().set_params(integer=True)
  if marked:
    axes.set_ylim(bottom=0)
  # Written beside the axes, in the order of the lines' ends, and apart from one another.
  axes.get_ylim()  # without which the limits are not yet those of the lines
  height = lambda end: axes.transLimits.transform(axes.transScale.transform((1, end[0])))[1]  # noqa: E731
  spacing, last = 0.06, -float("inf")
  for end in sorted(ends, key=height):
    _, label, colour = end
    last = max(height(end), last + spacing)
    axes.annotate(
      label,
      (1.01, last),
      xycoords="axes fraction",
      va="center",
      fontsize=9,
      color=colour,
      annotation_clip=False,
    )


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  flags.DEFINE_string(
    "output", "curves.png", "The picture to write (PNG, SVG or PDF).", flag_values=values
  )


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Draws the runs named on the command line."""
  if not arguments:
    raise UserError("name at least one run: effseg plot_curves runs/camvid.")
  print(plot(arguments, values.output))
