"""Looking at a data set before training: what is in it, what is odd, and what cannot be right."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import base, panoptic

_THREADS = 4
_HEADERS = 2000  # of pictures, per split
_LARGE_VOID = 0.5
_MANY = 50  # labels of which one class alone is no chance


@dataclasses.dataclass
class SplitReport:
  """What was found in a split.

  Attributes:
    name: of the split.
    examples: their number.
    looked_at: number of labels that were read.
    sizes: (rows, columns) of pictures, from their headers.
    turned: number of pictures that EXIF data turn.
    classes: names.
    pixels: int64 (K,), of each class in the labels that were read; 0 for a class per image.
    pictures: int64 (K,), in how many of them each class occurs.
    void: pixels of no class.
    objects: number of objects of each picture, for segments and instances.
    areas: their pixels.
    broken: the first messages of examples that cannot be read.
    num_broken: how many there are.
    unused: classes that no label can have, see `SegmentationFiles`.
    unread: files beside the pictures that are no pictures, by suffix.
  """

  name: str
  examples: int
  classes: tuple[str, ...]
  looked_at: int = 0
  sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
  turned: int = 0
  pixels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
  pictures: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
  void: int = 0
  objects: list[int] = dataclasses.field(default_factory=list)
  areas: list[int] = dataclasses.field(default_factory=list)
  broken: list[str] = dataclasses.field(default_factory=list)
  num_broken: int = 0
  unused: tuple[int, ...] = ()
  unread: Counter[str] = dataclasses.field(default_factory=Counter)

  @property
  def void_share(self) -> float:
    """Share of pixels without a class."""
    return self.void / max(int(self.pixels.sum()) + self.void, 1)


def look(dataset: Any, *, labels: int = 300, seconds: float = 60.0) -> SplitReport:
  """Reads headers and some labels of an open split.

  Args:
    dataset: of pictures with class maps, a class each, or segments; of clips, the number alone.
    labels: how many at most, spread evenly.
    seconds: no more are begun after this time.
  """
  classes = tuple(dataset.classes)
  report = SplitReport(str(dataset.split), len(dataset), classes)
  report.unused = tuple(getattr(dataset, "unused", ()))
  report.pixels = np.zeros(len(classes), np.int64)
  report.pictures = np.zeros(len(classes), np.int64)
  if not hasattr(dataset, "image_size"):
    return report
  end = time.monotonic() + seconds
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for found in pool.map(lambda i: _header(dataset, i, end), _spread(len(dataset), _HEADERS)):
      if found is not None:
        report.sizes.append(found[0])
        report.turned += found[1]
    for found in pool.map(lambda i: _label(dataset, i, end), _spread(len(dataset), labels)):
      _add(report, found)
  _find_unread(dataset, report)
  return report


def judge(
  reports: Sequence[SplitReport], task: str, *, training: str
) -> tuple[list[str], list[str]]:
  """What is wrong and what is odd.

  Args:
    reports: of the splits.
    task: `task.name` of the experiment.
    training: name of the split that is trained on.

  Returns:
    Problems, with which a training makes no sense, and warnings; a line each.
  """
  problems: list[str] = []
  odd: list[str] = []
  first = reports[0]
  for other in reports[1:]:
    problems += _differences(first, other)
  if task == "semantic" and len(first.classes) == 1:
    problems.append(
      f"there is one class, {first.classes[0]!r}; a softmax needs two: add background as the first."
    )
  for report in reports:
    at = f"split {report.name}"
    if report.num_broken:
      total = report.looked_at + report.num_broken
      problems.append(
        f"{at}: {report.num_broken} of {total} labels that were looked at cannot be used; the"
        f" first: {report.broken[0]}"
      )
    if report.turned:
      odd.append(
        f"{at}: {report.turned} of {len(report.sizes)} pictures are turned upright by their EXIF"
        " orientation; labels are taken as upright (for the data set folder,"
        " --config.data.options.turn_labels=True takes them as stored)."
      )
    if report.unread:
      kinds = ", ".join(f"{count} {suffix}" for suffix, count in report.unread.most_common(5))
      odd.append(f"{at}: files beside the pictures were not read: {kinds}.")
    if report.looked_at and task in ("semantic", "universal"):
      _judge_labels(report, task, problems, odd, training=report.name == training)
  return problems, odd


def page(reports: Sequence[SplitReport]) -> str:
  """One page of text: a line per class, a column per split."""
  lines = []
  for report in reports:
    sizes = ""
    if report.sizes:
      rows, cols = np.array(report.sizes).T
      sizes = f", {rows.min()}x{cols.min()} to {rows.max()}x{cols.max()} pixels"
    looked = f"; {report.looked_at:,} labels looked at" if report.looked_at else ""
    lines.append(f"{report.name}: {report.examples:,} examples{sizes}{looked}")
    if report.looked_at and (report.pixels.any() or report.void):
      lines.append(f"  without a class: {100 * report.void_share:.1f} % of the pixels")
    if report.objects:
      counts, areas = np.array(report.objects), np.array(report.areas or [0])
      lines.append(
        f"  objects per picture: {counts.min()} to {counts.max()}, {counts.mean():.1f} on average;"
        f" pixels of an object: {areas.min():,} to {areas.max():,}, median"
        f" {int(np.median(areas)):,}"
      )
  shown = [report for report in reports if report.looked_at]
  if shown:
    names = shown[0].classes
    width = max(map(len, (*names, "class")))
    head = "  ".join(f"{report.name[:18]:>18}" for report in shown)
    lines += ["", f"{'class':<{width}}  {head}   (share of pixels, pictures)"]
    for index, name in enumerate(names):
      cells = []
      for report in shown:
        if index >= len(report.pixels):
          continue
        share = report.pixels[index] / max(report.pixels.sum(), 1)
        cells.append(f"{100 * share:9.2f} %{report.pictures[index]:7,}")
      lines.append(f"{name:<{width}}  {'  '.join(cells)}")
  return "\n".join(lines)


def check(
  datasets: Mapping[str, Any], task: str, *, training: str, on_error: str, seconds: float = 5.0
) -> list[str]:
  """The look at the start of a training.

  Args:
    datasets: open splits by name; drawn ones are passed over.
    task: `task.name`.
    training: name of the split that is trained on.
    on_error: with "skip", broken examples are odd and no problem.
    seconds: for each split.

  Returns:
    What is odd, a line each.

  Raises:
    UserError: for the first problem, with how to go on.
  """
  reports = [
    look(dataset, labels=200, seconds=seconds)
    for dataset in datasets.values()
    if not str(dataset.name).startswith("synthetic")
  ]
  if not reports:
    return []
  problems, odd = judge(reports, task, training=training)
  if on_error == "skip":
    odd += [line for line in problems if "cannot be used" in line]
    problems = [line for line in problems if "cannot be used" not in line]
  if problems:
    raise UserError(
      f"the data of this training: {problems[0]} (effseg inspect shows more;"
      " --config.data.check=off leaves this check out)"
    )
  return odd


def _judge_labels(
  report: SplitReport, task: str, problems: list[str], odd: list[str], *, training: bool
) -> None:
  at = f"split {report.name}"
  present = np.flatnonzero(report.pictures)
  everything = report.looked_at >= report.examples
  void = f"{100 * report.void_share:.0f} %"
  if not len(present):
    if everything or report.looked_at >= _MANY:
      problems.append(
        f"{at}: no label has a class; {void} of the pixels are not counted (255, or the value of"
        " data.options.ignore)."
      )
    return
  there = {*present.tolist(), *report.unused}
  absent = [name for index, name in enumerate(report.classes) if index not in there]
  alone = len(present) == 1 and len(report.classes) > 1 and task == "semantic"
  sure = everything or report.looked_at >= _MANY
  if alone and training and sure and not report.unused:
    others = ", ".join(map(repr, absent[:3]))
    name = report.classes[present[0]]
    line = f"{at}: the class {name!r} is the only one in {report.looked_at} labels;"
    line += f" {others} {'occurs' if len(absent) == 1 else 'occur'} in no label, and {void} of the"
    line += " pixels are 255 or ignored."
    if report.void_share > 0:
      line += " If 255 means the class, write 1, or set --config.data.options.labels=binary."
    problems.append(line)
    return
  if alone and training:
    name = report.classes[present[0]]
    odd.append(f"{at}: {name!r} is the only class in the labels that were looked at.")
  if absent and everything:
    shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    odd.append(f"{at}: {len(absent)} of {len(report.classes)} classes occur in no label: {shown}.")
  if report.void_share > _LARGE_VOID and not report.objects:
    odd.append(f"{at}: {void} of the pixels have no class and are not counted.")
  if report.objects and training:
    empty = report.objects.count(0)
    if empty:
      odd.append(f"{at}: {empty} of {report.looked_at} pictures have no object.")


def _differences(one: SplitReport, other: SplitReport) -> list[str]:
  """How the classes of two splits differ."""
  if one.classes == other.classes:
    return []
  both = f"the classes of {one.name} and {other.name} differ"
  if len(one.classes) != len(other.classes):
    mine, theirs = set(one.classes), set(other.classes)
    only = [*sorted(mine - theirs), *sorted(theirs - mine)][:3]
    return [f"{both}: {len(one.classes)} and {len(other.classes)} ({', '.join(only)} in one only)."]
  pairs = enumerate(zip(one.classes, other.classes, strict=True))
  place = next(number for number, (mine, theirs) in pairs if mine != theirs)
  order = " in order" if set(one.classes) == set(other.classes) else ""
  return [f"{both}{order}: number {place} is {one.classes[place]!r} and {other.classes[place]!r}."]


def _spread(count: int, wanted: int) -> list[int]:
  """At most `wanted` of `count` numbers, spread evenly."""
  if count <= wanted:
    return list(range(count))
  return np.unique(np.linspace(0, count - 1, wanted).round().astype(int)).tolist()


def _header(dataset: Any, index: int, end: float) -> tuple[tuple[int, int], bool] | None:
  if time.monotonic() > end:
    return None
  try:
    path = _picture_path(dataset, index)
    turned = path is not None and codecs.orientation(path) != 1
    return dataset.image_size(index), turned
  except UserError:
    return None  # its label says so, too


def _label(dataset: Any, index: int, end: float) -> Any:
  """Class pixels and objects of an example; a message where it cannot be read; None: no time."""
  if time.monotonic() > end:
    return None
  try:
    if isinstance(dataset, panoptic.UniversalDataset):
      example, truth = dataset[index], dataset.ground_truth(index)
      counts = np.zeros(dataset.num_classes, np.int64)
      np.add.at(counts, truth.labels, truth.areas)
      void = max(example["image"].shape[0] * example["image"].shape[1] - int(counts.sum()), 0)
      kept = ~truth.crowd
      return counts, void, truth.areas[kept].tolist(), True
    label = dataset[index]["label"]
    if not np.ndim(label):
      counts = np.zeros(len(dataset.classes), np.int64)
      counts[int(label)] = 1
      return counts, 0, [], False
    counts = np.bincount(label.ravel(), minlength=base.IGNORE_LABEL + 1)
    return counts[: len(dataset.classes)], int(counts[base.IGNORE_LABEL]), [], False
  except UserError as error:
    return str(error)


def _add(report: SplitReport, found: Any) -> None:
  if found is None:
    return
  if isinstance(found, str):
    report.num_broken += 1
    report.broken = [*report.broken, found][:5]
    return
  counts, void, areas, has_objects = found
  report.looked_at += 1
  report.pixels += counts
  report.pictures += counts > 0
  report.void += void
  if has_objects:
    report.objects.append(len(areas))
    report.areas += areas


def _picture_path(dataset: Any, index: int) -> Path | None:
  pairs = getattr(dataset, "pairs", None)
  return pairs[index][0] if pairs is not None else None


def _find_unread(dataset: Any, report: SplitReport) -> None:
  """Counts files that lie beside the pictures of a folder and are none."""
  pairs = getattr(dataset, "pairs", None)
  if not pairs or dataset.name != "folder":
    return
  for folder in {image.parent for image, _ in pairs}:
    for path in codecs.list_files(folder):
      if not codecs.is_picture(path):
        report.unread[path.suffix.lower() or path.name] += 1
