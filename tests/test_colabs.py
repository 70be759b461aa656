"""The notebooks' cells run one after the other, on smaller experiments."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import small_config

from effseg_jax import configs

# Four trainings take minutes: `EFFSEG_NOTEBOOKS=1 pytest tests/test_colabs.py` runs them.
pytestmark = pytest.mark.skipif(
  not os.environ.get("EFFSEG_NOTEBOOKS"), reason="EFFSEG_NOTEBOOKS=1 runs the notebooks"
)

COLABS = Path(__file__).resolve().parents[1] / "colabs"
NOTEBOOKS = sorted(path.stem for path in COLABS.glob("*.ipynb"))


def cells(name: str) -> list[str]:
  """The code of a notebook's cells."""
  notebook = json.loads((COLABS / f"{name}.ipynb").read_text())
  return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(name: str, tmp_path: Path, monkeypatch, **numbers: int) -> dict:
  """Runs a notebook in a folder; `numbers` replace assignments of its cells.

  Returns:
    The variables after the last cell.
  """
  matplotlib = pytest.importorskip("matplotlib")
  matplotlib.use("Agg")
  monkeypatch.chdir(tmp_path)
  if importlib.util.find_spec("IPython") is None:
    shown = types.ModuleType("IPython.display")
    shown.display = lambda *pictures: None
    shown.Video = lambda *arguments, **options: None
    package = types.ModuleType("IPython")
    package.display = shown
    # What matplotlib reads to find out whether it runs in a notebook.
    package.get_ipython, package.version_info = (lambda: None), (9, 0)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
  code = "\n".join(cells(name))
  for field, number in numbers.items():
    field = field.replace("__", ".")
    code, count = re.subn(rf"^{re.escape(field)} = \d+$", f"{field} = {number}", code, flags=re.M)
    assert count == 1, field
  variables = {"__name__": "__main__"}
  exec(compile(code, f"{name}.ipynb", "exec"), variables)
  return variables


def shrink(monkeypatch, change) -> None:
  """Has experiments loaded with a change, which makes them small."""
  load = configs.load
  monkeypatch.setattr(configs, "load", lambda name: change(load(name)))


def test_quickstart(tmp_path, monkeypatch):
  monkeypatch.setattr(configs, "load", lambda name: small_config.get_config())
  steps = {"config__train__num_steps": 80, "config__eval__every": 80}
  found = run("quickstart", tmp_path, monkeypatch, **steps)
  assert found["pictures"]["samples"].exists()
  assert found["results"][0].class_map.shape == found["picture"].shape[:2]


def test_fine_tuning(tmp_path, monkeypatch):
  def small(config):
    config.data.num_threads = 2
    config.train.batch_size = 4
    return config

  shrink(monkeypatch, small)
  steps = {"config__train__num_steps": 2, "config__eval__every": 2, "config__log__every": 1}
  numbers = {"number_of_pictures": 4, "config__schedule__warmup_steps": 1}
  found = run("fine_tune", tmp_path, monkeypatch, **steps, **numbers)
  assert [path.exists() for path in found["paths"]] == [True, True]


def test_universal_segmentation(tmp_path, monkeypatch):
  def small(config):
    config.model.update({"features": 32, "heads": 2, "num_queries": 8, "decoder_layers": 1})
    config.model.update({"encoder_mlp_features": 16, "decoder_mlp_features": 16})
    config.data.options.size = config.data.augment.crop = (64, 64)
    config.eval.short_side = config.eval.max_size = 64
    config.train.batch_size = 4
    config.task.num_points = 64
    return config

  shrink(monkeypatch, small)
  steps = {"config__train__num_steps": 2, "config__eval__every": 2}
  found = run("universal", tmp_path, monkeypatch, **steps)
  assert found["results"][0].panoptic_map.shape == found["picture"].shape[:2]
  assert found["panoptic"]["segmentation"].shape == found["picture"].shape[:2]


def test_audio_visual_segmentation(tmp_path, monkeypatch):
  def small(config):
    config.train.batch_size = 4
    config.model.update({"widths": (32, 32, 32, 32), "width": 32, "hidden": 32})
    return config

  shrink(monkeypatch, small)
  steps = {"config__train__num_steps": 2, "config__eval__every": 2, "clip_seconds": 1}
  found = run("audio_visual", tmp_path, monkeypatch, **steps)
  assert found["paths"][0].exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize(("device", "extra"), [("cpu", None), ("gpu", "cuda"), ("tpu", "tpu")])
def test_the_first_cell_installs_the_package_for_the_device(name, device, extra, monkeypatch):
  calls = []
  monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
  monkeypatch.setattr(
    shutil, "which", lambda tool: "/usr/bin/nvidia-smi" if device == "gpu" else None
  )
  monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/accel0"] if device == "tpu" else [])
  monkeypatch.setattr(subprocess, "run", lambda words, check: calls.append(words))
  exec(cells(name)[0], {})
  ((*_, package),) = calls
  extras = re.match(r"effseg_jax\[([\w,]+)\] @ git\+https://", package)[1].split(",")
  assert extras[0] == "train"
  assert {"cuda", "tpu"} & set(extras) == ({extra} - {None})
