"""Packing on the command line, and the tools that tell runs apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
import small_config

from effseg_jax.cli import prepare as prepare_dataset
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import datasets
from tools import kill_test


def test_splits_are_packed_and_verified(tmp_path, capsys):
  config = small_config.get_config()
  config.data.options.size = (32, 32)
  prepare_dataset.prepare(config, tmp_path, ["val"], examples_per_shard=50)
  said = capsys.readouterr().out
  assert "val: 96 examples in 2 shards" in said
  options = config.data.options.to_dict()
  found = datasets.open_dataset("synthetic", root=tmp_path, split="val", **options)
  original = datasets.open_dataset("synthetic", split="val", **options)
  np.testing.assert_array_equal(found[95]["label"], original[95]["label"])

  prepare_dataset.prepare(config, tmp_path, ["val"], examples_per_shard=50)
  assert "val: is there already" in capsys.readouterr().out
  assert prepare_dataset.verify(tmp_path)
  shard = tmp_path / "val" / "00000-of-00002.array_record"
  shard.write_bytes(shard.read_bytes()[::-1])
  assert not prepare_dataset.verify(tmp_path)
  assert "00000-of-00002.array_record is damaged" in capsys.readouterr().out

  config.data.root = str(tmp_path)
  with pytest.raises(UserError, match="is packed already"):
    prepare_dataset.prepare(config, tmp_path / "again", ["val"], examples_per_shard=50)


def test_the_kill_test_reads_what_was_computed(tmp_path):
  lines = [
    {"step": 1, "train/loss": 2.0, "train/images_per_second": 5.0},
    {"step": 2, "train/loss": 1.5},
    {"step": 2, "train/loss": 1.25, "train/seconds_total": 0.1},  # once more, after a kill
  ]
  text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "tr'
  (tmp_path / "metrics.jsonl").write_text(text)
  assert kill_test.read_log(tmp_path) == {(1, "train/loss"): 2.0, (2, "train/loss"): 1.25}
  assert kill_test.reached(tmp_path) == 2
  assert kill_test.saved(tmp_path) == 0
