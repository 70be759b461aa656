"""Videos as phones, recorders and editors leave them: upright, on one clock, in bounded memory."""

from __future__ import annotations

import struct
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import clip_reader, video_streams

SAMPLE_RATE = 16_000
SIZE = (48, 64)


def write(
  path, frames=12, rate=4, *, sound=3.0, times=None, begins=(0.0, 0.0), size=SIZE, colour=None
):
  """A clip whose left half is bright, and whose sound is louder each second."""
  kinds = {".ts": "mpegts", ".mkv": "matroska", ".mp4": "mp4"}
  with av.open(str(path), "w", format=kinds[path.suffix]) as container:
    video = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
    video.width, video.height, video.pix_fmt = size[1], size[0], "yuv420p"
    video.codec_context.time_base = Fraction(1, 1000)
    if sound is not None:
      track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
    for k in range(frames):
      picture = np.zeros((*size, 3), np.uint8)
      picture[:, : size[1] // 2] = 250 if colour is None else colour
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      if colour is not None:
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.colorspace = 1
      frame.time_base = Fraction(1, 1000)
      frame.pts = round(1000 * ((k / rate if times is None else times[k]) + begins[0]))
      container.mux(video.encode(frame))
    container.mux(video.encode(None))
    if sound is not None:
      t = np.arange(round(SAMPLE_RATE * sound))
      wave = (np.sin(0.3 * t) * 0.2 * (1 + t // SAMPLE_RATE)).clip(-1, 1).astype(np.float32)
      for k in range(0, len(wave), 1024):
        piece = np.ascontiguousarray(wave[None, k : k + 1024])
        piece = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        piece.sample_rate, piece.time_base = SAMPLE_RATE, Fraction(1, SAMPLE_RATE)
        piece.pts = k + round(begins[1] * SAMPLE_RATE)
        container.mux(track.encode(piece))
      container.mux(track.encode(None))
  return path


def read(path, sound=True):
  """Frames, samples and loudness of each second; times of the frames; notes."""
  clip, notes = clip_reader.open_clip(path, sound=sound), []
  seconds = list(clip.seconds(notes))
  counts = [(len(s.frames), len(s.waveform)) for s in seconds]
  loud = [float(np.sqrt(np.mean(s.waveform**2))) if len(s.waveform) else 0.0 for s in seconds]
  for second in seconds:
    assert second.frames.shape[1:] == (*clip.size, 3) and len(second.times) == len(second.frames)
  return counts, loud, np.concatenate([s.times for s in seconds]), notes


def test_phone_videos_are_upright(tmp_path):
  path = write(tmp_path / "r.mp4")
  data, one = bytearray(path.read_bytes()), 0x10000
  straight = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 0x40000000)
  at = data.find(straight, data.find(b"tkhd"))
  turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, one * SIZE[0], 0, 0x40000000)
  data[at : at + 36] = turned
  path.write_bytes(data)
  clip = clip_reader.open_clip(path)
  assert clip.size == (64, 48)
  frame = next(clip.seconds()).frames[0]
  # A quarter clockwise: what was left is above.
  assert frame[:28].mean() > 200 and frame[36:].mean() < 40


def test_frames_keep_their_times(tmp_path):
  times = [k / 10 if k < 10 else k - 9 for k in range(13)]
  counts, _, found, _ = read(write(tmp_path / "v.mp4", 13, times=times, sound=4.0))
  assert [frames for frames, _ in counts] == [10, 1, 1, 1]
  np.testing.assert_allclose(found, times, atol=2e-3)


def test_streams_that_begin_later(tmp_path):
  plain = read(write(tmp_path / "a.mkv"))
  late = read(write(tmp_path / "b.mkv", begins=(5.0, 5.0)))
  assert plain[0] == late[0] == [(4, SAMPLE_RATE)] * 3
  np.testing.assert_allclose(late[1], plain[1], atol=1e-3)
  np.testing.assert_allclose(late[2], plain[2], atol=2e-3)
  assert late[3] == []
  apart = read(write(tmp_path / "c.mkv", 20, begins=(5.0, 7.0)))
  assert apart[0] == [(4, SAMPLE_RATE)] * 5
  assert apart[1][:2] == pytest.approx([0, 0], abs=0.01)
  np.testing.assert_allclose(apart[1][2:], plain[1], atol=0.01)


def test_sound_that_is_shorter_or_longer(tmp_path):
  counts, _, times, notes = read(write(tmp_path / "s.mp4", 40, sound=1.0))
  assert [frames for frames, _ in counts] == [4] * 10 and len(times) == 40
  assert counts[0][1] == SAMPLE_RATE and counts[3][1] == 0 and notes == []
  counts, *_ = read(write(tmp_path / "l.mp4", 4, sound=9.0))
  assert counts[0] == (4, SAMPLE_RATE)


def test_memory_stays_bounded_where_the_sound_ends(tmp_path):
  """Frames do not wait for sound that never comes."""
  clip = clip_reader.open_clip(write(tmp_path / "s.mkv", 240, 4, sound=1.0))
  kept = video_streams._Waiting.cut
  waiting = []

  def cut(self, second):
    waiting.append(len(self._frames))
    return kept(self, second)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(video_streams._Waiting, "cut", cut)
    assert sum(len(second.frames) for second in clip.seconds()) == 240
  assert max(waiting) < 60


def test_a_video_without_sound(tmp_path):
  path = write(tmp_path / "m.mp4", sound=None)
  with pytest.raises(UserError, match=r"m\.mp4 has no sound; expected a video with sound"):
    clip_reader.open_clip(path)
  counts, *_ = read(path, sound=False)
  assert counts == [(4, 0)] * 3


def test_a_truncated_recording(tmp_path):
  path = write(tmp_path / "t.mkv", 40, sound=10.0)
  path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
  counts, _, times, notes = read(path)
  assert 5 <= len(counts) < 10 and len(times) > 18
  (note,) = notes
  assert note.startswith("the file ends at ") and note.endswith(" of 10.1 s")
  path = write(tmp_path / "t.mp4")
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(UserError, match=r"t\.mp4 cannot be opened"):
    clip_reader.open_clip(path)


def test_recordings_that_were_put_together(tmp_path):
  """The clock starts anew and the size changes: all is read, at the first size."""
  parts = write(tmp_path / "x.ts"), write(tmp_path / "y.ts", size=(64, 48))
  joined = tmp_path / "c.ts"
  joined.write_bytes(b"".join(part.read_bytes() for part in parts))
  counts, _, times, _ = read(joined)
  assert sum(frames for frames, _ in counts) == 24 and len(counts) == 6
  assert (np.diff(times) > 0).all() and times[-1] == pytest.approx(5.8, abs=0.1)


def test_a_cover_picture_is_no_video(tmp_path):
  path = write(tmp_path / "a.mp4")
  covered = tmp_path / "c.mp4"
  with av.open(str(path)) as source, av.open(str(covered), "w") as container:
    cover = container.add_stream("mjpeg", rate=1)
    cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
    cover.disposition = av.stream.Disposition.attached_pic
    streams = {s.index: container.add_stream_from_template(s) for s in source.streams}
    still = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
    container.mux([*cover.encode(still), *cover.encode(None)])
    for packet in source.demux():
      if packet.dts is not None:
        packet.stream = streams[packet.stream.index]
        container.mux(packet)
  with av.open(str(covered)) as container:
    videos = sorted(container.streams.video, key=video_streams._is_cover, reverse=True)
    assert [video_streams._is_cover(stream) for stream in videos] == [True, False]
    cover_first = SimpleNamespace(streams=SimpleNamespace(video=videos, audio=[]))
    assert video_streams._streams(cover_first)[0] is videos[1]
  assert clip_reader.open_clip(covered).size == SIZE
  assert [frames for frames, _ in read(covered)[0]] == [4, 4, 4]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255)])
def test_colours_of_high_definition(tmp_path, colour):
  clip = clip_reader.open_clip(
    write(tmp_path / "b.mp4", 1, size=(720, 96), colour=colour, sound=None), sound=False
  )
  found = next(clip.seconds()).frames[0, 360, 20]
  assert np.abs(found.astype(int) - colour).max() <= 4


@pytest.mark.parametrize("count", [1, 3, 5, 7, 12])
def test_frames_of_a_folder_are_spread_over_the_sound(tmp_path, count):
  for k in range(count):
    Image.fromarray(np.full((32, 32, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
  wave = np.repeat(np.arange(5) / 10, SAMPLE_RATE).astype(np.float32)
  soundfile.write(tmp_path / "s.wav", wave, SAMPLE_RATE)
  (tmp_path / "._0.png").write_bytes(b"shadow")
  clip = clip_reader.open_clip(tmp_path)
  assert clip.rate == Fraction(count, 5) and clip.duration == 5
  seconds = list(clip.seconds())
  times = np.concatenate([second.times for second in seconds])
  np.testing.assert_allclose(times, 5 * np.arange(count) / count)
  assert [int(f[0, 0, 0]) for s in seconds for f in s.frames] == list(range(count))
  for k, second in enumerate(seconds):
    assert ((second.times >= k) & (second.times < k + 1)).all()
    np.testing.assert_allclose(second.waveform, k / 10, atol=1e-4)
  assert len(seconds) == 5
