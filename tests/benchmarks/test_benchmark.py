"""The benchmark's arithmetic, its flags, its turns, and small tables; times are never tested."""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest

from benchmarks import __main__ as benchmark
from benchmarks import contenders as benchmark_contenders
from benchmarks import data as benchmark_data
from benchmarks import race as benchmark_race
from benchmarks import report
from effseg_jax import UserError, configs
from effseg_jax.input_pipeline import datasets

# Writes down its turns and answers with made-up times: the protocol without any model.
WORKER = """
import json, sys
name, path, seconds = sys.argv[1:]
print(json.dumps({"ready": {"device": "cpu: cpu"}}), flush=True)
for line in sys.stdin:
  with open(path, "a") as log:
    log.write(f"{name} {line}")
  reply = {"seconds": [float(seconds)] * 3, "peak_bytes": 10, "device_bytes": None}
  print(json.dumps(reply), flush=True)
"""


def test_a_ratio_above_one_is_faster():
  assert report.ratio([2.0, 4.0, 3.0], [1.0, 1.5, 2.0]) == pytest.approx(2.0)
  low, high = report.ratio_range([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
  assert low == high == pytest.approx(2.0)
  assert report.ratio_range([3.0], [2.0]) == (1.5, 1.5)


@pytest.mark.parametrize(
  ("arguments", "hint"),
  [
    (["--model=afformer_tiney"], "afformer_tiny"),
    (["--against=afformer_base:float16"], "bfloat16"),
    (["--rounds=0"], "1 or more"),
    (["--rounds=many"], "many"),
    (["--size=512"], "512"),
    (["--size=16x512"], "at least 32"),
    (["--peers=pytorch"], "torch"),
    (["--peers=", "--reference=torch"], "afformer_tiny"),
    (["--model=proscale_r50", "--peers=torch"], "mask2former"),
    (["--model=proscale_r50", "--train"], "afformer_"),
    (["--model=vggish"], "proscale_"),
    (["--model=avesformer_lite", "--train"], "afformer_"),
    (["--device=tpu4"], "auto"),
    (["--filters", "--kernels=3,4"], "4 is even"),
    (["--filters", "--grids="], "positive numbers"),
    (["--filters", "--train"], "not allowed"),
    (["--data", "--config=configs/none.py"], "does not exist"),
    (["--data", "--config=configs/afformer/synthetic.py"], "nothing to decode"),
  ],
)
def test_a_mistake_ends_in_one_line(arguments, hint, capsys):
  with pytest.raises(SystemExit) as stopped:
    benchmark.main(arguments)
  assert stopped.value.code == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert hint in line


def test_contenders_take_turns(tmp_path):
  log = tmp_path / "turns"
  commands = {
    name: [sys.executable, "-c", WORKER, name, str(log), seconds]
    for name, seconds in (("a", "0.5"), ("b", "0.25"))
  }
  results, left_out = benchmark_race.race(commands, rounds=3, calls=4, say=lambda line: None)
  assert log.read_text().splitlines() == ["a go 4", "b go 4"] * 3
  assert not left_out
  assert results["a"].seconds == [0.5] * 3
  assert report.ratio(results["a"].seconds, results["b"].seconds) == 2.0


def test_contenders_that_fail_are_left_out_with_a_reason(tmp_path):
  refuses = 'print(\'{"error": "ImportError: no such thing"}\')'
  dies = "raise SystemExit('out of luck')"
  aborts = "import sys; print('F1127 Check failed: 1\\n@ 0x6b main', file=sys.stderr); sys.exit(9)"
  dies_later = f"print({json.dumps(json.dumps({'ready': {}}))}, flush=True); input(); 1 / 0"
  commands = {
    "refuses": [sys.executable, "-c", refuses],
    "dies": [sys.executable, "-c", dies],
    "aborts": [sys.executable, "-c", aborts],
    "dies_later": [sys.executable, "-c", dies_later],
    "runs": [sys.executable, "-c", WORKER, "runs", str(tmp_path / "turns"), "1"],
  }
  results, left_out = benchmark_race.race(commands, rounds=2, calls=1, say=lambda line: None)
  assert list(results) == ["runs"]
  assert left_out["refuses"] == "ImportError: no such thing"
  assert left_out["dies"] == "exit status 1: out of luck"
  assert left_out["aborts"] == "exit status 9: F1127 Check failed: 1"
  assert "ZeroDivisionError" in left_out["dies_later"]


def test_missing_packages_leave_peers_out(monkeypatch):
  found = lambda package: None if package == "transformers" else object()  # noqa: E731
  monkeypatch.setattr(benchmark.importlib.util, "find_spec", found)
  chosen, missing = benchmark.specs(benchmark._parser().parse_args(["--train"]))
  assert list(chosen) == ["afformer_tiny", "torch", "torch_channels_last"]
  assert missing == ["left out: SegFormer-B0 (transformers): transformers not installed"]
  assert (chosen["torch"]["rows"], chosen["torch"]["batch"]) == (256, 4)


def test_the_flags_and_the_worker_know_the_same_peers():
  assert tuple(benchmark.PEERS) == benchmark_contenders.PEERS
  chosen, _ = benchmark.specs(benchmark._parser().parse_args([]))
  for spec in chosen.values():  # each is a worker's specification
    benchmark_contenders.Spec(**spec)


def test_inputs_are_the_same_for_everybody():
  spec = benchmark_contenders.Spec("ours", "afformer_tiny", 40, 70, 2, 150)
  images, labels = benchmark_contenders.example(spec)
  assert images.shape == (2, 40, 70, 3)
  assert labels.shape == (2, 40, 70)
  assert set(np.unique(labels)) <= {*range(150), 255}
  np.testing.assert_array_equal(images, benchmark_contenders.example(spec)[0])


@pytest.mark.parametrize("model", ["afformer_tiny", "avesformer_lite"])
def test_our_forward_pass_runs_in_a_worker(model):
  spec = {"contender": "ours", "model": model, "rows": 32, "cols": 32, "batch": 1}
  results, left_out = benchmark_race.race(
    {
      "ours": [
        sys.executable,
        "-m",
        "benchmarks.contenders",
        json.dumps({**spec, "num_classes": 3, "device": "cpu"}),
      ]
    },
    rounds=1,
    calls=1,
    say=lambda line: None,
  )
  assert not left_out
  result = results["ours"]
  assert result.facts["compile_seconds"] > 0
  assert result.facts["temp_bytes"] > 0
  assert result.facts["device"] == "cpu: cpu"
  assert result.seconds[0] > 0
  assert result.peak_bytes > 0


def test_filters_are_tabled(capsys, tmp_path):
  path = tmp_path / "numbers.json"
  flags = ["--kernels=3", "--grids=8", "--channels=4", "--rounds=1", "--device=cpu"]
  benchmark.main(["--filters", *flags, f"--json={path}"])
  said = capsys.readouterr().out
  for purpose in ("forward", "input_gradient", "kernel_gradient", "gradients"):
    assert purpose in said
  numbers = json.loads(path.read_text())
  assert numbers["mode"] == "filters"
  assert numbers["machine"]["cores"] >= 1
  assert "jax" in numbers["versions"]
  assert [row["kernel"] for row in numbers["results"]] == [3] * 4


def test_the_pipeline_is_timed_beside_decoding(tmp_path):
  rng = np.random.default_rng(0)
  lines = []
  for index in range(4):
    image, label = (tmp_path / f"{index}.{suffix}" for suffix in ("jpg", "png"))
    cv2.imwrite(str(image), rng.integers(0, 256, (36, 48, 3), np.uint8))
    cv2.imwrite(str(label), rng.integers(0, 11, (36, 48), np.uint8))
    lines.append(f"{image.name} {label.name}")
  (tmp_path / "train.txt").write_text("\n".join(lines))
  config = configs.load("afformer/camvid:tiny")
  config.data.root = str(tmp_path)
  results = benchmark_data.measure(config, [1, 2], images=8, rounds=1)
  assert [row["threads"] for row in results["rows"]] == [1, 2]
  for row in results["rows"]:
    assert 0 < row["decoding_cpu"][0] < row["pipeline_cpu"][0]
  assert "decoding CPU ms" in benchmark_data.data_table(results)


def test_data_sets_without_files_have_nothing_to_decode():
  with pytest.raises(UserError, match="nothing to decode"):
    benchmark_data.encoded_pictures(datasets.open_dataset("synthetic", split="val"), 2)
