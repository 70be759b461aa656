"""An embedded clip becomes a video that the shipped checkpoint hears and sees."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import call

from effseg_jax.prediction import make_segmenter
from effseg_jax.run.saved_model import load_for_inference

CHECKPOINT = (
  Path(__file__).resolve().parents[2] / "checkpoints" / "avesformer_synthetic.safetensors"
)


def test_a_clip_is_written_and_segmented(tmp_path):
  path = tmp_path / "clip.mp4"
  call("write_clip", f"--output={path}", "--seconds=2", "--side=64")
  line = make_segmenter(load_for_inference(CHECKPOINT)).save_to(path, tmp_path / "found")
  assert line.startswith("16 frames")
  assert "something sounds in 100%" in line
  assert (tmp_path / "found_sounding.mp4").stat().st_size > 0


def test_mistakes_are_one_line(tmp_path, capsys):
  for words, message in (
    ([f"--output={tmp_path / 'clip.avi'}"], "ends in .mp4"),
    ([f"--output={tmp_path / 'clip.mp4'}", "--index=64"], "expected 0 to 63"),
  ):
    with pytest.raises(SystemExit):
      call("write_clip", *words)
    assert message in capsys.readouterr().err
