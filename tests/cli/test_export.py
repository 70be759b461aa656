"""Exported files compute what the model computes, and are checkpoints themselves."""

from __future__ import annotations

import json
import zipfile

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import call

import effseg_jax
from effseg_jax import UserError
from effseg_jax.cli import export as command
from effseg_jax.export.forms import Form, make_exportable
from effseg_jax.export.writing import export_model
from effseg_jax.input_pipeline.datasets import synthetic
from effseg_jax.weights.bundle import Bundle, save_bundle
from tests.universal_models import small_model

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZE = (64, 96)


def random_variables(model, *inputs):
  """Variables of a plausible magnitude, without running the model."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    name = path[-1].key
    if name in ("var", "scale"):
      return np.ones(x.shape, np.float32)
    fan_in = np.prod(x.shape[:-1]) if x.ndim > 1 else 100
    return (rng.standard_normal(x.shape) / np.sqrt(fan_in)).astype(np.float32)

  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), *map(jnp.zeros, inputs), train=False)
  )
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def semantic(tmp_path_factory):
  """A bundle of AFFormer with few channels."""
  fields = {"widths": (8, 16, 32, 32), "depths": (0, 1, 1, 1), "num_classes": 6}
  model = effseg_jax.create_model("afformer_tiny", **fields)
  task = {"name": "semantic", "classes": [f"class {i}" for i in range(6)]}
  task |= {"palette": [[40 * i, 90, 200 - 30 * i] for i in range(6)], "ignore_label": 255}
  task |= {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
  card = {"model": {"name": "afformer_tiny", "fields": fields}, "task": task}
  card["inference"] = {"scale": [SIZE[1], SIZE[0]], "multiple": 32}
  path = tmp_path_factory.mktemp("bundle") / "model.safetensors"
  save_bundle(path, random_variables(model, (1, *SIZE, 3)), card)
  return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
  """A drawn scene of twice the network's size, as a file and as an array."""
  image = synthetic.open_split(None, "val", size=(2 * SIZE[0], 2 * SIZE[1]))[3]["image"]
  path = tmp_path_factory.mktemp("pictures") / "scene.png"
  cv2.imwrite(str(path), image[..., ::-1])
  return path, image


@pytest.fixture(scope="module")
def expected(semantic, picture):
  """The class map of the bundle itself."""
  return effseg_jax.load(semantic, exact_size=True)(picture[1]).class_map


@pytest.mark.parametrize("suffix", ["onnx", "xml", "stablehlo"])
def test_a_file_predicts_as_its_checkpoint(suffix, semantic, picture, expected, tmp_path, capsys):
  """The three lines of prediction work with every format; the difference is printed."""
  if suffix == "xml":
    pytest.importorskip("openvino")
  if suffix == "stablehlo":
    pytest.importorskip("flatbuffers")
  output = tmp_path / f"model.{suffix}"
  call("export", f"--checkpoint={semantic}", f"--output={output}", f"--picture={picture[0]}")
  line = capsys.readouterr().out
  assert "96x64, float32" in line
  assert "logits differ by" in line
  found = effseg_jax.load(output)(picture[1]).class_map
  assert np.mean(found != expected) < 1e-3
  assert len(np.unique(expected)) > 1
  assert not list(tmp_path.glob(".export_*"))


def test_an_onnx_file_says_what_it_is(semantic, picture, tmp_path):
  """Channels first and normalised, or class maps; metadata; any batch."""
  maps, logits = tmp_path / "maps.onnx", tmp_path / "logits.onnx"
  common = (f"--checkpoint={semantic}", f"--picture={picture[0]}")
  call("export", *common, f"--output={maps}", "--outputs=class_map")
  call("export", *common, f"--output={logits}", "--input=normalised")
  session = onnxruntime.InferenceSession(str(maps))
  about = session.get_modelmeta().custom_metadata_map
  assert json.loads(about["classes"])[2] == "class 2"
  assert json.loads(about["size"]) == list(SIZE)
  assert json.loads(about["mean"])[0] == pytest.approx(123.675)
  images = np.stack([cv2.resize(picture[1], SIZE[::-1])] * 3)
  (classes,) = session.run(None, {"images": images})
  assert (classes.shape, classes.dtype) == ((3, *SIZE), np.uint8)

  mean, std = (np.array(json.loads(about[key]), np.float32) for key in ("mean", "std"))
  normalised = ((images[:1] - mean) / std).transpose(0, 3, 1, 2)
  session = onnxruntime.InferenceSession(str(logits))
  (scores,) = session.run(None, {"images": normalised})
  assert scores.shape == (1, 6, 8, 12)
  coarse = scores[0].argmax(0)
  assert np.mean(classes[0, 4::8, 4::8] == coarse) > 0.8


def test_a_worse_file_is_not_written(semantic, tmp_path):
  """Above the tolerance there is one line, and what was there stays."""
  output = tmp_path / "model.onnx"
  output.write_bytes(b"earlier")
  with pytest.raises(UserError, match="was not written: its logits differ"):
    command_line(semantic, output, "--tolerance=1e-12")
  assert output.read_bytes() == b"earlier"
  assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def command_line(checkpoint, output, *flags):
  """Runs the command without the handling of errors."""
  from effseg_jax import cli

  values, arguments = cli.parse(
    command, [f"--checkpoint={checkpoint}", f"--output={output}", *flags]
  )
  return command.run(values, arguments)


def test_eight_and_sixteen_bits(semantic, picture, tmp_path, capsys):
  """Smaller files say how many pixels change."""
  folder = picture[0].parent
  for precision in ("float16", "int8"):
    output = tmp_path / f"{precision}.onnx"
    command_line(
      semantic, output, f"--precision={precision}", f"--calibration={folder}", "--tolerance=0.5"
    )
    assert precision in capsys.readouterr().out
  model = __import__("onnx").load(str(tmp_path / "int8.onnx"))
  assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def test_masks_of_a_universal_model(tmp_path):
  """Masks, labels and scores are those of the logits; a set of masks cannot be loaded."""
  model = small_model("proscale_r50", num_classes=5)
  classes = [f"class {i}" for i in range(model.num_classes)]
  task = {"name": "universal", "classes": classes, "is_thing": [True] * len(classes)}
  task |= {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
  card = {"model": {"name": "small", "fields": {}}, "task": task}
  bundle = Bundle(model, random_variables(model, (1, 64, 64, 3)), card)
  exportable = make_exportable(bundle, Form((64, 64), outputs="masks"))
  image = synthetic.open_split(None, "val", size=(64, 64))[0]["image"]
  path = tmp_path / "masks.onnx"
  report = export_model(exportable, path, [np.stack([image, image[::-1]])])
  assert report.changed < 1e-3
  session = onnxruntime.InferenceSession(str(path))
  masks, labels, scores = session.run(None, {"images": image[None]})
  assert masks.shape[2:] == (64, 64)
  assert masks.dtype == np.uint8
  assert labels.shape == scores.shape == masks.shape[:2]
  assert labels.max() < len(classes)
  with pytest.raises(UserError, match="--outputs=logits"):
    effseg_jax.load(path)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--output=model.pt"], r"ends in \.onnx, \.xml, \.stablehlo"),
    (["--output=model.onnx", "--size=64"], "expected WIDTHxHEIGHT"),
    (["--output=model.onnx", "--outputs=masks"], "expected one of logits, class_map"),
    (["--output=model.onnx", "--input=float"], "expected one of uint8, normalised"),
    (["--output=model.onnx", "--precision=int8"], "needs pictures: --calibration"),
    (["--output=model.xml", "--format=onnx"], r"ends in \.onnx"),
    (["--output=model.stablehlo", "--precision=float16"], "stablehlo is float32"),
  ],
)
def test_a_mistake_is_one_line(semantic, flags, message, tmp_path, monkeypatch):
  """Nothing is traced before the flags are checked."""
  monkeypatch.chdir(tmp_path)
  from effseg_jax import cli

  values, arguments = cli.parse(command, [f"--checkpoint={semantic}", *flags])
  with pytest.raises(UserError, match=message):
    command.run(values, arguments)


def test_foreign_and_damaged_files_are_refused(semantic, tmp_path):
  """A file without a card, or none at all, is one line."""
  for name, content in (("a.onnx", b"no model"), ("b.stablehlo", b"no archive")):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
      effseg_jax.load(tmp_path / name)
  with zipfile.ZipFile(tmp_path / "c.stablehlo", "w") as archive:
    archive.writestr("card.json", "{}")
    archive.writestr("program.bin", b"")
  with pytest.raises(UserError, match="holds no card"):
    effseg_jax.load(tmp_path / "c.stablehlo")
