"""The benchmark's arithmetic, its flags, and one small table; times are never tested."""

from __future__ import annotations

import pytest

from tools import benchmark
from tools import benchmark_report as report


def test_a_ratio_above_one_is_faster():
  assert report.ratio([2.0, 4.0, 3.0], [1.0, 1.5, 2.0]) == pytest.approx(2.0)
  low, high = report.ratio_range([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
  assert low == high == pytest.approx(2.0)


@pytest.mark.parametrize(
  ("arguments", "hint"),
  [
    (["--model=afformer_tiney"], "afformer_tiny"),
    (["--rounds=0"], "1 or more"),
    (["--size=512"], "512"),
    (["--peers=pytorch"], "torch"),
    (["--filters", "--kernels=3,4"], "4 is even"),
    (["--filters", "--train"], "not allowed"),
  ],
)
def test_a_mistake_ends_in_one_line(arguments, hint, capsys):
  with pytest.raises(SystemExit) as stopped:
    benchmark.main(arguments)
  assert stopped.value.code == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert hint in line


def test_filters_are_tabled(capsys):
  benchmark.main(
    ["--filters", "--kernels=3", "--grids=8", "--channels=4", "--rounds=1", "--device=cpu"]
  )
  said = capsys.readouterr().out
  for purpose in ("forward", "input_gradient", "kernel_gradient"):
    assert purpose in said
