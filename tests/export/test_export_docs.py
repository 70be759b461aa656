"""The examples of docs/export.md run as they stand there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

import effseg_jax
from effseg_jax.export.forms import Form, make_exportable
from effseg_jax.export.onnx_file import write
from effseg_jax.export.writing import to_onnx
from effseg_jax.input_pipeline.datasets import synthetic
from effseg_jax.weights.bundle import Bundle

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

DOCS = Path(__file__).resolve().parents[2] / "docs" / "export.md"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """An exported model that tells bright from dark colours, a picture, and its class map."""
  folder = tmp_path_factory.mktemp("example")
  fields = {"widths": (8, 16, 32, 32), "depths": (0, 1, 1, 1), "num_classes": 4}
  model = effseg_jax.create_model("afformer_tiny", **fields)
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, *SIZE, 3), np.float32), train=False)
  )
  variables = jax.tree.map(
    lambda x: (0.2 * np.abs(rng.standard_normal(x.shape)) + 0.01).astype(np.float32), shapes
  )
  task = {"name": "semantic", "classes": ["a", "b", "c", "d"], "palette": [[0, 0, 0]] * 4}
  task |= {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
  bundle = Bundle(
    model, variables, {"model": {"name": "afformer_tiny", "fields": fields}, "task": task}
  )
  exportable = make_exportable(bundle, Form(SIZE, outputs="class_map"))
  write(to_onnx(exportable), folder / "model.onnx")
  image = synthetic.open_split(None, "val", size=SIZE)[0]["image"]
  cv2.imwrite(str(folder / "scene.png"), image[..., ::-1])
  session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
  (class_map,) = session.run(None, {"images": image[None]})
  return folder, np.bincount(class_map.ravel(), minlength=4)


def example(language: str) -> str:
  """The one block of code in this language."""
  (code,) = re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
  return code


def test_the_python_example(files):
  """It prints the shares of the classes."""
  folder, counts = files
  script = folder / "example.py"
  script.write_text(example("python"), encoding="utf-8")
  words = [sys.executable, str(script), str(folder / "model.onnx"), str(folder / "scene.png")]
  done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
  shares = json.loads(done.stdout.replace("'", '"'))
  expected = counts / counts.sum()
  assert shares == {
    name: pytest.approx(share, abs=1e-3)
    for name, share in zip("abcd", expected, strict=True)
    if share
  }


def test_the_javascript_example(files):
  """It prints how many pixels have each class; needs Node.js with two packages."""
  folder, counts = files
  node = shutil.which("node")
  if node is None:
    pytest.skip("needs Node.js")
  script = folder / "example.js"
  script.write_text(example("javascript"), encoding="utf-8")
  probe = [node, "-e", "require('onnxruntime-node'); require('sharp')"]
  if subprocess.run(probe, capture_output=True, check=False).returncode:
    pytest.skip("needs onnxruntime-node and sharp where Node.js finds them (NODE_PATH)")
  words = [node, str(script), str(folder / "model.onnx"), str(folder / "scene.png")]
  words += [str(SIZE[1]), str(SIZE[0])]
  done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
  found = {int(label): count for label, count in json.loads(done.stdout).items()}
  assert found == {label: count for label, count in enumerate(counts) if count}
