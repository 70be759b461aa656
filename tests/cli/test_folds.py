"""The table of folds: the last evaluation of each, and a mean only of what belongs together."""

import json

import pytest

from effseg_jax.cli.folds import fold_table
from effseg_jax.errors import UserError


def _log(folder, scores):
  folder.mkdir(parents=True)
  lines = [json.dumps({"step": step, "eval/mIoU": score}) for step, score in scores.items()]
  (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_the_mean_is_of_the_last_evaluations(tmp_path):
  for name, first, last in (("a", 0.5, 0.4), ("b", 0.1, 0.5), ("c", 0.9, 0.6)):
    _log(tmp_path / "plain" / name, {10: first, 20: last})
    _log(tmp_path / "mixed" / name, {20: last + 0.1} if name != "c" else {10: first})
  header, _, plain, mixed = fold_table([tmp_path / "plain", tmp_path / "mixed"], "mIoU").split("\n")
  assert header == "| setting | steps | a | b | c | mean |"
  assert plain == "| plain | 20 | 40.0 | 50.0 | 60.0 | 50.0 |"
  assert mixed == "| mixed | 10/20 | 50.0 | 60.0 | 90.0 | - |"


def test_a_sweep_without_evaluations_is_named(tmp_path):
  with pytest.raises(UserError, match=r"has no trial with an evaluation of PQ"):
    fold_table([tmp_path], "PQ")
