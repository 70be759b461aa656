"""`effseg_jax.load`: released names, bundles, runs and official files; and what importing costs."""

import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import effseg_jax
from effseg_jax.errors import UserError
from effseg_jax.prediction import make_segmenter
from effseg_jax.prediction.source import CHECKPOINTS, find, read_source
from effseg_jax.weights.bundle import Bundle
from effseg_jax.weights.loading import export_weights


def test_released_names(tmp_path, monkeypatch):
  names = effseg_jax.list_checkpoints()
  assert "afformer_tiny_camvid" in names and "avesformer_synthetic" in names
  for name in names:
    assert find(name) == CHECKPOINTS / f"{name}.safetensors"
  monkeypatch.chdir(tmp_path)
  (tmp_path / "afformer_tiny_camvid").mkdir()  # an output folder, say
  assert find("afformer_tiny_camvid").is_file()
  bundle = read_source("afformer_tiny_camvid")
  assert bundle.card["task"]["classes"][3] == "road"


def test_a_bundles_path(tmp_path):
  path = tmp_path / "mine.safetensors"
  path.write_bytes(find("avesformer_synthetic").read_bytes())
  segment = effseg_jax.load(path)
  assert segment.classes == ("sounding",)
  assert effseg_jax.load(str(path), scale="96x64")._size == (64, 96)


@pytest.mark.parametrize(
  "source, message",
  [
    ("afformer_tiny_camvit", "neither a path nor a released checkpoint.*Did you mean"),
    ("runs/none", "runs/none does not exist; expected a released name, a bundle"),
    ("x.safetensors", r"x\.safetensors does not exist"),
  ],
)
def test_what_is_not_there_ends_in_one_line(source, message):
  with pytest.raises(UserError, match=message):
    effseg_jax.load(source)


def test_a_folder_without_a_checkpoint(tmp_path):
  with pytest.raises(UserError, match="holds no checkpoint"):
    effseg_jax.load(tmp_path)


def test_an_official_file(tmp_path):
  model = effseg_jax.create_model("afformer_tiny", num_classes=19)
  image = np.zeros((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
  variables = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
  path = tmp_path / "AFFormer_tiny_cityscapes.safetensors"
  save_file(export_weights(model, variables), path)
  with pytest.raises(UserError, match="does not say which classes it knows; name their data set"):
    effseg_jax.load(path)
  bundle = read_source(path, dataset="cityscapes")
  assert bundle.card["model"] == {"name": "afformer_tiny", "fields": {"num_classes": 19}}
  assert bundle.card["task"]["classes"][0] == "road"
  found = flatten_dict(dict(bundle.variables), sep="/")
  for name, array in flatten_dict(dict(variables), sep="/").items():
    np.testing.assert_array_equal(found[name], array)
  with pytest.raises(UserError, match="does not fit the model"):
    read_source(path, dataset="cityscapes", model="afformer_base")
  with pytest.raises(UserError, match=r"no segmentation data set .* has this name"):
    read_source(path, dataset="citysapes")


def test_the_package_documents_itself():
  for name in effseg_jax.__all__:
    value = getattr(effseg_jax, name)
    assert value.__doc__
  assert set(effseg_jax.__all__) <= set(dir(effseg_jax))
  with pytest.raises(AttributeError, match="has no attribute 'lood'"):
    effseg_jax.lood  # noqa: B018
  page = effseg_jax.__doc__
  for word in ("effseg_jax.load(", "class_map", "segments", "segment.stream", "create_model"):
    assert word in page


def test_normalize():
  images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
  expected = (images - np.array(effseg_jax.IMAGENET_MEAN)) / np.array(effseg_jax.IMAGENET_STD)
  np.testing.assert_allclose(effseg_jax.normalize(images), expected, atol=1e-5)
  np.testing.assert_allclose(effseg_jax.normalize(images[0]), expected[:1], atol=1e-5)
  for wrong in (images / 255, images[..., :2], images[0, 0]):
    with pytest.raises(UserError, match="expected uint8 RGB"):
      effseg_jax.normalize(wrong)


def test_importing_loads_nothing_heavy():
  heavy = ("jax", "flax", "numpy", "cv2", "PIL", "optax", "orbax", "av", "grain", "tensorflow")
  code = (
    "import sys, time; begin = time.process_time(); import effseg_jax, effseg_jax.cli.predict;"
    " effseg_jax.list_models(); spent = time.process_time() - begin;"
    f" print(spent, *[m for m in {heavy!r} if m in sys.modules])"
  )
  best = min(_run(code) for _ in range(2))
  assert best < 0.5


def test_prediction_loads_neither_training_nor_extras():
  code = (
    "import sys, time, effseg_jax; from effseg_jax.prediction import files, source, semantic;"
    " source.read_source('afformer_tiny_camvid');"
    " parts = ('effseg_jax.training', 'effseg_jax.experiment', 'effseg_jax.evaluators',"
    " 'grain', 'av', 'soundfile', 'tensorflow_datasets', 'pycocotools', 'clu', 'tensorboardX');"
    " print(0, *[m for m in parts if m in sys.modules])"
  )
  _run(code)


def _run(code):
  """Runs code in a process of its own; it prints a number, and modules that it must not load."""
  begin = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
  )
  spent, *loaded = done.stdout.split()
  assert not loaded, loaded
  assert time.monotonic() > begin
  return float(spent)


def test_a_bundle_in_memory_needs_no_name():
  card = {"task": {"name": "semantic", "classes": ["a"], "palette": [[0, 0, 0]]}}
  assert make_segmenter(Bundle(None, {}, card)).classes == ("a",)
