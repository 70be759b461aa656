"""Augmentations of clips: all frames are changed alike, and the sound has its own.

Each takes an example of `datasets.clips` and a generator, and leaves the one it was given alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from effseg_jax import imagenet
from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.transforms import (
  HorizontalFlip,
  PhotometricDistortion,
  Rng,
  Transform,
)

_FITS = ("stretch", "centre", "random")
# The sound has one channel and stays.
MIRRORED = (("frames", 2), ("masks", 2))
_PER_FRAME = ("frames", "log_mel", "masks", "frame_weight", "valid_frames")
_OFFSET = 0.01  # of the log-mel front-end, see `effseg_jax.input_pipeline.audio`


@dataclasses.dataclass(frozen=True)
class DrawFrames:
  """Trains on some of a clip's frames, each with its own second of sound.

  Frames of a clip are much alike, and the models see each by itself: the time is better spent on
  more clips. Of single-source clips, of which only the first frame has a mask, the others would be
  computed for nothing.

  Attributes:
    count: how many are drawn; those that have a mask come first.
  """

  count: int

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Keeps `count` frames in their order, and the sound, masks and weights that go with them.

    Raises:
      UserError: if the clip has fewer.
    """
    weight = example["frame_weight"]
    if self.count > len(weight):
      raise UserError(
        f"data.augment.frames is {self.count}; {example['name']} has {len(weight)}; expected that"
        " many at most, or 0: all."
      )
    order = rng.permutation(len(weight))
    masked_first = order[np.argsort(weight[order] == 0, kind="stable")]
    chosen = np.sort(masked_first[: self.count])
    return {**example, **{key: example[key][chosen] for key in _PER_FRAME}}


@dataclasses.dataclass(frozen=True)
class FitFrames:
  """Resizes frames and masks to one size.

  Attributes:
    size: rows and columns of the result.
    fit: `"stretch"` changes the ratio; `"centre"` and `"random"` resize the short side and cut a
      window out, at the middle or anywhere.
    ratio: range of a factor on the size before the window is cut out; what lies beyond the picture
      is unmasked.
  """

  size: tuple[int, int]
  fit: str = "stretch"
  ratio: tuple[float, float] = (1.0, 1.0)

  def __post_init__(self) -> None:
    if self.fit not in _FITS:
      raise UserError(
        f"data.augment.fit is {self.fit!r}; expected one of {', '.join(_FITS)}."
        f"{suggestion(self.fit, _FITS)}"
      )

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Frames bilinear, masks nearest."""
    frames, masks = example["frames"], example["masks"]
    if self.fit == "stretch":
      return {
        **example,
        "frames": resize_each(frames, self.size, Image.Resampling.BILINEAR),
        "masks": resize_each(masks, self.size, Image.Resampling.NEAREST),
      }
    rows, cols = frames.shape[1:3]
    factor = max(self.size[0] / rows, self.size[1] / cols) * rng.uniform(*self.ratio)
    scaled = max(round(rows * factor), 1), max(round(cols * factor), 1)
    frames = resize_each(frames, scaled, Image.Resampling.BILINEAR)
    masks = resize_each(masks, scaled, Image.Resampling.NEAREST)
    place = rng.random(2) if self.fit == "random" else (0.5, 0.5)
    return {
      **example,
      "frames": self._window(frames, place, imagenet.FILL),
      "masks": self._window(masks, place, 0),
    }

  def _window(self, pictures: np.ndarray, place: tuple[float, float], fill: object) -> np.ndarray:
    """Crops (or pads) rows and columns of (T, H, W, ...) at a relative place."""
    result = np.empty((len(pictures), *self.size, *pictures.shape[3:]), pictures.dtype)
    result[...] = fill
    source, target = [slice(None)], [slice(None)]
    for length, wanted, share in zip(pictures.shape[1:3], self.size, place, strict=True):
      spare, count = abs(length - wanted), min(length, wanted)
      begin = round(spare * share)
      source.append(slice(begin, begin + count) if length > wanted else slice(0, count))
      target.append(slice(0, count) if length > wanted else slice(begin, begin + count))
    result[tuple(target)] = pictures[tuple(source)]
    return result


@dataclasses.dataclass(frozen=True)
class DistortFrames:
  """A photometric distortion with the same draws for all frames of a clip.

  Attributes:
    distortion: of one picture.
  """

  distortion: PhotometricDistortion

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Changes the frames alone: they are distorted as one tall picture."""
    frames = example["frames"]
    tall = {"image": np.ascontiguousarray(frames).reshape(-1, *frames.shape[2:])}
    return {**example, "frames": self.distortion(tall, rng)["image"].reshape(frames.shape)}


@dataclasses.dataclass(frozen=True)
class SoundGain:
  """Makes the whole sound of a clip louder or softer.

  The offset inside the logarithm is respected: the result is the log-mel of the scaled waveform.

  Attributes:
    decibels: the gain is drawn from plus or minus this.
  """

  decibels: float

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Changes the log-mel patches alone; patches that pad a clip stay 0."""
    _require_patches(example, "gain")
    gain = 10 ** (rng.uniform(-self.decibels, self.decibels) / 20)
    energy = np.maximum(np.exp(example["log_mel"]) - _OFFSET, 0.0)
    louder = np.log(gain * energy + _OFFSET).astype(np.float32)
    heard = example["log_mel"].any(axis=(1, 2), keepdims=True)
    return {**example, "log_mel": np.where(heard, louder, example["log_mel"])}


@dataclasses.dataclass(frozen=True)
class MuteStripes:
  """Silences a stripe of bands and stripes of time (SpecAugment, Park et al. 2019).

  Attributes:
    bands: most mel bands muted, of 64.
    steps: most time steps muted, of 96.
  """

  bands: int
  steps: int

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Changes the log-mel patches alone: the same bands in all, and other steps in each."""
    _require_patches(example, "stripes")
    patches = example["log_mel"].copy()
    silence = np.float32(np.log(_OFFSET))
    width = int(rng.integers(0, self.bands + 1))
    begin = int(rng.integers(0, patches.shape[2] - width + 1))
    patches[:, :, begin : begin + width] = silence
    for patch in patches:
      length = int(rng.integers(0, self.steps + 1))
      begin = int(rng.integers(0, len(patch) - length + 1))
      patch[begin : begin + length] = silence
    heard = example["log_mel"].any(axis=(1, 2), keepdims=True)
    return {**example, "log_mel": np.where(heard, patches, example["log_mel"])}


@dataclasses.dataclass(frozen=True)
class ShiftPitch:
  """Moves the sound of a clip by whole mel bands, as if its source were smaller or larger.

  Without it a model recognises the recordings of its training by their exact pitch.

  Attributes:
    bands: the shift is drawn from plus or minus this many, of 64; the outermost band fills the gap.
  """

  bands: int

  def __call__(self, example: Example, rng: Rng) -> Example:
    """Changes the log-mel patches alone: all by the same shift; patches of padding stay 0."""
    _require_patches(example, "pitch")
    patches = example["log_mel"]
    shift = int(rng.integers(-self.bands, self.bands + 1))
    source = np.clip(np.arange(patches.shape[2]) - shift, 0, patches.shape[2] - 1)
    return {**example, "log_mel": patches[:, :, source]}


def _require_patches(example: Example, name: str) -> None:
  """Raises `UserError` if the sound of an example is embedded already."""
  if example["log_mel"].ndim != 3:
    raise UserError(
      f"data.augment.{name} changes sounds, and data.options.embeddings has none; set the one to 0"
      " or leave out the other."
    )


def audio_visual_transforms(
  *,
  size: tuple[int, int],
  frames: int = 0,
  fit: str = "stretch",
  ratio: tuple[float, float] = (1.0, 1.0),
  flip: float = 0.0,
  photometric: bool = False,
  gain: float = 0.0,
  pitch: int = 0,
  stripes: tuple[int, int] = (0, 0),
) -> list[Transform]:
  """The training transforms of audio-visual segmentation; the defaults change nothing but the size.

  Args:
    size: rows and columns of the result.
    frames: of a clip, see `DrawFrames`; 0: all.
    fit: of `FitFrames`; AVSBench stretches S4 and MS3 (which have the right size already) and cuts
      the centre out in AVSS.
    ratio: of `FitFrames`.
    flip: probability of `HorizontalFlip`.
    photometric: whether frames are distorted.
    gain: decibels of `SoundGain`; 0: none.
    pitch: mel bands of `ShiftPitch`; 0: none.
    stripes: bands and steps of `MuteStripes`; (0, 0): none.
  """
  return [
    *([DrawFrames(frames)] if frames else []),
    FitFrames(tuple(size), fit, tuple(ratio)),
    *([HorizontalFlip(flip, MIRRORED)] if flip else []),
    *([DistortFrames(PhotometricDistortion())] if photometric else []),
    *([SoundGain(gain)] if gain else []),
    *([ShiftPitch(pitch)] if pitch else []),
    *([MuteStripes(*stripes)] if any(stripes) else []),
  ]


def resize_each(pictures: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
  """Resizes each of (T, H, W, ...) uint8 pictures to (rows, cols), as Pillow does it."""
  if tuple(pictures.shape[1:3]) == tuple(size):
    return pictures
  return np.stack(
    [np.asarray(Image.fromarray(picture).resize(size[::-1], how)) for picture in pictures]
  )
