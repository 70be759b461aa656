"""Clips from file to file: what sounds is tinted, the sound is kept, a stream equals the whole."""

from __future__ import annotations

from fractions import Fraction

import av
import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

import effseg_jax
from effseg_jax import create_model
from effseg_jax.errors import UserError
from effseg_jax.evaluators.audio_visual import AudioVisualEvaluator
from effseg_jax.input_pipeline import audio, clip_reader
from effseg_jax.input_pipeline.datasets import synthetic_av
from effseg_jax.input_pipeline.eval_audio_visual import audio_visual_eval_batches
from effseg_jax.prediction import make_segmenter
from effseg_jax.prediction.clip_writer import ClipWriter
from effseg_jax.prediction.hearing import Ear, hear
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
def segmenter():
  return make_segmenter(make_bundle(1))


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


def test_a_video_is_tinted_and_keeps_its_sound(segmenter, clip, tmp_path):
  path = write_video(tmp_path / "clip.mp4", *clip)
  line = segmenter.save_to(path, tmp_path / "out")
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


def test_a_stream_equals_the_whole_clip(segmenter, clip, tmp_path):
  path = write_video(tmp_path / "clip.mp4", *clip)
  whole = segmenter(path)
  assert isinstance(whole, effseg_jax.ClipResult)
  seconds = list(segmenter.stream(path))
  assert [second.number for second in seconds] == [0, 1, 2]
  assert isinstance(seconds[0], effseg_jax.SoundingSecond)
  np.testing.assert_array_equal(np.concatenate([s.masks for s in seconds]), whole.masks)
  np.testing.assert_array_equal(np.concatenate([s.times for s in seconds]), whole.times)
  np.testing.assert_allclose(whole.times, np.arange(12) / RATE)
  assert whole.masks.shape == (12, 40, 56) and 0 < whole.masks.mean() < 1
  assert set(whole.shares()) == {"sounding"}
  frames = list(whole.overlay())
  np.testing.assert_array_equal(np.stack(frames), np.concatenate([s.overlay() for s in seconds]))
  paths = whole.save(tmp_path / "new" / "kept")
  assert [p.name for p in paths] == ["kept_sounding.mp4", "kept_masks"]
  assert len(list(paths[1].iterdir())) == 12


def test_hears_what_training_hears():
  """Patch k of a clip begins at 0.96 k s; a longer clip is heard as several."""
  rng = np.random.default_rng(0)
  for sample_rate in (16_000, 44_100):
    wave = 0.1 * rng.standard_normal(10 * sample_rate)
    ear = Ear(sample_rate)
    heard = [ear(wave[k * sample_rate : (k + 1) * sample_rate]) for k in range(10)]
    for begin in (0, 5):
      part = wave[begin * sample_rate : (begin + 5) * sample_rate]
      expected = audio.log_mel(part, sample_rate)
      assert len(expected) == 5
      # A resampler's edges differ; what is shifted by 0.16 s differs by 1 and more.
      np.testing.assert_allclose(heard[begin : begin + 5], expected, atol=0.1)
      np.testing.assert_allclose(
        np.stack(heard[begin : begin + 5])[:, 2:-2], expected[:, 2:-2], atol=1e-3
      )
  late = [hear(wave[k * 44_100 : (k + 1) * 44_100], 44_100) for k in range(5)]
  assert np.abs(late[4] - audio.log_mel(wave, 44_100)[4]).max() > 1


@pytest.mark.parametrize("num_classes", [1, 5])
def test_equals_the_evaluation_to_the_pixel(num_classes, tmp_path):
  bundle = make_bundle(num_classes)
  segmenter = make_segmenter(bundle)
  dataset = synthetic_av.SyntheticClips("val", SIZE, SECONDS, semantic=num_classes > 1)
  options = {"size": SIZE, "mask_size": SIZE, "clips_per_batch": 1}
  evaluator = AudioVisualEvaluator(bundle.model, segmenter.task, dataset, options)
  batches = audio_visual_eval_batches(dataset, options, batch_size=2)
  batch = next(iter(batches))
  _, found = jax.jit(evaluator.step)(bundle.variables, batch)
  for row in range(2):
    frames, waveform, _ = dataset.clip(int(batch["index"][row]))
    masks = segmenter.segment(frames, waveform, 1, SAMPLE_RATE)
    expected = np.asarray(found[row])
    np.testing.assert_array_equal(masks, expected if num_classes > 1 else expected > 0)
    assert len(np.unique(masks)) > 1


def test_each_second_hears_its_own_sound(segmenter, clip, monkeypatch):
  frames, waveform = clip
  heard = []
  monkeypatch.setattr(
    type(segmenter),
    "segment_second",
    lambda self, frames, patch, chunk: heard.append(patch) or frames,
  )

  def changed(samples):
    """Which seconds hear another sound where these samples are noise."""
    heard.clear()
    noisy = waveform.copy()
    noisy[samples] = np.random.default_rng(0).uniform(-1, 1, len(noisy[samples]))
    for x in (waveform, noisy):
      segmenter.segment(frames, x, RATE, SAMPLE_RATE)
    return [bool((a != b).any()) for a, b in zip(heard[:SECONDS], heard[SECONDS:], strict=True)]

  second = SAMPLE_RATE
  assert changed(np.s_[: second // 2]) == [True, False, False]
  assert changed(np.s_[second + second // 4 : second + second // 2]) == [False, True, False]
  # The third second is heard from 1.92 s on.
  assert changed(np.s_[2 * second - 1000 : 2 * second]) == [False, False, True]


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


def test_a_folder_of_frames_and_sound(segmenter, clip, tmp_path):
  frames, waveform = clip[0][::RATE], clip[1]
  folder = tmp_path / "video"
  (folder / "frames").mkdir(parents=True)
  for k, frame in enumerate(frames):
    Image.fromarray(frame).save(folder / "frames" / f"{8 + k}.png")  # 10 comes after 9
  soundfile.write(folder / "audio.wav", waveform, SAMPLE_RATE)
  assert segmenter.save_to(folder, tmp_path / "out").startswith("3 frames in ")
  masks = [np.asarray(Image.open(tmp_path / "out_masks" / f"{k:05d}.png")) for k in range(3)]
  waveform, _ = soundfile.read(folder / "audio.wav", dtype="float32")
  clip = clip_reader.open_clip(folder)
  assert clip.rate == Fraction(3 * SAMPLE_RATE, len(waveform))
  expected = segmenter.segment(frames, waveform, clip.rate, SAMPLE_RATE)
  np.testing.assert_array_equal(np.stack(masks) > 0, expected > 0)


def test_classes_have_colours(clip, tmp_path):
  segmenter = make_segmenter(make_bundle(5))
  path = write_video(tmp_path / "clip.mp4", clip[0][:2], clip[1][:8_000])
  segmenter.save_to(path, tmp_path / "out")
  with Image.open(tmp_path / "out_masks" / "00001.png") as mask:
    assert mask.mode == "P" and mask.getpalette()[3:6] == [230, 57, 70]
    ids = np.unique(np.asarray(mask))
  assert len(ids) > 1 and ids.max() < 5


def test_what_cannot_be_read_ends_in_one_line(segmenter, clip, tmp_path):
  broken = tmp_path / "broken.mp4"
  broken.write_bytes(b"nothing")
  with pytest.raises(UserError, match=r"broken\.mp4 cannot be opened"):
    segmenter.save_to(broken, tmp_path / "out")
  mute = tmp_path / "mute.mp4"
  with av.open(str(mute), "w") as container:
    stream = container.add_stream("libx264", rate=4)
    stream.width, stream.height, stream.pix_fmt = 56, 40, "yuv420p"
    for frame in clip[0]:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))
  with pytest.raises(UserError, match=r"mute\.mp4 has no sound; expected a video with sound"):
    segmenter.save_to(mute, tmp_path / "out")
  folder = tmp_path / "frames"
  folder.mkdir()
  Image.fromarray(clip[0][0]).save(folder / "0.png")
  with pytest.raises(UserError, match="holds 0 sound files; expected one beside the frames"):
    segmenter.save_to(folder, tmp_path / "out")


def test_the_size_is_that_of_the_card_or_asked_for():
  bundle = make_bundle(1)
  assert make_segmenter(bundle, scale="96x64")._size == (64, 96)
  with pytest.raises(UserError, match=r"--scale is '2\.0'; expected WIDTHxHEIGHT"):
    make_segmenter(bundle, scale="2.0")
  bundle.card.pop("inference")
  with pytest.raises(UserError, match="give --scale"):
    make_segmenter(bundle)


def test_a_failed_clip_leaves_nothing(segmenter, clip, tmp_path, monkeypatch):
  path = write_video(tmp_path / "clip.mp4", *clip)
  segment, calls = type(segmenter).segment_second, []

  def fail(self, *others):
    calls.append(1)
    if len(calls) == 2:
      raise UserError("the second second is bad")
    return segment(self, *others)

  monkeypatch.setattr(type(segmenter), "segment_second", fail)
  with pytest.raises(UserError, match="is bad"):
    segmenter.save_to(path, tmp_path / "out" / "clip")
  assert not list((tmp_path / "out").iterdir())


def test_what_is_no_clip(segmenter):
  with pytest.raises(UserError, match=r"the clip is a ndarray; expected the path of a video"):
    segmenter(np.zeros((3, 4, 4, 3), np.uint8))
