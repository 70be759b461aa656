"""The command lines from training to pictures, and what they say to a mistake."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import small_config
from command import command, fail, succeed
from PIL import Image

from effseg_jax import create_model
from effseg_jax.input_pipeline.datasets import synthetic
from effseg_jax.weights.bundle import read_bundle, save_bundle

CONFIG = "--config=tests/small_config.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run on the synthetic scenes."""
  workdir = tmp_path_factory.mktemp("runs") / "scenes"
  said = succeed("train.py", CONFIG, f"--workdir={workdir}")
  assert "step 80/80" in said
  assert "pixel acc" in said
  return workdir


@pytest.fixture(scope="module")
def evaluated(run):
  """The run's evaluation folder."""
  said = succeed("eval.py", CONFIG, f"--workdir={run}")
  assert "96 images" in said
  return run / "eval_val"


@pytest.fixture(scope="module")
def bundle(run, evaluated):
  """The run's bundle."""
  path = run / "bundle" / "scenes.safetensors"
  metrics = evaluated / "metrics.json"
  said = succeed(
    "-m",
    "effseg_jax",
    "export_bundle",
    f"--workdir={run}",
    f"--output={path}",
    "--half",
    "--note=of the tests",
    "--licence=CC0",
    f"--metrics={metrics}",
  )
  assert "float16" in said
  assert "MB" in said
  return path


def test_evaluation_writes_what_training_measured(run, evaluated):
  metrics = json.loads((evaluated / "metrics.json").read_text())
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  best = max(line["eval/mIoU"] for line in lines if "eval/mIoU" in line)
  assert metrics["mIoU"] == pytest.approx(best, abs=1e-6)
  assert metrics["mIoU"] > 0.1
  assert metrics["split"] == "val"
  assert metrics["num_images"] == 96
  assert set(metrics["classes"]) == set(synthetic.CLASSES)
  assert metrics["inference"]["mode"] == "whole"
  for name in ("confusion.png", "samples.png"):
    with Image.open(evaluated / name) as picture:
      assert picture.mode == "RGB"


def test_a_finished_run_has_nothing_left_to_do(run):
  said = succeed("train.py", CONFIG, f"--workdir={run}")
  assert "resuming from step 80" in said
  assert f"nothing left to do: {run} has already reached step 80" in said


def test_the_bundle_carries_what_is_known(bundle, evaluated):
  arrays, card = read_bundle(bundle)
  assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
  assert card["model"]["name"] == "afformer_tiny"
  assert card["task"]["classes"] == list(synthetic.CLASSES)
  assert card["inference"]["scale"] == [0, 0]
  assert card["inference"]["multiple"] == 1
  assert card["metrics"]["mIoU"] == json.loads((evaluated / "metrics.json").read_text())["mIoU"]
  assert (card["note"], card["licence"]) == ("of the tests", "CC0")


def test_other_ways_of_evaluating_the_bundle(bundle, evaluated, tmp_path):
  half = small_config.SIZE // 2
  succeed(
    "eval.py",
    CONFIG,
    f"--checkpoint={bundle}",
    f"--output={tmp_path}",
    "--config.eval.mode=slide",
    f"--config.eval.crop=({small_config.SIZE},{half})",
    f"--config.eval.stride=({half},{half})",
  )
  plain = json.loads((evaluated / "metrics.json").read_text())
  metrics = json.loads((tmp_path / "metrics.json").read_text())
  assert metrics["inference"]["mode"] == "slide"
  assert metrics["mIoU"] != plain["mIoU"]
  assert metrics["mIoU"] == pytest.approx(plain["mIoU"], abs=0.15)


def test_pictures_are_segmented_and_broken_ones_skipped(bundle, tmp_path):
  pictures, output = tmp_path / "in", tmp_path / "out"
  pictures.mkdir()
  dataset = synthetic.open_split(None, "val", size=(small_config.SIZE, small_config.SIZE))
  images = [dataset[index] for index in range(2)]
  for index, example in enumerate(images):
    Image.fromarray(example["image"]).save(pictures / f"{index}.png")
  (pictures / "2.jpg").write_text("no picture")
  done = command(
    "predict.py", f"--input={pictures}", f"--output={output}", f"--checkpoint={bundle}"
  )
  assert done.returncode == 1
  assert "skipped" in done.stderr
  assert "2.jpg cannot be decoded" in done.stderr
  assert "Traceback" not in done.stderr
  first = done.stdout.splitlines()[0]
  assert first.startswith("0.png: ")
  assert first.endswith(" ms")
  assert "2 of 3 written" in done.stdout
  right = []
  for index, example in enumerate(images):
    with Image.open(output / f"{index}_classes.png") as indexed:
      assert indexed.mode == "P"
      class_map = np.asarray(indexed)
      palette = np.asarray(indexed.getpalette()[:24]).reshape(-1, 3)
    np.testing.assert_array_equal(palette, synthetic.PALETTE)
    assert class_map.shape == example["label"].shape
    right.append((class_map == example["label"])[example["label"] != 255].mean())
    with Image.open(output / f"{index}_overlay.png") as overlay:
      assert overlay.size[0] > class_map.shape[1]
  assert np.mean(right) > 0.25


def test_a_picture_of_another_size_with_a_run_and_a_scale(run, tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  Image.fromarray(image).save(tmp_path / "noise.png")
  said = succeed(
    "predict.py",
    f"--input={tmp_path / 'noise.png'}",
    f"--output={tmp_path}",
    f"--checkpoint={run}",
    "--scale=90x64",
  )
  assert said.startswith("noise.png: ")
  with Image.open(tmp_path / "noise_classes.png") as class_map:
    assert class_map.size == (70, 50)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["train.py"], "--config and --workdir are needed"),
    (["train.py", CONFIG, "--workdir=x", "oops"], "unexpected argument 'oops'"),
    (["eval.py", CONFIG], "--checkpoint or --workdir is needed"),
    (["eval.py", CONFIG, "--checkpoint=nowhere"], "nowhere does not exist"),
    (["predict.py", "--output=x"], "--input and --output are needed"),
    (["predict.py", "--output=x", "--input=nowhere.jpg"], "nowhere.jpg does not exist"),
    (["predict.py", "--output=x", "--input=tests/golden"], "hold nothing to read"),
    (["-m", "effseg_jax", "export_bundle", "--workdir=x"], "--workdir and --output are needed"),
    (["-m", "effseg_jax", "plot_curves", "nowhere"], "nowhere is missing; expected the --workdir"),
  ],
)
def test_a_mistake_ends_in_one_line(words, message):
  assert message in fail(*words)


def test_missing_data_shows_the_expected_tree(tmp_path):
  done = command(
    "train.py",
    "--config=configs/afformer/camvid.py",
    f"--workdir={tmp_path}",
    "--config.data.root=nowhere",
    "--config.train.batch_size=4",
  )
  assert done.returncode == 2
  assert "Traceback" not in done.stderr
  assert done.stderr.startswith("error: camvid: nowhere does not exist")
  assert "train.txt" in done.stderr


def test_a_misspelt_field_is_named():
  assert "batch_size" in fail("train.py", CONFIG, "--workdir=x", "--config.train.batchsize=4")


def test_words_need_no_quotes():
  config = "--config=configs/avesformer/synthetic.py"
  said = fail("train.py", config, "--workdir=x", "--config.model.stage_types=attn,conv")
  assert "stage_types is ('attn', 'conv')" in said


def test_a_missing_configuration_is_named():
  assert "nowhere.py" in fail("train.py", "--config=configs/nowhere.py", "--workdir=x")


@pytest.fixture(scope="module")
def save_card(tmp_path_factory):
  """Saves a bundle of random weights with another task in its card."""
  fields = {"num_classes": 3, "widths": [8, 16, 16, 16], "depths": [0, 1, 1, 1]}
  model = create_model("afformer_tiny", **{**fields, "widths": (8, 16, 16, 16)})
  images = np.zeros((1, 32, 32, 3), np.float32)
  shapes = dict(jax.eval_shape(model.init, jax.random.key(0), images))
  variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)

  def save(task):
    path = tmp_path_factory.mktemp("bundle") / "model.safetensors"
    save_bundle(
      path, variables, {"model": {"name": "afformer_tiny", "fields": fields}, "task": task}
    )
    return path

  return save


def test_a_classifier_does_not_segment(save_card, tmp_path):
  Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
  path = save_card({"name": "classification", "classes": ["a", "b", "c"]})
  words = [f"--input={tmp_path}", f"--output={tmp_path}", f"--checkpoint={path}"]
  assert "was trained for classification" in fail("predict.py", *words)


def test_classes_must_be_those_of_the_data_set(save_card, tmp_path):
  path = save_card({"name": "semantic", "classes": ["a", "b", "c"]})
  line = fail("eval.py", CONFIG, f"--checkpoint={path}", f"--output={tmp_path}")
  assert "3 classes where the data set has 8" in line


def test_curves_need_matplotlib_or_are_drawn(run, tmp_path):
  path = tmp_path / "curves.png"
  done = command("-m", "effseg_jax", "plot_curves", run, f"--output={path}")
  if done.returncode:
    assert "matplotlib, which is not installed" in done.stderr
    pytest.skip("matplotlib is not installed")
  assert path.is_file()
