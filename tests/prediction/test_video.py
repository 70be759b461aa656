"""Videos through models for pictures: times and sound stay, ids stay with their objects."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from semantic_bundle import PALETTE, make_bundle, picture

from effseg_jax.errors import UserError
from effseg_jax.prediction import make_segmenter
from effseg_jax.prediction.clip_writer import ClipWriter
from effseg_jax.prediction.files import predict
from effseg_jax.prediction.results import Segment, UniversalResult
from effseg_jax.prediction.tracking import Tracker
from effseg_jax.prediction.video import name_of_url, stream_video

SIZE = (48, 64)
TIMES = (0.0, 0.1, 0.2, 0.5, 1.0, 1.4, 2.2, 2.3)


@pytest.fixture(scope="module")
def segment():
  return make_segmenter(make_bundle(scale=SIZE[::-1]))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
  path = tmp_path_factory.mktemp("video") / "street.mp4"
  sound = {"sample_rate": 16_000, "channels": 1}
  with ClipWriter(path, Fraction(4), SIZE, **sound) as writer:
    frames = np.stack([picture(*SIZE, k) for k in range(len(TIMES))])
    wave = np.sin(np.arange(40_000) / 5).astype(np.float32) * 0.3
    writer.add(frames, wave, TIMES)
  return path


def opened(path):
  """Times of the frames, frames, and samples of sound."""
  with av.open(str(path)) as container:
    frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
  with av.open(str(path)) as container:
    samples = sum(frame.samples for frame in container.decode(audio=0))
  return [time for time, _ in frames], [frame for _, frame in frames], samples


def test_an_overlay_has_the_times_and_the_sound(segment, video, tmp_path):
  lines = []
  counts = predict(segment, video, tmp_path, report=lines.append, video={"masks": True})
  assert counts == (1, 0) and lines[0].startswith("street.mp4: 8 frames in ")
  times, frames, samples = opened(tmp_path / "street_overlay.mp4")
  np.testing.assert_allclose(times, TIMES, atol=2e-3)
  assert frames[0].shape == (*SIZE, 3) and samples == pytest.approx(40_000, abs=2048)
  masks = sorted((tmp_path / "street_masks").iterdir())
  assert [path.name for path in masks] == [f"{k:06d}.png" for k in range(8)]
  _, originals, _ = opened(video)
  for path, original in zip(masks, originals, strict=True):
    with Image.open(path) as mask:
      assert tuple(mask.getpalette()[:9]) == sum(PALETTE, ())
      found = np.asarray(mask)
    assert (found == segment(original).class_map).mean() > 0.98  # colours are decoded a bit apart
  with pytest.raises(UserError, match="hold nothing to read"):  # overlay and masks are results
    predict(segment, tmp_path, tmp_path / "again")


def test_a_part_and_every_other_frame(segment, video):
  results = list(segment.stream(video, every=2))
  np.testing.assert_allclose([r.time for r in results], TIMES[::2], atol=2e-3)
  results = list(stream_video(segment, video, start=0.4, stop=2.0))
  np.testing.assert_allclose([r.time for r in results], [0.1, 0.6, 1.0], atol=2e-3)
  assert results[0].result.class_map.shape == SIZE


def test_a_part_without_frames_leaves_nothing(segment, video, tmp_path):
  complaints = []
  counts = predict(
    segment, video, tmp_path / "out", complain=complaints.append, video={"start": 50.0}
  )
  assert counts == (0, 1) and "has no frame between --start and --stop" in complaints[0]
  assert not list((tmp_path / "out").iterdir())
  with pytest.raises(UserError, match=r"--start=2 --stop=1\.0; expected seconds"):
    predict(segment, video, tmp_path, video={"start": 2.0, "stop": 1.0})


def test_names_of_streams():
  assert name_of_url("rtsp://camera.local:554/a b?x=1") == "camera.local_554_a_b_x_1"


def result(boxes, labels):
  """Segments that are boxes, numbered in the order given."""
  ids = np.zeros((40, 60), np.int32)
  segments = []
  for k, (x, label) in enumerate(zip(boxes, labels, strict=True), start=1):
    ids[10:20, x : x + 10] = k
    segments.append((k, label, (x, 10, x + 10, 20)))
  return UniversalResult(
    image=np.zeros((40, 60, 3), np.uint8),
    segments=tuple(
      Segment(k, label, "ab"[label], label == 0, 1.0, 100, box, 0, ids)
      for k, label, box in segments
    ),
    panoptic_map=ids,
    instances=(),
    class_map=None,
    classes=("a", "b"),
    palette=((255, 0, 0), (0, 255, 0)),
    score_threshold=0.5,
    best=None,
    kinds=("panoptic",),
  )


def test_ids_stay_with_objects():
  track = Tracker()
  ids = lambda found: [(s.id, s.box[0]) for s in found.segments]  # noqa: E731
  first = track(result([0, 20], [0, 0]))
  assert ids(first) == [(1, 0), (2, 20)]
  moved = track(result([22, 2], [0, 0]))  # found in another order
  assert ids(moved) == [(2, 22), (1, 2)]
  for segment in moved.segments:
    assert (moved.panoptic_map[segment.mask] == segment.id).all() and segment.mask.sum() == 100
  assert [s.number for s in moved.segments] == [1, 0]
  colour = lambda found, x: found.overlay(names=False)[15, x + 5].tolist()  # noqa: E731
  assert colour(moved, 2) == colour(first, 0) != colour(first, 20)
  assert ids(track(result([2], [0]))) == [(1, 2)]  # one is hidden
  assert ids(track(result([2, 23], [0, 0]))) == [(1, 2), (2, 23)]  # and is known again
  assert ids(track(result([2, 23], [1, 0]))) == [(3, 2), (2, 23)]  # another class
  assert ids(track(result([45, 23], [1, 0]))) == [(3, 45), (2, 23)]  # background has one id
  assert ids(track(result([45, 40], [1, 0]))) == [(3, 45), (4, 40)]  # too far away
