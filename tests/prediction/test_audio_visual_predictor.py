"""Clips from file to file: what sounds is tinted, the sound is kept, a stream equals the whole."""

from __future__ import annotations

from fractions import Fraction

import av
import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from effseg_jax import create_model
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio, clip_reader
from effseg_jax.input_pipeline.datasets import synthetic_av
from effseg_jax.prediction import make_predictor
from effseg_jax.prediction.audio_visual import hear
from effseg_jax.prediction.clip_writer import ClipWriter
from effseg_jax.weights.bundle import Bundle

SIZE = (32, 48)
RATE, SECONDS, SAMPLE_RATE = 4, 3, 16_000
FIELDS = {
  "backbone": "small",
  "depths": (1, 1, 1, 1),
  "widths": (32, 32, 32, 32),
  "width": 32,
  "hidden": 32,
  "prompts": 2,
  "prompt_layers": 1,
  "prompt_hidden": 32,
}


def make_bundle(num_classes):
  model = create_model("avesformer_lite", num_classes=num_classes, **FIELDS)
  frames, log_mel = np.zeros((1, 1, *SIZE, 3)), np.zeros((1, 1, 96, 64))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), frames, log_mel))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
  variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
  classes = ("sounding",) if num_classes == 1 else ("background", *synthetic_av.KINDS)
  palette = [[255, 122, 0]] if num_classes == 1 else synthetic_av.PALETTE.tolist()
  task = {"name": "audio_visual", "classes": list(classes), "palette": palette, "mask_loss": "bce"}
  card = {"task": task, "inference": {"size": list(SIZE)}}
  return Bundle(model, variables, card)


@pytest.fixture(scope="module")
def predictor():
  return make_predictor(make_bundle(1))


@pytest.fixture(scope="module")
def clip():
  """Frames (12, 40, 56, 3) at 4 a second, and 3 s of sound, the last one not whole."""
  dataset = synthetic_av.SyntheticClips("val", (40, 56), SECONDS)
  frames, waveform, _ = dataset.clip(0)
  return np.repeat(frames, RATE, axis=0), waveform[: int(2.6 * SAMPLE_RATE)]


def write_video(path, frames, waveform, sample_rate=SAMPLE_RATE):
  channels = 2 if waveform.ndim == 2 else 1
  with ClipWriter(
    path, Fraction(RATE), frames.shape[1:3], sample_rate=sample_rate, channels=channels
  ) as writer:
    writer.add(frames, waveform)
  return path


def decode(path):
  with av.open(str(path)) as container:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def decode_sound(path):
  with av.open(str(path)) as container:
    pieces = [frame.to_ndarray() for frame in container.decode(audio=0)]
  return np.concatenate(pieces, axis=1)


def test_a_video_is_tinted_and_keeps_its_sound(predictor, clip, tmp_path):
  path = write_video(tmp_path / "clip.mp4", *clip)
  assert predictor.inputs(tmp_path) == [path] == predictor.inputs(path)
  line = predictor(path, tmp_path / "out")
  assert line.startswith("12 frames in ") and "frames/s" in line
  frames, tinted = decode(path), decode(tmp_path / "out_sounding.mp4")
  assert tinted.shape == frames.shape
  masks = sorted((tmp_path / "out_masks").iterdir())
  assert [mask.name for mask in masks] == [f"{k:05d}.png" for k in range(12)]
  masks = np.stack([np.asarray(Image.open(mask)) for mask in masks])
  assert masks.shape == frames.shape[:3] and set(np.unique(masks)) == {0, 255}
  change = np.abs(tinted.astype(int) - frames).mean(-1)
  assert change[masks > 0].mean() > 2 * change[masks == 0].mean()
  heard, kept = (decode_sound(p)[0] for p in (path, tmp_path / "out_sounding.mp4"))
  count = min(len(heard), len(kept))
  assert abs(len(heard) - len(kept)) < 4096
  shifts = [
    np.corrcoef(heard[2048 : count - 2048], kept[2048 + s : count - 2048 + s])[0, 1]
    for s in (-1024, 0, 1024)
  ]
  assert max(shifts) > 0.9


def test_a_stream_equals_the_whole_clip(predictor, clip):
  frames, waveform = clip
  whole = predictor.segment(frames, waveform, RATE, SAMPLE_RATE)
  streamed = [
    predictor.segment_second(
      frames[k * RATE : (k + 1) * RATE],
      waveform[k * SAMPLE_RATE : (k + 1) * SAMPLE_RATE],
      SAMPLE_RATE,
      RATE,
    )
    for k in range(SECONDS)
  ]
  np.testing.assert_array_equal(np.concatenate(streamed), whole)
  assert whole.shape == (12, 40, 56) and 0 < whole.mean() < 1


def test_each_second_hears_its_own_sound(predictor, clip):
  frames, waveform = clip
  louder = waveform.copy()
  louder[SAMPLE_RATE : 2 * SAMPLE_RATE] = np.random.default_rng(0).uniform(-1, 1, SAMPLE_RATE)
  heard = [hear(x[SAMPLE_RATE : 2 * SAMPLE_RATE], SAMPLE_RATE) for x in (waveform, louder)]
  assert np.abs(heard[0] - heard[1]).max() > 1
  before, after = (predictor.segment(frames, x, RATE, SAMPLE_RATE) for x in (waveform, louder))
  changed = (before != after).reshape(SECONDS, -1).any(1)
  np.testing.assert_array_equal(changed, [False, True, False])


def test_hearing():
  np.testing.assert_array_equal(hear(np.zeros(0), 16_000), audio.silence())
  np.testing.assert_array_equal(hear(np.zeros((0, 2)), 44_100), audio.silence())
  wave = 0.1 * np.random.default_rng(0).standard_normal(16_000)
  np.testing.assert_array_equal(hear(wave, 16_000), audio.log_mel(wave)[0])
  stereo = hear(np.stack([wave, wave], axis=1), 16_000)
  np.testing.assert_allclose(stereo, hear(wave, 16_000), atol=1e-5)
  assert (hear(wave[:8_000], 16_000)[60:] == audio.silence()[60:]).all()  # then silence


@pytest.mark.parametrize("sample_rate", [8_000, 44_100, 96_000])
def test_sound_of_other_rates_and_channels(clip, tmp_path, sample_rate):
  time = np.arange(2 * sample_rate) / sample_rate
  stereo = np.stack([np.sin(2 * np.pi * 300 * time)] * 2, axis=1).astype(np.float32) * 0.3
  path = write_video(tmp_path / "clip.mp4", clip[0][:8], stereo, sample_rate)
  opened = clip_reader.open_clip(path)
  assert (opened.rate, opened.size, opened.channels) == (RATE, (40, 56), 2)
  seconds = list(opened.seconds())
  assert [len(second.frames) for second in seconds] == [4, 4]
  assert seconds[0].waveform.shape == (opened.sample_rate, 2)
  bands = [hear(second.waveform, opened.sample_rate).mean(0).argmax() for second in seconds]
  assert bands[0] == hear(stereo[:sample_rate], sample_rate).mean(0).argmax()


def test_a_folder_of_frames_and_sound(predictor, clip, tmp_path):
  frames, waveform = clip[0][::RATE], clip[1]
  folder = tmp_path / "video"
  (folder / "frames").mkdir(parents=True)
  for k, frame in enumerate(frames):
    Image.fromarray(frame).save(folder / "frames" / f"{8 + k}.png")  # 10 comes after 9
  soundfile.write(folder / "audio.wav", waveform, SAMPLE_RATE)
  assert predictor.inputs(tmp_path) == [folder] == predictor.inputs(folder)
  assert predictor(folder, tmp_path / "out").startswith("3 frames in ")
  masks = [np.asarray(Image.open(tmp_path / "out_masks" / f"{k:05d}.png")) for k in range(3)]
  waveform, _ = soundfile.read(folder / "audio.wav", dtype="float32")
  expected = predictor.segment(frames, waveform, 1, SAMPLE_RATE)
  np.testing.assert_array_equal(np.stack(masks) > 0, expected > 0)


def test_classes_have_colours(clip, tmp_path):
  predictor = make_predictor(make_bundle(5))
  path = write_video(tmp_path / "clip.mp4", clip[0][:2], clip[1][:8_000])
  predictor(path, tmp_path / "out")
  with Image.open(tmp_path / "out_masks" / "00001.png") as mask:
    assert mask.mode == "P" and mask.getpalette()[3:6] == [230, 57, 70]
    ids = np.unique(np.asarray(mask))
  assert len(ids) > 1 and ids.max() < 5


def test_what_cannot_be_read_ends_in_one_line(predictor, clip, tmp_path):
  with pytest.raises(UserError, match="holds no clip"):
    predictor.inputs(tmp_path)
  broken = tmp_path / "broken.mp4"
  broken.write_bytes(b"nothing")
  with pytest.raises(UserError, match=r"broken\.mp4 cannot be opened"):
    predictor(broken, tmp_path / "out")
  mute = tmp_path / "mute.mp4"
  with av.open(str(mute), "w") as container:
    stream = container.add_stream("libx264", rate=4)
    stream.width, stream.height, stream.pix_fmt = 56, 40, "yuv420p"
    for frame in clip[0]:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))
  with pytest.raises(UserError, match=r"mute\.mp4 has no sound; expected a video with sound"):
    predictor(mute, tmp_path / "out")
  folder = tmp_path / "frames"
  folder.mkdir()
  Image.fromarray(clip[0][0]).save(folder / "0.png")
  with pytest.raises(UserError, match="holds 0 sound files; expected one beside the frames"):
    predictor(folder, tmp_path / "out")


def test_the_size_is_that_of_the_card_or_asked_for():
  bundle = make_bundle(1)
  assert make_predictor(bundle, scale="96x64")._size == (64, 96)
  with pytest.raises(UserError, match=r"--scale is '2\.0'; expected WIDTHxHEIGHT"):
    make_predictor(bundle, scale="2.0")
  bundle.card.pop("inference")
  with pytest.raises(UserError, match="give --scale"):
    make_predictor(bundle)
