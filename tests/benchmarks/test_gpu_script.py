"""The script for a GPU: every part is recorded, however it ends, and one file holds all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import collect
from effseg_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# Stands for the interpreter: a race writes two contenders, one part fails, one does not end.
STUB = """#!{python}
import json, os, pathlib, sys, time
words = sys.argv[1:]
if words[1] == "benchmarks.collect":
  os.execv("{python}", ["{python}", *words])
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
if words[1] == "benchmarks":
  if flags["model"] == "proscale_swin_tiny":
    sys.exit("error: out of memory")
  if "batch" in flags and flags["model"] == "avesformer_lite":
    time.sleep(60)
  entry = {{"spec": {{"batch": int(flags.get("batch", 1))}}, "compile_seconds": 3.2}}
  entry |= {{"ratio_quartiles": [1.9, 2.1], "device_bytes": 5e6}}
  both = [
    entry | {{"title": "ours", "seconds": [0.010, 0.012], "ratio": 2.0}},
    entry | {{"title": "theirs", "seconds": [0.022], "ratio": 1.0, "compile_seconds": None}},
  ]
  document = {{"mode": "inference", "flags": words[2:], "results": both}}
  pathlib.Path(flags["json"]).write_text(json.dumps(document))
else:
  workdir = pathlib.Path(flags["workdir"])
  workdir.mkdir()
  lines = ['{{"step": 10, "eval/mIoU": 0.25}}', '{{"step": 20, "train/loss": 1}}', '{{"step": 3']
  (workdir / "metrics.jsonl").write_text("\\n".join(lines))
"""


def _run(tmp_path, *arguments, **settings):
  stub = tmp_path / "python"
  stub.write_text(STUB.format(python=sys.executable))
  stub.chmod(0o755)
  out = tmp_path / "out"
  result = subprocess.run(
    [ROOT / "benchmarks/gpu.sh", out, *arguments],
    env={**os.environ, "PYTHON": str(stub), **settings},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return json.loads((out / "gpu.json").read_text())["parts"], result.stdout


def test_parts_that_fail_or_hang_end_nothing_else(tmp_path):
  parts, text = _run(tmp_path, "data", LIMIT="3")
  assert parts["afformer_base_32_bf16"]["outcome"] == "finished"
  assert parts["proscale"]["outcome"] == "failed"
  assert parts["proscale"]["reason"] == "error: out of memory"
  assert parts["avesformer_40"]["outcome"] == "timed out"
  assert parts["camvid"]["outcome"] == "finished"
  assert parts["camvid"]["metrics"] == {"step": 20, "eval/mIoU": 0.25, "train/loss": 1}
  assert "| ours | 11.00 | 2909 | 2.00 | 1.90-2.10 | 3 | 5 |" in text  # 32 images in 11 ms


def test_without_time_all_parts_are_skipped(tmp_path):
  parts, _ = _run(tmp_path, BUDGET="0")
  assert {part["outcome"] for part in parts.values()} == {"skipped"}
  assert "camvid" not in parts  # there is no data


def test_a_training_is_recorded_by_its_log(tmp_path):
  out = tmp_path / "out"
  (out / "parts").mkdir(parents=True)
  (out / "parts/idd.status").write_text("124 300\n")
  (out / "parts/idd.log").write_text("step 20\n\n")
  (out / "idd").mkdir()
  (out / "idd/metrics.jsonl").write_text('{"step": 10, "eval/mIoU": 0.25}\n{"step": 20}\n{"st')
  document = collect.collect(out)
  assert document["parts"]["idd"]["metrics"] == {"step": 20, "eval/mIoU": 0.25}
  assert "step 20: eval/mIoU 0.25" in collect.tables(document)


def test_a_folder_without_parts_is_named(tmp_path):
  with pytest.raises(UserError, match=r"has no results; expected the output of benchmarks/gpu\.sh"):
    collect.collect(tmp_path)
