"""From raw videos to AVSBench's layout."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from command import call

from effseg_jax.cli import prepare_avsbench
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio
from effseg_jax.input_pipeline.datasets import open_dataset
from effseg_jax.prediction.clip_writer import ClipWriter

RATE = 16


def write_video(path, seconds):
  """The frame k is grey, of the brightness 2 k; the sound is a tone."""
  path.parent.mkdir(parents=True, exist_ok=True)
  grey = 2 * np.arange(int(seconds * RATE))
  frames = np.broadcast_to(grey[:, None, None, None], (len(grey), 64, 96, 3)).astype(np.uint8)
  waveform = 0.3 * np.sin(np.arange(int(seconds * 44_100)) * 0.05).astype(np.float32)
  with ClipWriter(path, Fraction(RATE), (64, 96), sample_rate=44_100, channels=1) as writer:
    writer.add(frames, waveform)


def test_frames_are_the_last_of_sixteen_moments_a_second():
  assert prepare_avsbench.frame_indices(Fraction(16)) == [15, 31, 47, 63, 79]
  assert prepare_avsbench.frame_indices(Fraction(30_000, 1001)) == [28, 58, 88, 118, 147]


def test_videos_become_the_official_layout(tmp_path, capsys):
  (tmp_path / "s4_meta_data.csv").write_text(
    "name,start,category,split\nlong,0,helicopter,test\nshort,0,helicopter,test\n"
  )
  videos = tmp_path / "s4_data" / "raw_videos" / "test" / "helicopter"
  write_video(videos / "long.mp4", 6)
  with pytest.raises(SystemExit):  # the second one is missing
    call("prepare_avsbench", "--subset=s4", f"--root={tmp_path}")
  assert "1 of 2 clips are ready" in capsys.readouterr().out
  write_video(videos / "short.mp4", 3)
  call("prepare_avsbench", "--subset=s4", f"--root={tmp_path}")
  assert "2 of 2 clips are ready" in capsys.readouterr().out

  frames = tmp_path / "s4_data" / "visual_frames" / "test" / "helicopter"
  assert len(list((frames / "short").iterdir())) == 3
  masks = tmp_path / "s4_data" / "gt_masks" / "test" / "helicopter"
  for name in ("long", "short"):  # these come with the benchmark
    (masks / name).mkdir(parents=True)
    for path in sorted((frames / name).iterdir()):
      (masks / name / path.name).write_bytes(path.read_bytes())
  example = open_dataset("s4", root=tmp_path, split="test")[0]
  assert example["frames"].shape == (5, 224, 224, 3)
  brightness = example["frames"].mean(axis=(1, 2, 3))
  np.testing.assert_allclose(brightness, 2 * np.array([15, 31, 47, 63, 79]), atol=4)
  waveform, rate = audio.read_waveform(
    tmp_path / "s4_data" / "audio_wav" / "test" / "helicopter" / "long.wav"
  )
  assert (rate, waveform.shape) == (16_000, (5 * 16_000,))


def test_multiple_sources_have_other_names(tmp_path):
  (tmp_path / "ms3_meta_data.csv").write_text("video_id,split\nclip,val\n")
  (task,) = prepare_avsbench.tasks(tmp_path, "ms3")
  assert task.frames[0] == tmp_path / "ms3_data" / "visual_frames" / "clip" / "clip.mp4_1.png"
  assert task.sound == tmp_path / "ms3_data" / "audio_wav" / "val" / "clip.wav"
  with pytest.raises(UserError, match=r"s4_meta_data\.csv is missing"):
    prepare_avsbench.tasks(tmp_path, "s4")
