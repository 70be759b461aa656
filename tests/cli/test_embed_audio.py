"""Embeddings stand for sounds: in the batches, in a run, and what is said to a mistake."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from effseg_jax import experiment
from effseg_jax.cli import embed_audio
from effseg_jax.configs.avesformer import ms3
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import pipelines
from effseg_jax.models.backbones import vggish

HIDDEN = 8  # instead of 4096: the first layer alone would have 50 million weights


@pytest.fixture
def root(tmp_path):
  """Two clips of MS3, the second one of a single frame."""
  home = tmp_path / "Multi-sources"
  home.mkdir()
  (home / "ms3_meta_data.csv").write_text("video_id,split\nlong,train\nshort,val\n")
  rng = np.random.default_rng(0)
  for name, split, frames in (("long", "train", 5), ("short", "val", 1)):
    for k in range(1, frames + 1):
      picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
      for path in (
        home / "ms3_data" / "visual_frames" / name / f"{name}.mp4_{k}.png",
        home / "ms3_data" / "gt_masks" / split / name / f"{name}_{k}.png",
      ):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    sound = home / "ms3_data" / "audio_wav" / split / f"{name}.wav"
    sound.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(sound, 0.2 * rng.standard_normal(16_000 * frames), 16_000)
  return tmp_path


@pytest.fixture
def config(root):
  config = ms3.get_config("r18")
  config.data.root = str(root)
  return config


@pytest.fixture
def weights(monkeypatch):
  """What a file of a narrow VGGish would hold, under any name; "other" holds other numbers."""
  monkeypatch.setattr(vggish, "_HIDDEN", HIDDEN)
  model = vggish.VGGish()
  shapes = model.init(jax.random.key(0), np.zeros((1, 96, 64), np.float32))["params"]

  def read(source, model):
    seed = {"vggish": 0, "other": 1}.get(source)
    if seed is None:
      return {"params": {"backbone": {}}}
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda x: (0.05 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
    return {"params": {"audio": tree}}

  monkeypatch.setattr(experiment, "read_variables", read)


@pytest.mark.usefixtures("weights")
def test_embeddings_are_what_the_model_would_compute(config, tmp_path):
  output = tmp_path / "vggish"
  assert embed_audio.embed_splits(config, "vggish", output, ["train", "val"]) == 2
  assert embed_audio.embed_splits(config, "vggish", output, ["train", "val"]) == 0
  (output / "val" / "short.npy").unlink()
  assert embed_audio.embed_splits(config, "vggish", output, ["train", "val"]) == 1

  heard = experiment.open_dataset(config, "train")[0]
  own = experiment.read_variables("vggish", None)["params"]["audio"]
  expected = vggish.VGGish().apply({"params": own}, heard["log_mel"])
  config.data.options.embeddings = str(output)
  dataset = experiment.open_dataset(config, "train")
  example = dataset[0]
  np.testing.assert_allclose(example["log_mel"], expected, atol=1e-5)
  np.testing.assert_array_equal(example["frames"], heard["frames"])
  assert np.ptp(experiment.open_dataset(config, "val")[0]["log_mel"], axis=0).max() == 0

  settings = {"size": (32, 32), "mask_size": (32, 32)}
  batches = pipelines.eval_batches("audio_visual", dataset, settings, batch_size=2)
  (batch,) = list(batches)
  assert batch["log_mel"].shape == (2, 5, 128)  # the second example fills the batch up
  assert batch["weight"].tolist() == [1, 0]


@pytest.mark.usefixtures("weights")
def test_mistakes(config, tmp_path):
  output = tmp_path / "vggish"
  with pytest.raises(UserError, match="--weights=resnet holds no VGGish"):
    embed_audio.embed_splits(config, "resnet", output, ["train"])
  embed_audio.embed_splits(config, "vggish", output, ["train"])
  with pytest.raises(UserError, match="another VGGish"):
    embed_audio.embed_splits(config, "other", output, ["val"])
  config.data.options.embeddings = str(output)
  with pytest.raises(UserError, match=r"short.npy is missing; make it with effseg embed_audio"):
    experiment.open_dataset(config, "val")[0]
  dataset = experiment.open_dataset(config, "train")
  augment = {**config.data.augment.to_dict(), "gain": 6.0}
  gain = pipelines.train_transforms("audio_visual", **augment)[-1]
  with pytest.raises(UserError, match=r"data.augment.gain changes sounds"):
    gain(dataset[0], np.random.default_rng(0))
  for bad, message in ((np.zeros((5, 64), np.float32), "expected float32"), (b"no", "be read")):
    path = output / "train" / "long.npy"
    path.write_bytes(bad) if isinstance(bad, bytes) else np.save(path, bad)
    with pytest.raises(UserError, match=message):
      dataset[0]
  config.data.options.embeddings = ""
  config.model = ms3.get_config("lite").model
  with pytest.raises(UserError, match="trains its sound encoder"):
    embed_audio.embed_splits(config, "vggish", output, ["train"])
