"""AVSBench's official layouts: what is read from where, and what a user reads of a mistake."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio
from effseg_jax.input_pipeline.datasets import clips, open_dataset
from effseg_jax.input_pipeline.eval_audio_visual import audio_visual_eval_batches
from effseg_jax.input_pipeline.loader import train_batches
from effseg_jax.input_pipeline.pipelines import train_transforms

SIZE = (6, 8)
NAMES = {"background": 1, "accordion": 2, "airplane": 3, "axe": 4}


def tone(seconds, rate=16_000, channels=1):
  wave = 0.3 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate)
  return np.stack([wave] * channels, axis=1) if channels > 1 else wave


def write_sound(path, wave=None, rate=16_000):
  path.parent.mkdir(parents=True, exist_ok=True)
  soundfile.write(path, tone(5) if wave is None else wave, rate, subtype="PCM_16")


def write_frame(path, value, size=SIZE):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def half(value=1, size=SIZE):
  """A mask whose left half is `value`."""
  mask = np.zeros(size, np.uint8)
  mask[:, : size[1] // 2] = value
  return mask


def write_mask(path, mask, mode="L"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(mask).convert(mode).save(path)


def write_table(path, header, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="") as lines:
    csv.writer(lines).writerows([header, *rows])


@pytest.fixture
def s4(tmp_path):
  """A clip in each split of the single-source subset; returns the folder with Single-source."""
  home = tmp_path / "Single-source"
  rows = [(f"a_{split}", 5, "dog_barking", split) for split in ("train", "val", "test")]
  write_table(home / "s4_meta_data.csv", ("name", "<start>", "category", "split"), rows)
  for name, _, category, split in rows:
    inner = f"{split}/{category}/{name}"
    for k in range(1, 6):
      write_frame(home / f"s4_data/visual_frames/{inner}/{name}_{k}.png", 10 * k)
      if k == 1 or split != "train":
        path = home / f"s4_data/gt_masks/{inner}/{name}_{k}.png"
        write_mask(path, half(255), "1" if k % 2 else "L")
    write_sound(home / f"s4_data/audio_wav/{split}/{category}/{name}.wav")
  return tmp_path


@pytest.fixture
def ms3(tmp_path):
  home = tmp_path / "Multi-sources"
  write_table(home / "ms3_meta_data.csv", ("video_id", "split"), [("b", "train"), ("c", "val")])
  for name, split in (("b", "train"), ("c", "val")):
    for k in range(1, 6):
      write_frame(home / f"ms3_data/visual_frames/{name}/{name}.mp4_{k}.png", 10 * k)
      write_mask(home / f"ms3_data/gt_masks/{split}/{name}/{name}_{k}.png", half(255), "P")
    write_sound(home / f"ms3_data/audio_wav/{split}/{name}.wav")
  return tmp_path


@pytest.fixture
def avss(tmp_path):
  """Clips of the three sources in train and test; the label of source i is class i + 1."""
  sources = {"v1s": 5, "v1m": 5, "v2": 10}
  rows = []
  palette = clips.voc_palette(len(NAMES))
  for split in ("train", "test"):
    for number, (source, count) in enumerate(sources.items()):
      uid = f"{split}_{source}"
      rows.append((uid, uid, 0, 5, "dog_man", split, source))
      for k in range(count):
        write_frame(tmp_path / f"{source}/{uid}/frames/{k}.jpg", 20 * k + 20)
        if split != "train" or source != "v1s" or k == 0:
          colours = palette[half(number + 1)]
          path = tmp_path / f"{source}/{uid}/labels_rgb/{k}.png"
          path.parent.mkdir(exist_ok=True)
          Image.fromarray(colours).save(path)
      write_sound(tmp_path / f"{source}/{uid}/audio.wav", tone(count))
  header = ("vid", "uid", "s_min", "s_sec", "a_obj", "split", "label")
  write_table(tmp_path / "metadata.csv", header, rows)
  (tmp_path / "label2idx.json").write_text(json.dumps(NAMES))
  return tmp_path


def test_s4_supervises_the_first_frame_of_training_clips(s4):
  train = open_dataset("s4", root=s4, split="train")
  example = train[0]
  assert example["frames"].shape == (5, *SIZE, 3)
  np.testing.assert_array_equal(example["frames"][:, 0, 0, 0], [10, 20, 30, 40, 50])
  np.testing.assert_array_equal(example["frame_weight"], [1, 0, 0, 0, 0])
  np.testing.assert_array_equal(example["valid_frames"], np.ones(5))
  np.testing.assert_array_equal(example["masks"][0], half())
  assert not example["masks"][1:].any()
  test = open_dataset("s4", root=s4 / "Single-source", split="test")
  np.testing.assert_array_equal(test[0]["frame_weight"], np.ones(5))
  np.testing.assert_array_equal(test[0]["masks"], np.stack([half()] * 5))  # 1-bit and grey alike
  assert (test.num_classes, test.group(0)) == (1, "dog_barking")
  assert test.prediction_path(0, 3).as_posix() == "dog_barking/a_test/a_test_3.png"


def test_ms3_supervises_every_frame(ms3):
  dataset = open_dataset("ms3", root=ms3, split="train")
  example = dataset[0]
  np.testing.assert_array_equal(example["frame_weight"], np.ones(5))
  np.testing.assert_array_equal(example["masks"], np.stack([half()] * 5))
  assert dataset.prediction_path(0, 0).as_posix() == "b/b_0.png"
  with pytest.raises(UserError, match="the split 'test' is empty"):
    open_dataset("ms3", root=ms3, split="test")


@pytest.mark.parametrize(
  ("index", "split", "supervised", "valid"),
  [(0, "train", 1, 5), (1, "train", 5, 5), (2, "train", 10, 10), (0, "test", 5, 5)],
)
def test_avss_pads_to_ten_frames(avss, index, split, supervised, valid):
  dataset = open_dataset("avss", root=avss, split=split)
  assert dataset.classes == tuple(NAMES)
  assert dataset.group(index) == ("v1s", "v1m", "v2")[index]
  example = dataset[index]
  assert example["frames"].shape == (10, *SIZE, 3)
  assert example["frame_weight"].sum() == supervised
  assert example["valid_frames"].sum() == valid
  np.testing.assert_array_equal(example["masks"][0], half(index + 1))
  assert not example["masks"][supervised:].any()
  assert not example["frames"][valid:].any()
  assert not example["log_mel"][valid:].any()  # zeros, not silence
  assert example["log_mel"][:valid].any(axis=(1, 2)).all()


def test_avss_reads_index_masks_in_place_of_colours(avss):
  folder = avss / "v1m" / "test_v1m"
  for path in (folder / "labels_rgb").iterdir():
    write_mask(folder / "labels_semantic" / path.name, half(3))
    path.unlink()
  example = open_dataset("avss", root=avss, split="test")[1]
  np.testing.assert_array_equal(example["masks"][4], half(3))


def test_the_palette_is_pascals():
  palette = clips.voc_palette(71)
  assert [tuple(map(int, palette[k])) for k in (0, 1, 2, 3, 8, 70)] == [
    (0, 0, 0),
    (128, 0, 0),
    (0, 128, 0),
    (128, 128, 0),
    (64, 0, 0),
    (32, 128, 128),
  ]
  assert len(np.unique(palette, axis=0)) == 71


def test_the_palette_is_the_reference_one():
  with np.load(Path(__file__).parents[1] / "golden" / "audio_visual_metrics.npz") as golden:
    np.testing.assert_array_equal(clips.voc_palette(71), golden["avss/palette"])


def test_stray_colours_are_background_and_a_wrong_palette_an_error(tmp_path):
  palette = clips.voc_palette(71)
  picture = palette[np.random.default_rng(0).integers(0, 71, (20, 20))]
  ids = clips.colours_to_ids(picture, palette, tmp_path)
  np.testing.assert_array_equal(palette[ids], picture)
  picture[3, 4] = (1, 2, 3)
  assert clips.colours_to_ids(picture, palette, tmp_path)[3, 4] == 0
  picture[:10] = (1, 2, 3)
  with pytest.raises(UserError, match=r"the colour \(1, 2, 3\), which is none of the 71 classes'"):
    clips.colours_to_ids(picture, palette, tmp_path)


@pytest.mark.parametrize(
  ("wave", "rate"),
  [
    (tone(5, 8_000), 8_000),
    (tone(5, 44_100, channels=2), 44_100),
    (tone(5, 48_000), 48_000),
    (np.clip(9 * tone(5), -1, 1), 16_000),
    (np.zeros(80_000), 16_000),
  ],
  ids=["8 kHz", "stereo 44.1 kHz", "48 kHz", "clipped", "silent"],
)
def test_sound_of_any_kind_is_heard(ms3, wave, rate):
  write_sound(ms3 / "Multi-sources/ms3_data/audio_wav/train/b.wav", wave, rate)
  patches = open_dataset("ms3", root=ms3, split="train")[0]["log_mel"]
  assert patches.shape == (5, 96, 64) and patches.dtype == np.float32
  assert np.isfinite(patches).all()
  if not wave.any():
    np.testing.assert_allclose(patches, np.log(0.01), rtol=1e-6)
  else:  # 440 Hz is loudest in the same band, whatever the rate
    reference = audio.log_mel(tone(5))
    assert (patches.mean(1).argmax(-1) == reference.mean(1).argmax(-1)).all()


@pytest.mark.parametrize("samples", [0, 300, 20_000])
def test_short_sound_repeats_its_last_patch(ms3, samples):
  write_sound(ms3 / "Multi-sources/ms3_data/audio_wav/train/b.wav", tone(5)[:samples])
  patches = open_dataset("ms3", root=ms3, split="train")[0]["log_mel"]
  np.testing.assert_array_equal(patches, np.stack([patches[0]] * 5))
  assert (patches == audio.silence()).all() == (samples < 15_600)


def test_a_clip_with_fewer_frames_is_continued(ms3):
  frames = ms3 / "Multi-sources/ms3_data/visual_frames/b"
  for k in (4, 5):
    (frames / f"b.mp4_{k}.png").unlink()
  example = open_dataset("ms3", root=ms3, split="train")[0]
  np.testing.assert_array_equal(example["frames"][:, 0, 0, 0], [10, 20, 30, 30, 30])
  np.testing.assert_array_equal(example["frame_weight"], [1, 1, 1, 0, 0])


def _ms3(root, inner):
  return root / "Multi-sources" / "ms3_data" / inner


def _lose_frame(root):
  _ms3(root, "visual_frames/b/b.mp4_2.png").unlink()


def _lose_mask(root):
  _ms3(root, "gt_masks/train/b/b_3.png").unlink()


def _lose_frames(root):
  for path in _ms3(root, "visual_frames/b").iterdir():
    path.unlink()


def _break_mask(root):
  _ms3(root, "gt_masks/train/b/b_3.png").write_bytes(b"nothing")


def _break_sound(root):
  _ms3(root, "audio_wav/train/b.wav").write_bytes(b"nothing")


def _shrink_mask(root):
  write_mask(_ms3(root, "gt_masks/train/b/b_3.png"), half(255, (3, 4)))


def _shrink_frame(root):
  write_frame(_ms3(root, "visual_frames/b/b.mp4_4.png"), 9, (3, 4))


@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (_lose_frame, r"b\.mp4_2\.png is missing; expected 5 frames, b\.mp4_5\.png last"),
    (_lose_frames, r"b\.mp4_1\.png is missing"),
    (_lose_mask, r"b_3\.png is missing; expected the mask of a frame"),
    (_break_mask, r"b_3\.png cannot be decoded"),
    (_break_sound, r"b\.wav cannot be read as sound"),
    (_shrink_mask, r"b_3\.png is 3x4 and .*b\.mp4_3\.png is 6x8; expected the same"),
    (_shrink_frame, r"b\.mp4_4\.png is 3x4 and .*b\.mp4_1\.png is 6x8; expected the same"),
  ],
)
def test_a_broken_clip_names_the_file(ms3, harm, message):
  harm(ms3)
  dataset = open_dataset("ms3", root=ms3, split="train")
  with pytest.raises(UserError, match=message):
    dataset[0]


def test_a_missing_tree_is_explained(tmp_path, s4):
  for name, inside in (("s4", "s4_meta_data.csv"), ("ms3", "ms3_data"), ("avss", "label2idx")):
    with pytest.raises(UserError, match=f"(?s){name}: .*Expected.*{inside}"):
      open_dataset(name, root=tmp_path / "nowhere", split="train")
  with pytest.raises(UserError, match="s4 has no split 'training'"):
    open_dataset("s4", root=s4, split="training")
  (s4 / "Single-source/s4_data/audio_wav/val/dog_barking/a_val.wav").unlink()
  with pytest.raises(UserError, match=r"1 of 1 clips .* have no sound; the first is a_val"):
    open_dataset("s4", root=s4, split="val")


def test_broken_metadata_names_the_line(avss):
  table = avss / "metadata.csv"
  table.write_text(table.read_text() + "x,y\n")
  with pytest.raises(UserError, match=r"metadata\.csv, line 8 has 2 columns; expected 7"):
    open_dataset("avss", root=avss, split="train")
  (avss / "label2idx.json").write_text('{"a": 0, "b": 2}')
  with pytest.raises(UserError, match="with gaps or twice"):
    open_dataset("avss", root=avss, split="train")


def test_batches_of_training_and_evaluation(ms3):
  dataset = open_dataset("ms3", root=ms3, split="train")
  steps = train_transforms(
    "audio_visual", size=(4, 4), fit="random", ratio=(0.5, 2.0), flip=0.5, photometric=True
  )
  batch = next(train_batches(dataset, steps, batch_size=1, seed=0))
  options = {"size": (4, 4), "mask_size": SIZE}
  (evaluation,) = audio_visual_eval_batches(dataset, options, batch_size=2)
  shapes = {
    "frames": ((5, 4, 4, 3), np.uint8),
    "log_mel": ((5, 96, 64), np.float32),
    "masks": ((5, 4, 4), np.uint8),
    "frame_weight": ((5,), np.float32),
    "valid_frames": ((5,), np.float32),
    "weight": ((), np.float32),
  }
  assert {k: (v.shape[1:], v.dtype) for k, v in batch.items()} == shapes
  shapes |= {"masks": ((5, *SIZE), np.uint8), "index": ((), np.int32)}
  assert {k: (v.shape[1:], v.dtype) for k, v in evaluation.items()} == shapes
  np.testing.assert_array_equal(evaluation["weight"], [1, 0])
  np.testing.assert_array_equal(evaluation["masks"][0], np.stack([half()] * 5))
  assert not evaluation["frame_weight"][1].any()
