"""From folders to folders: subfolders are mirrored, broken files reported, own results left out."""

import numpy as np
import pytest
from PIL import Image
from semantic_bundle import make_bundle, picture

from effseg_jax.errors import UserError
from effseg_jax.prediction import make_segmenter
from effseg_jax.prediction.files import predict


@pytest.fixture(scope="module")
def segment():
  return make_segmenter(make_bundle(scale=(64, 48)))


def save(path, seed=0, size=(30, 40)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(picture(*size, seed)).save(path)


def names(folder):
  return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def run(segment, source, output, **options):
  """Counts, reported lines and complaints."""
  lines, complaints = [], []
  counts = predict(
    segment, source, output, report=lines.append, complain=complaints.append, **options
  )
  return counts, lines, complaints


def test_a_single_picture(segment, tmp_path):
  save(tmp_path / "Übung 1 (2)#%ä.v1.JPG")
  counts, lines, complaints = run(segment, tmp_path / "Übung 1 (2)#%ä.v1.JPG", tmp_path / "out")
  assert counts == (1, 0) and not complaints
  assert lines[0].startswith("Übung 1 (2)#%ä.v1.JPG: ") and lines[0].endswith(" ms")
  assert names(tmp_path / "out") == [
    "Übung 1 (2)#%ä.v1_classes.png",
    "Übung 1 (2)#%ä.v1_overlay.png",
  ]


def test_subfolders_are_mirrored(segment, tmp_path):
  for k, name in enumerate(("a.png", "day1/a.jpg", "day1/b.png", "day2/a.jpg", "day2/a.png")):
    save(tmp_path / "in" / name, k)
  for hidden in ("._a.png", ".thumbs/a.png", "__MACOSX/a.png"):
    save(tmp_path / "in" / "day1" / hidden)
  (tmp_path / "in" / "notes.txt").write_text("no picture")
  (tmp_path / "linked").symlink_to(tmp_path / "in" / "day1")
  (tmp_path / "in" / "day3").symlink_to(tmp_path / "in", target_is_directory=True)
  counts, lines, complaints = run(segment, tmp_path / "in", tmp_path / "out")
  assert counts == (5, 0) and not complaints and len(lines) == 5
  stems = ["a", "day1/a", "day1/b", "day2/a.jpg", "day2/a.png"]
  expected = [f"{stem}{end}" for stem in stems for end in ("_classes.png", "_overlay.png")]
  assert names(tmp_path / "out") == sorted(expected)
  found = np.asarray(Image.open(tmp_path / "out" / "day1" / "b_classes.png"))
  np.testing.assert_array_equal(found, segment(tmp_path / "in" / "day1" / "b.png").class_map)
  assert run(segment, tmp_path / "linked", tmp_path / "out2")[0] == (2, 0)


def test_own_results_are_no_inputs(segment, tmp_path):
  for k in range(3):
    save(tmp_path / f"{k}.png", k)
  for _ in range(2):
    counts, lines, _ = run(segment, tmp_path, tmp_path)
    assert counts == (3, 0)
  assert "6 results of an earlier prediction" in lines[0]
  assert len(names(tmp_path)) == 9
  for k in range(3):
    (tmp_path / f"{k}.png").unlink()
  with pytest.raises(UserError, match=r"hold nothing to read \(6 results of an earlier predic"):
    run(segment, tmp_path, tmp_path)
  counts, *_ = run(segment, tmp_path / "0_overlay.png", tmp_path / "again")  # asked for by name
  assert counts == (1, 0)


def test_what_cannot_be_read_is_left_out(segment, tmp_path):
  save(tmp_path / "in" / "a.png")
  save(tmp_path / "in" / "c.png")
  (tmp_path / "in" / "b.png").write_bytes(b"no picture")
  (tmp_path / "in" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
  counts, lines, complaints = run(segment, tmp_path / "in", tmp_path / "out")
  assert counts == (2, 2) and len(lines) == 2 and len(complaints) == 2
  assert all(line.startswith("skipped: ") and "\n" not in line for line in complaints)
  assert len(names(tmp_path / "out")) == 4


def test_folders_that_are_none(segment, tmp_path):
  with pytest.raises(UserError, match=r"holds? nothing to read; expected a picture"):
    run(segment, tmp_path, tmp_path / "out")
  with pytest.raises(UserError, match="does not exist; expected a picture"):
    run(segment, tmp_path / "x.png", tmp_path / "out")
  save(tmp_path / "a.png")
  with pytest.raises(UserError, match=r"a\.png is a file; expected a folder"):
    run(segment, tmp_path / "a.png", tmp_path / "a.png")
  with pytest.raises(UserError, match="--every=0; expected 1 or more"):
    run(segment, tmp_path / "a.png", tmp_path / "out", video={"every": 0})
