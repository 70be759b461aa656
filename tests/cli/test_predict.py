"""`effseg predict`: flags become options, and what is wrong ends in one line."""

import sys
from pathlib import Path

import pytest
from command import call
from PIL import Image

from effseg_jax import cli, prediction

sys.path.append(str(Path(__file__).resolve().parents[1] / "prediction"))
from semantic_bundle import make_bundle, picture


@pytest.fixture
def loaded(monkeypatch):
  """What `load` is called with; a small model in the released one's place."""
  calls = []

  def load(source, dataset=None, **options):
    calls.append((source, dataset, {k: v for k, v in options.items() if v is not None}))
    return prediction.make_segmenter(make_bundle(scale=(64, 48)))

  monkeypatch.setattr(prediction, "load", load)
  return calls


def test_a_folder(loaded, tmp_path, capsys):
  for name in ("a.png", "day/b.png"):
    (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(30, 40)).save(tmp_path / "in" / name)
  call("predict", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
  assert loaded == [("afformer_tiny_camvid", None, {})]
  assert f"2 of 2 written to {tmp_path / 'out'}" in capsys.readouterr().out
  assert (tmp_path / "out" / "day" / "b_classes.png").is_file()


def test_flags_become_options(loaded, tmp_path, capsys):
  (tmp_path / "a.png").write_bytes(b"no picture")
  flags = ["--scale=64x48", "--exact_size", "--score_threshold=0.3", "--batch_size=2"]
  flags += ["--checkpoint=x.pth", "--dataset=ade20k", "--model=afformer_base"]
  with pytest.raises(SystemExit) as end:
    call("predict", f"--input={tmp_path / 'a.png'}", f"--output={tmp_path / 'out'}", *flags)
  assert end.value.code == 1
  options = {"scale": "64x48", "exact_size": True, "score_threshold": 0.3, "batch_size": 2}
  assert loaded == [("x.pth", "ade20k", {**options, "model": "afformer_base"})]
  printed = capsys.readouterr()
  assert printed.err.startswith("skipped: ") and "0 of 1 written" in printed.out


@pytest.mark.parametrize(
  "words, message",
  [
    ((), "--input and --output are needed"),
    (("--input=nowhere.png", "--output=out"), "nowhere.png does not exist; expected a picture"),
    (("--input=.", "--output=out", "more"), "unexpected argument 'more'"),
    (("--input=.", "--output=out", "--every=0"), "--every=0; expected 1 or more"),
    (("--input=.", "--output=out", "--score=1"), "score"),
  ],
)
def test_what_is_wrong_ends_in_one_line(loaded, words, message, capsys):
  with pytest.raises(SystemExit) as end:
    cli.execute("predict", list(words))
  assert end.value.code == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line.startswith("error: ") and message in line
