"""Compiling for slices that are not here: what is compiled for, the page, the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from effseg_jax import configs
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import pipelines
from effseg_jax.input_pipeline.datasets.stand_in import stand_in
from effseg_jax.input_pipeline.loader import TrainBatches
from effseg_jax.scaling import table as compile_table
from effseg_jax.scaling.account import Account, page
from tests import command

ACCOUNT = Account(
  config="afformer/ade20k:tiny",
  topology="v5e:4x4",
  chips=16,
  hosts=4,
  devices=16,
  mesh={"data": 16},
  global_batch=32,
  accumulate=1,
  dtype="bfloat16",
  remat=False,
  parameters=2_200_000,
  parameter_bytes=8_800_000,
  optimizer_bytes=17_600_000,
  other_state_bytes=0,
  peak_bytes=4 * 2**30,
  temporary_bytes=3 * 2**30,
  hbm_bytes=16 * 2**30,
  flops=40e9,
  moved_bytes=2_000_000_000,
  sent_bytes=20e6,
  compute_seconds=0.0002,
  memory_seconds=0.0025,
  network_seconds=0.0001,
  collectives=[["all-reduce", "data", 90, 10_000_000]],
  largest=[9_000_000, "all-reduce", "jit(train_step)/conv"],
  trace_seconds=10.0,
  compile_seconds=200.0,
  compile_cpu_seconds=180.0,
  warnings=[],
  versions="jax 0.10.2, libtpu 0.0.42.1",
)


def test_the_page_says_what_a_step_needs_and_costs():
  text = page(ACCOUNT)
  for words in (
    "computed ahead of time with jax 0.10.2",
    "16 chips in 4 hosts",
    "32 examples, 2 a device",
    "4.00 of 16 GiB a device (25%)",
    "bound by memory",
    "at least 2.5 ms a step, at most 12,800 examples/s",
    "90 all-reduce over data, 10.00 MB",
    "200 s (180 s of CPU time)",
  ):
    assert words in text
  assert text.splitlines()[-1].split() == ["warnings", "none"]


def test_what_does_not_fit_has_no_roofline():
  changed = {"warnings": ["batch not divisible: 8", "does not fit: 20 GiB"], "moved_bytes": 0}
  text = page(dataclasses.replace(ACCOUNT, **changed))
  assert "at least" not in text
  assert text.splitlines()[-2].endswith("batch not divisible: 8")
  assert text.splitlines()[-1].strip() == "does not fit: 20 GiB"


def test_the_table_is_completed_row_by_row(tmp_path, monkeypatch, capsys):
  document = tmp_path / "scaling.md"
  document.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
  wanted = {
    "afformer/ade20k:tiny": ("v5e:4x4",),
    "afformer/synthetic:tiny": ("v5e:2x4",),
    "afformer/camvid:tiny": ("v5e:2x4",),
  }
  monkeypatch.setattr(compile_table, "ROWS", wanted)
  calls = []

  def account_for(config, name, topology):
    calls.append(name)
    if "synthetic" in name:
      raise UserError("no such thing")
    fits = "camvid" not in name
    return dataclasses.replace(
      ACCOUNT, config=name, topology=topology, warnings=[] if fits else ["does not fit: 20 GiB"]
    )

  monkeypatch.setattr(compile_table, "account_for", account_for)
  compile_table.complete(document)
  text = document.read_text()
  assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
  assert "| `afformer/ade20k:tiny` bfloat16 | v5e:4x4 | 32 (2) | 2.2 M | 4.00 of 16 |" in text
  assert "2.50 memory" in text and "12,800" in text
  assert "**4.00 of 16**" in text and "does not fit" in text
  assert "no such thing" in capsys.readouterr().out
  assert len(json.loads((tmp_path / "scaling.json").read_text())) == 2

  compile_table.complete(document)  # what is known is not compiled again
  assert [name.count("synthetic") for name in calls] == [0, 1, 0, 1]
  compile_table.complete(document, only="ade20k", again=True)
  assert calls[-1] == "afformer/ade20k:tiny"
  compile_table.complete(document, only="afformer/ade20k:tiny v5e", again=True)
  assert len(calls) == 6
  assert document.read_text() == text
  with pytest.raises(UserError, match="no row of the table"):
    compile_table.complete(document, only="ade21k")


def test_a_document_without_a_place_for_the_table(tmp_path):
  path = tmp_path / "other.md"
  with pytest.raises(UserError, match="does not exist"):
    compile_table.write_table(path, {})
  path.write_text("text")
  with pytest.raises(UserError, match="table: begin"):
    compile_table.write_table(path, {})


ROOT = Path(__file__).parents[2]


def test_every_experiment_has_a_row():
  assert set(configs.names()) == {name.partition(":")[0] for name in compile_table.ROWS}


COUNTS = {
  "afformer/ade20k:base": 150,
  "afformer/imagenet:base": 1000,
  "afformer/camvid:tiny": 11,
  "mask2former/coco_panoptic:r50": 133,
  "mask2former/coco_instances:r50": 80,
  "proscale/ade20k_semantic:swin_tiny,333": 150,
  "avesformer/s4:r50": 1,
  "avesformer/avss:r50": 71,
}


@pytest.mark.parametrize("name", sorted(compile_table.ROWS))
def test_every_experiment_has_a_batch_without_its_data(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  config = configs.load(name)
  data = config.data
  dataset = stand_in(data.name, config.task.name, data.options.to_dict())
  assert dataset.num_classes == COUNTS.get(name, dataset.num_classes)
  transforms = pipelines.train_transforms(config.task.name, **data.augment.to_dict())
  batches = TrainBatches(dataset, transforms, batch_size=2, seed=0)
  shapes = batches.element_shapes()
  assert shapes["weight"] == ((), np.float32)
  (pictures,) = [key for key in ("image", "frames") if key in shapes]
  assert shapes[pictures][1] == np.uint8
  crop = data.augment.get("crop", data.augment.get("size"))
  rows_cols = shapes[pictures][0][-3:-1]
  assert rows_cols == ((crop, crop) if isinstance(crop, int) else tuple(crop))


def test_mistakes_end_in_one_line():
  line = command.fail(
    "-m", "effseg_jax", "compile_for", "--config=configs/afformer/synthetic.py", "--topology=x"
  )
  assert "v5e:4x4" in line


def test_an_unknown_data_set_is_named():
  with pytest.raises(UserError, match="ade20k"):
    stand_in("ade20", "semantic", {})
