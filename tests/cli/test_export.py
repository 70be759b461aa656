"""Exported files compute what the model computes, and are checkpoints themselves."""

from __future__ import annotations

import json
import zipfile

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import call

import effseg_jax
from effseg_jax import UserError
from effseg_jax.cli import export as command
from effseg_jax.export.forms import Form, make_exportable
from effseg_jax.export.writing import FORMATS, export_model
from effseg_jax.input_pipeline.datasets import synthetic
from effseg_jax.models.layers import Conv, ConvNorm
from effseg_jax.prediction import make_segmenter
from effseg_jax.weights.bundle import Bundle, save_bundle

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


TASK = {
  "name": "semantic",
  "classes": [f"class {i}" for i in range(6)],
  "palette": [[40 * i, 90, 200 - 30 * i] for i in range(6)],
  "ignore_label": 255,
  "mean": [123.675, 116.28, 103.53],
  "std": [58.395, 57.12, 57.375],
}
INFERENCE = {"scale": [SIZE[1], SIZE[0]], "multiple": 32}


class Colours(nn.Module):
  """A network of three layers: quick to trace and to compile."""

  @nn.compact
  def __call__(self, images, train=False):
    """(B, H, W, 3) -> (B, H / 8, W / 8, 6)."""
    x = ConvNorm(8, 3, 2)(images, train)
    x = nn.LayerNorm()(ConvNorm(16, 3, 2)(x, train))
    return Conv(6, 3, 2)(x)


@pytest.fixture(scope="module")
def colours():
  """A model of three layers with a card."""
  model = Colours()
  card = {"model": {"name": "colours", "fields": {}}, "task": TASK, "inference": INFERENCE}
  return Bundle(model, random_variables(model, (1, *SIZE, 3)), card)


@pytest.fixture(scope="module")
def semantic(tmp_path_factory):
  """A bundle of AFFormer with few channels."""
  fields = {"widths": (8, 16, 32, 32), "depths": (0, 1, 1, 1), "num_classes": 6}
  model = effseg_jax.create_model("afformer_tiny", **fields)
  card = {"model": {"name": "afformer_tiny", "fields": fields}, "task": TASK}
  card["inference"] = INFERENCE
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


def test_a_file_predicts_as_its_checkpoint(semantic, picture, tmp_path, capsys):
  """The command prints the difference, and the three lines of prediction take what it wrote."""
  output = tmp_path / "model.onnx"
  call("export", f"--checkpoint={semantic}", f"--output={output}", f"--picture={picture[0]}")
  line = capsys.readouterr().out
  assert "96x64, float32" in line
  assert "logits differ by" in line
  found = effseg_jax.load(output)(picture[1]).class_map
  expected = effseg_jax.load(semantic, exact_size=True)(picture[1]).class_map
  assert np.mean(found != expected) < 1e-3
  assert len(np.unique(expected)) > 1
  assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def export(bundle, path, picture, form=None, **options):
  """Exports a bundle, compared on a picture and its mirror image."""
  exportable = make_exportable(bundle, form or Form(SIZE))
  return export_model(exportable, path, command.sample_inputs(exportable, str(picture)), **options)


@pytest.mark.parametrize("name", ["openvino", "stablehlo"])
def test_other_formats_predict_as_their_checkpoint(name, colours, picture, tmp_path):
  """OpenVINO's and JAX's own files are checkpoints as well."""
  pytest.importorskip({"openvino": "openvino", "stablehlo": "flatbuffers"}[name])
  path = tmp_path / f"model{FORMATS[name]}"
  report = export(colours, path, picture[0], format=name)
  assert report.changed < 1e-3
  found = effseg_jax.load(path)(picture[1]).class_map
  expected = make_segmenter(colours, exact_size=True)(picture[1]).class_map
  assert np.mean(found != expected) < 1e-3
  assert len(np.unique(expected)) > 1


def test_an_onnx_file_says_what_it_is(colours, picture, tmp_path):
  """Channels first and normalised, or class maps; metadata; any batch."""
  maps, logits = tmp_path / "maps.onnx", tmp_path / "logits.onnx"
  export(colours, maps, picture[0], Form(SIZE, outputs="class_map"))
  export(colours, logits, picture[0], Form(SIZE, input="normalised"))
  session = onnxruntime.InferenceSession(str(maps))
  about = session.get_modelmeta().custom_metadata_map
  assert json.loads(about["classes"])[2] == "class 2"
  assert json.loads(about["size"]) == list(SIZE)
  images = np.stack([cv2.resize(picture[1], SIZE[::-1])] * 3)
  (classes,) = session.run(None, {"images": images})
  assert (classes.shape, classes.dtype) == ((3, *SIZE), np.uint8)

  mean, std = (np.array(json.loads(about[key]), np.float32) for key in ("mean", "std"))
  normalised = ((images[:1] - mean) / std).transpose(0, 3, 1, 2)
  session = onnxruntime.InferenceSession(str(logits))
  (scores,) = session.run(None, {"images": normalised})
  assert scores.shape == (1, 6, 8, 12)
  own = colours.model.apply(colours.variables, normalised.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(scores.transpose(0, 2, 3, 1), own, atol=1e-4)
  from_maps, from_logits = (effseg_jax.load(path)(picture[1]).class_map for path in (maps, logits))
  assert np.mean(from_maps != from_logits) < 0.02


def test_a_worse_file_is_not_written(colours, picture, tmp_path):
  """Above the tolerance there is one line, and what was there stays."""
  output = tmp_path / "model.onnx"
  output.write_bytes(b"earlier")
  with pytest.raises(UserError, match="was not written: its logits differ"):
    export(colours, output, picture[0], tolerance=1e-12)
  assert output.read_bytes() == b"earlier"
  assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_eight_and_sixteen_bits(colours, picture, tmp_path):
  """Smaller files differ, and by little."""
  onnx = pytest.importorskip("onnx")
  exportable = make_exportable(colours, Form(SIZE))
  sizes = {}
  for precision in ("float32", "float16", "int8"):
    path = tmp_path / f"{precision}.onnx"
    report = export(
      colours,
      path,
      picture[0],
      precision=precision,
      calibration=[command.as_inputs(exportable, picture[1])],
      tolerance=0.2,
    )
    model = onnx.load(str(path))
    kinds = {x.data_type for x in model.graph.initializer if x.dims[2:] == [3, 3]}
    sizes[precision] = kinds, report.differences["logits"][0]
  assert sizes["float16"][0] == {onnx.TensorProto.FLOAT16}
  assert sizes["int8"][0] == {onnx.TensorProto.INT8}
  assert sizes["float32"][1] < sizes["float16"][1] < sizes["int8"][1]


def test_masks_of_a_universal_model(tmp_path):
  """Masks, labels and scores are those of the logits; a set of masks cannot be loaded."""

  class Queries(nn.Module):
    """Five queries whose masks are colours."""

    @nn.compact
    def __call__(self, images, train=False):
      x = Conv(5, 3, 2)(Conv(8, 3, 2)(images))
      classes = nn.Dense(4)(jnp.swapaxes(x.mean(1), 1, 2))
      return {"class_logits": classes, "mask_logits": jnp.moveaxis(x, -1, 1)}

  model, classes = Queries(), ["a", "b", "c"]
  task = {**TASK, "name": "universal", "classes": classes, "is_thing": [True] * 3}
  card = {"model": {"name": "queries", "fields": {}}, "task": task}
  bundle = Bundle(model, random_variables(model, (1, 64, 64, 3)), card)
  exportable = make_exportable(bundle, Form((64, 64), outputs="masks"))
  image = synthetic.open_split(None, "val", size=(64, 64))[0]["image"]
  path = tmp_path / "masks.onnx"
  report = export_model(exportable, path, [np.stack([image, image[::-1]])])
  assert report.changed < 1e-3
  session = onnxruntime.InferenceSession(str(path))
  masks, labels, scores = session.run(None, {"images": image[None]})
  assert (masks.shape, masks.dtype) == ((1, 5, 64, 64), np.uint8)
  assert 0 < masks.mean() < 1
  assert labels.shape == scores.shape == (1, 5)
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
