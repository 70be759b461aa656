"""Procedural clips with sound: audio-visual segmentation without a download.

In each clip two objects of different kinds move over a textured ground, and the sounds of one, both
or none of them are heard; in some clips the sound passes from one to the other. What sounds is to
be segmented. Both objects are always in the picture and nothing in it tells which one sounds: a
model that does not hear can do no better than a guess. A clip is a function of (seed, split, index)
alone.

Kinds: a drum (red disc, dull beats), a bell (yellow triangle, ringing partials), an engine (blue
box, a rough hum), a bird (green star, high chirps). Pitch, rhythm, loudness and shade vary.

Measured on `val` at 64x64: segmenting both objects in every frame, the best that is possible
without hearing, gives a mean Jaccard index of 0.57. A clip of five frames takes about 20 ms on one
CPU core, log-mel patches included.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio
from effseg_jax.input_pipeline.datasets import base, clips

KINDS = ("drum", "bell", "engine", "bird")
PALETTE = np.array(
  [(0, 0, 0), (230, 57, 70), (255, 183, 3), (69, 123, 157), (60, 160, 90)], np.uint8
)
_HUES = {"drum": 0.0, "bell": 0.14, "engine": 0.6, "bird": 0.36}
_LENGTHS = {"train": 1024, "val": 64, "test": 64}
# Who sounds in a clip, and how often: the first object, one after the other, both, nobody.
_PLANS = {"one": 0.5, "switch": 0.36, "both": 0.07, "none": 0.07}
_MIN_SIDE = 32
_RATE = audio.SAMPLE_RATE
# OpenCV takes polygons in fixed point; four bits of fraction draw smooth outlines.
_SHIFT = 4


@dataclasses.dataclass(frozen=True)
class SyntheticClips:
  """A split of the procedural clips.

  Attributes:
    split: `train`, `val` or `test`; no clip is in two of them.
    size: rows and columns of the frames.
    num_frames: T; one frame a second, as in AVSBench.
    semantic: whether masks distinguish the kinds (1 to 4) or only foreground (1).
    seed: another seed, other clips.
  """

  split: str
  size: tuple[int, int] = (64, 64)
  num_frames: int = 5
  semantic: bool = False
  seed: int = 0

  name = "synthetic_av"
  prediction_size = None

  @property
  def classes(self) -> tuple[str, ...]:
    """Background and kinds, or a single foreground class."""
    return ("background", *KINDS) if self.semantic else clips.SOUNDING

  @property
  def palette(self) -> np.ndarray:
    """Colours of the classes, uint8 (K, 3)."""
    return PALETTE if self.semantic else clips.SOUNDING_COLOUR

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.classes)

  def __len__(self) -> int:
    return _LENGTHS[self.split]

  def __getitem__(self, index: int) -> base.Example:
    """Draws a clip; the keys are those of `clips.ClipFiles`."""
    frames, masks = self._pictures(index)
    ones = np.ones(self.num_frames, np.float32)
    return {
      "frames": frames,
      "log_mel": _log_mel(self, int(index)),
      "masks": masks,
      "frame_weight": ones,
      "valid_frames": ones.copy(),
      "name": f"{self.split}_{index:04d}",
    }

  def clip(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames, sound and masks of a clip.

    Returns:
      frames uint8 (T, H, W, 3), waveform float32 (T * 16000,) and masks uint8 (T, H, W).
    """
    frames, masks = self._pictures(index)
    return frames, self.waveform(index), masks

  def waveform(self, index: int) -> np.ndarray:
    """The sound: float32 (T * 16000,)."""
    return _soundtrack(self._rng(index, 2), self._plan(index))

  def group(self, index: int) -> str:
    """Who sounds: `one`, `switch`, `both` or `none`."""
    return self._plan(index).name

  def prediction_path(self, index: int, frame: int) -> Path:
    """Where the prediction of a frame is written."""
    name = f"{self.split}_{index:04d}"
    return Path(name) / f"{name}_{frame}.png"

  def _pictures(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames and masks of a clip."""
    plan = self._plan(index)
    frames, kinds = _draw_frames(self._rng(index, 1), plan, self.size)
    heard = [[0, *(kind in second for kind in KINDS)] for second in plan.heard]
    audible = np.take_along_axis(np.array(heard, np.uint8), kinds.reshape(len(kinds), -1), axis=1)
    masks = kinds * audible.reshape(kinds.shape)
    return frames, masks if self.semantic else np.minimum(masks, 1)

  def _plan(self, index: int) -> _Plan:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return _make_plan(self._rng(index, 0), self.num_frames)

  def _rng(self, index: int, part: int) -> np.random.Generator:
    """Picture and sound draw from generators of their own: neither can betray the other."""
    entropy = (self.seed, tuple(_LENGTHS).index(self.split), int(index), part)
    return np.random.Generator(np.random.PCG64(entropy))


def open_split(
  root: str | Path | None,
  split: str,
  *,
  size: Sequence[int] = (64, 64),
  num_frames: int = 5,
  semantic: bool = False,
  seed: int = 0,
) -> SyntheticClips:
  """Opens `train` (1024 clips), `val` or `test` (64 each).

  Args:
    root: not used.
    split: of the data set.
    size: rows and columns, 32 at least.
    num_frames: of a clip.
    semantic: whether masks distinguish the kinds.
    seed: of all clips.
  """
  del root
  base.require_split(split, tuple(_LENGTHS), "synthetic_av")
  if len(size) != 2 or min(size) < _MIN_SIDE:
    raise UserError(
      f"data.options.size is {tuple(size)}; expected (rows, columns), each {_MIN_SIDE} at least."
    )
  if num_frames < 1:
    raise UserError(f"data.options.num_frames is {num_frames}; expected 1 at least.")
  return SyntheticClips(split, (int(size[0]), int(size[1])), num_frames, semantic, seed)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Who is in a clip and who is heard when.

  Attributes:
    name: of the plan.
    visible: two kinds, in drawing order.
    heard: per second, the kinds that sound.
  """

  name: str
  visible: tuple[str, str]
  heard: tuple[tuple[str, ...], ...]


def _make_plan(rng: np.random.Generator, num_frames: int) -> _Plan:
  first, second = (KINDS[k] for k in rng.permutation(len(KINDS))[:2])
  name = str(rng.choice(tuple(_PLANS), p=tuple(_PLANS.values())))
  if name == "switch" and num_frames > 1:
    turn = int(rng.integers(1, num_frames))
    heard = ((first,),) * turn + ((second,),) * (num_frames - turn)
  else:
    who = {"both": (first, second), "none": ()}.get(name, (first,))
    heard = (who,) * num_frames
  visible = (first, second) if rng.random() < 0.5 else (second, first)
  return _Plan(name, visible, heard)


# Half of an example's time goes into its sound, and augmentation leaves that alone: it is kept.
@functools.lru_cache(maxsize=1024)
def _log_mel(split: SyntheticClips, index: int) -> np.ndarray:
  """Patches of a clip, float32 (T, 96, 64), read-only."""
  patches = audio.fit_patches(audio.log_mel(split.waveform(index), _RATE), split.num_frames)
  patches.flags.writeable = False
  return patches


# Sound.


def _soundtrack(rng: np.random.Generator, plan: _Plan) -> np.ndarray:
  """The waveform of a clip, float32 in [-1, 1], one second for each frame."""
  seconds = len(plan.heard)
  total = np.zeros(seconds * _RATE, np.float32)
  for kind in plan.visible:
    on = np.array([float(kind in heard) for heard in plan.heard])
    loudness, voice = 0.12 * 10 ** rng.uniform(-0.25, 0.25), _VOICES[kind](rng, seconds)
    if on.any():
      # 20 ms from off to on, so that nothing clicks.
      turns = np.arange(1, seconds)[:, None] + np.array([-0.01, 0.01])
      values = np.stack([on[:-1], on[1:]], axis=1)
      time = np.arange(len(total), dtype=np.float32) / _RATE
      gate = np.interp(time, [0, *turns.ravel(), seconds], [on[0], *values.ravel(), on[-1]])
      total += (loudness * gate * voice).astype(np.float32)
  noise = 10 ** rng.uniform(-3.2, -2.6)
  total += noise * rng.standard_normal(len(total), np.float32)
  return np.clip(total, -1, 1)


def _beats(rng: np.random.Generator, seconds: int, rate: float) -> list[int]:
  """Samples at which events begin: `rate` a second, not quite regular."""
  count = math.ceil(seconds * rate) + 1
  times = (np.arange(count) + rng.uniform(-0.12, 0.12, count) + rng.random()) / rate - 1 / rate
  return [int(t * _RATE) for t in times if 0 <= t < seconds]


def _repeat(rng: np.random.Generator, seconds: int, rate: float, sound: np.ndarray) -> np.ndarray:
  """One sound again and again."""
  track = np.zeros(seconds * _RATE + len(sound))
  for begin in _beats(rng, seconds, rate):
    track[begin : begin + len(sound)] += sound * rng.uniform(0.7, 1.2)
  return track[: seconds * _RATE]


def _drum(rng: np.random.Generator, seconds: int) -> np.ndarray:
  """A roll of dull beats: low tones that fall and die away."""
  t = np.arange(int(0.2 * _RATE)) / _RATE
  beat = np.sin(2 * np.pi * rng.uniform(150, 230) * t * (1 - 0.5 * t)) * np.exp(-12 * t)
  return _repeat(rng, seconds, rng.uniform(6.0, 10.0), 1.6 * beat)


def _engine(rng: np.random.Generator, seconds: int) -> np.ndarray:
  """A rough hum: harmonics of a low tone, shaken."""
  t = np.arange(seconds * _RATE) / _RATE
  turns = rng.uniform(80, 110) * t + 0.12 * np.sin(2 * np.pi * rng.uniform(0.3, 0.9) * t)
  # One turn of the engine is computed once and looked up.
  circle = 2 * np.pi * np.arange(4096) / 4096
  turn = sum(np.sin(k * circle + rng.uniform(0, 6)) for k in range(4, 9))
  hum = turn[(turns * 4096).astype(np.int64) % 4096]
  return 0.5 * hum * (1 + 0.5 * np.sin(2 * np.pi * rng.uniform(14, 26) * t))


def _bell(rng: np.random.Generator, seconds: int) -> np.ndarray:
  """Ringing: partials that are no harmonics, and fade one after the other."""
  t = np.arange(int(0.8 * _RATE)) / _RATE
  pitch = rng.uniform(1000, 1300)
  partials = [(1.0, 1.0, 3), (1.51, 0.8, 4), (2.03, 0.6, 6)]
  sound = sum(
    share * np.exp(-decay * t) * np.sin(2 * np.pi * pitch * ratio * t + rng.uniform(0, 6))
    for ratio, share, decay in partials
  )
  return _repeat(rng, seconds, rng.uniform(2.0, 4.0), 0.9 * sound)


def _bird(rng: np.random.Generator, seconds: int) -> np.ndarray:
  """Chirps: high tones that rise or fall."""
  t = np.arange(int(rng.uniform(0.13, 0.17) * _RATE)) / _RATE
  low, sweep = rng.uniform(3200, 3800), rng.uniform(1500, 2500)
  progress = t / t[-1]
  if rng.random() < 0.5:
    progress = 1 - progress
  chirp = np.sin(2 * np.pi * np.cumsum(low + sweep * progress) / _RATE)
  return _repeat(rng, seconds, rng.uniform(6.0, 8.0), 1.8 * chirp * np.hanning(len(t)))


_VOICES = {"drum": _drum, "bell": _bell, "engine": _engine, "bird": _bird}


# Picture.


def _draw_frames(
  rng: np.random.Generator, plan: _Plan, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Frames uint8 (T, H, W, 3), and the kind at each pixel, uint8 (T, H, W), 0 for the ground."""
  ground = _ground(rng, size)
  things = [_Thing(rng, kind, size) for kind in plan.visible]
  paths = _paths(rng, [thing.radius for thing in things], len(plan.heard), size)
  frames, kinds = [], []
  for centres in paths:
    canvas, ids = ground.copy(), np.zeros(size, np.uint8)
    for thing, centre in zip(things, centres, strict=True):
      thing.draw(canvas, ids, centre)
    canvas += rng.standard_normal(canvas.shape, np.float32) * 3
    frames.append(np.clip(canvas, 0, 255).astype(np.uint8))
    kinds.append(ids)
  return np.stack(frames), np.stack(kinds)


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
  """A soft pattern of two pale colours, float32 (H, W, 3)."""
  cells = rng.standard_normal((7, 7), np.float32)
  pattern = cv2.resize(cells, size[::-1], interpolation=cv2.INTER_CUBIC)
  mix = 1 / (1 + np.exp(-1.5 * pattern))[..., None]
  pale = [_colour(rng, rng.random(), (0.05, 0.22), (0.35, 0.85)) for _ in range(2)]
  return (pale[0] * mix + pale[1] * (1 - mix)).astype(np.float32)


class _Thing:
  """An object of a kind, with a look of its own."""

  def __init__(self, rng: np.random.Generator, kind: str, size: tuple[int, int]):
    self.radius = min(size) * rng.uniform(0.17, 0.26)
    self._id = KINDS.index(kind) + 1
    self._colour = _colour(rng, _HUES[kind] + rng.uniform(-0.03, 0.03), (0.65, 1.0), (0.55, 1.0))
    self._outline = _outline(kind, rng.uniform(-0.3, 0.3)) * self.radius
    self._slope = rng.uniform(-1, 1, 2)

  def draw(self, canvas: np.ndarray, ids: np.ndarray, centre: np.ndarray) -> None:
    """Draws into the canvas, float32 (H, W, 3), and into the kinds, at (x, y)."""
    points = np.round((self._outline + centre) * (1 << _SHIFT)).astype(np.int32)
    cover = np.zeros(ids.shape, np.uint8)
    cv2.fillPoly(cover, [points], 255, cv2.LINE_AA, _SHIFT)
    y, x = np.mgrid[: ids.shape[0], : ids.shape[1]].astype(np.float32)
    shade = 1 + 0.2 * ((x - centre[0]) * self._slope[0] + (y - centre[1]) * self._slope[1]) / (
      self.radius
    )
    opacity = cover[..., None] / np.float32(255)
    canvas += (self._colour * shade[..., None] - canvas) * opacity
    ids[cover > 127] = self._id


def _outline(kind: str, turn: float) -> np.ndarray:
  """A polygon around (0, 0) with a radius of about 1, float64 (points, 2)."""
  if kind == "drum":
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    points = np.stack([np.cos(angles), 0.9 * np.sin(angles)], axis=1)
  elif kind == "bell":
    points = np.array([(0, -1.25), (1.1, 0.85), (-1.1, 0.85)])
  elif kind == "engine":
    points = np.array([(-1.1, -0.75), (1.1, -0.75), (1.1, 0.75), (-1.1, 0.75)])
  else:
    angles = np.arange(10) * np.pi / 5
    points = np.where(np.arange(10) % 2, 0.62, 1.3)[:, None] * np.stack(
      [np.sin(angles), -np.cos(angles)], axis=1
    )
  cos, sin = math.cos(turn), math.sin(turn)
  return points @ np.array([[cos, sin], [-sin, cos]])


def _paths(
  rng: np.random.Generator, radii: Sequence[float], num_frames: int, size: tuple[int, int]
) -> np.ndarray:
  """Where two objects are in each frame, float64 (T, 2, 2) as (x, y).

  Of a few straight ways the pair is taken that keeps the largest distance.
  """
  best, most = None, -math.inf
  bounds = np.array(size[::-1], float)
  for _ in range(8):
    ways = []
    for radius in radii:
      ends = rng.uniform(0.8 * radius, bounds - 0.8 * radius, (2, 2))
      ends[1] = ends[0] + 0.6 * (ends[1] - ends[0])
      share = np.linspace(0, 1, num_frames)[:, None]
      ways.append(ends[0] * (1 - share) + ends[1] * share)
    distance = np.linalg.norm(ways[0] - ways[1], axis=1).min()
    if distance > most:
      best, most = np.stack(ways, axis=1), distance
    if distance > 1.1 * sum(radii):
      break
  return best


def _colour(
  rng: np.random.Generator,
  hue: float,
  saturation: tuple[float, float],
  value: tuple[float, float],
) -> np.ndarray:
  """A random RGB colour float32 (3,) in 0..255 of a hue in turns of the colour circle."""
  hsv = np.array([[[360 * (hue % 1), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(3) * 255
