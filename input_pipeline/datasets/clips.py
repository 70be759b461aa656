"""Common parts of audio-visual data sets of files: a clip is frames, masks and a sound file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import audio, codecs
from effseg_jax.input_pipeline.datasets import base

# Of binary masks, the only class, and a colour that few things have.
SOUNDING = ("sounding",)
SOUNDING_COLOUR = np.array([(255, 0, 150)], np.uint8)
EMBEDDING = 128  # numbers that VGGish makes of a second


@dataclasses.dataclass(frozen=True)
class Clip:
  """The files of a clip.

  Attributes:
    name: of the clip.
    group: by which results are also listed (a category, a source), or "".
    folder: of its predictions in the official format.
    frames: pictures in their order; only the last ones may be missing.
    masks: per frame; None where the frame is not supervised.
    sound: any rate, any number of channels.
  """

  name: str
  group: str
  folder: str
  frames: tuple[Path, ...]
  masks: tuple[Path | None, ...]
  sound: Path


@dataclasses.dataclass(frozen=True)
class ClipFiles:
  """A split of clips.

  Attributes:
    name: of the data set.
    split: of it.
    classes: name per class id; a single one means masks of 0 and 1.
    palette: uint8, RGB per class id.
    clips: in the order of the metadata.
    num_frames: T, of every example.
    read_mask: path -> class ids uint8 (H, W).
    padding: continuation of a clip that is shorter than T: "repeat", its last frame and its
      last patch of sound, unsupervised; or "zeros".
    prediction_size: (rows, cols) of the official prediction pictures; None: as evaluated.
    embeddings: a folder of effseg embed_audio, read in the place of the sounds; or None.
  """

  name: str
  split: str
  classes: tuple[str, ...]
  palette: np.ndarray
  clips: tuple[Clip, ...]
  num_frames: int
  read_mask: Callable[[Path], np.ndarray]
  padding: str
  prediction_size: tuple[int, int] | None = None
  embeddings: Path | None = None

  @property
  def num_classes(self) -> int:
    """Number of classes, the background included where there is more than one."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self.clips)

  def __getitem__(self, index: int) -> base.Example:
    """Reads a clip.

    Returns:
      `frames` uint8 (T, H, W, 3); `log_mel` float32 (T, 96, 64), or stored embeddings (T, 128) in
      its place; `masks` uint8 (T, H, W), class ids
      and 0 where there is no mask; `frame_weight` float32 (T,), 1 where there is one;
      `valid_frames` float32 (T,), 0 for the zeros that continue a short clip; `name`.

    Raises:
      UserError: for a file that is missing or broken, or sizes that differ within the clip.
    """
    clip = self.clips[index]
    paths = _existing(clip.frames)
    pictures = [codecs.read_image(path) for path in paths]
    size = pictures[0].shape[:2]
    frames = np.zeros((self.num_frames, *size, 3), np.uint8)
    masks = np.zeros((self.num_frames, *size), np.uint8)
    frame_weight, valid_frames = np.zeros((2, self.num_frames), np.float32)
    for k, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
      _check_size(path, picture.shape[:2], paths[0], size)
      frames[k], valid_frames[k] = picture, 1.0
      if (mask_path := clip.masks[k]) is not None:
        mask = self.read_mask(mask_path)
        _check_size(mask_path, mask.shape, path, size)
        masks[k], frame_weight[k] = mask, 1.0
    if self.padding == "repeat":
      frames[len(paths) :], valid_frames[:] = pictures[-1], 1.0
    return {
      "frames": frames,
      "log_mel": self.patches(index) if self.embeddings is None else self._embeddings(index),
      "masks": masks,
      "frame_weight": frame_weight,
      "valid_frames": valid_frames,
      "name": clip.name,
    }

  def patches(self, index: int) -> np.ndarray:
    """The log-mel patches of a clip's sound, float32 (T, 96, 64)."""
    patches = audio.log_mel(*audio.read_waveform(self.clips[index].sound))
    return audio.fit_patches(patches, self.num_frames, self.padding)

  def embedding_path(self, index: int, folder: str | Path) -> Path:
    """Where a folder of embeddings has those of a clip."""
    return Path(folder) / self.split / f"{self.clips[index].folder}.npy"

  def _embeddings(self, index: int) -> np.ndarray:
    path = self.embedding_path(index, self.embeddings)
    expected = (self.num_frames, EMBEDDING)
    try:
      found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
      raise UserError(
        f"{path} is missing; make it with effseg embed_audio --output={self.embeddings}."
      ) from None
    except (ValueError, OSError, EOFError) as error:
      raise UserError(f"{path} cannot be read ({error}); delete it and make it anew.") from None
    if found.shape != expected or found.dtype != np.float32:
      raise UserError(f"{path} has {found.dtype} {found.shape}; expected float32 {expected}.")
    return found

  def group(self, index: int) -> str:
    """The group by which results of a clip are also listed, or ""."""
    return self.clips[index].group

  def prediction_path(self, index: int, frame: int) -> Path:
    """Where the official format has the prediction of a frame, below its folder."""
    clip = self.clips[index]
    return Path(clip.folder) / f"{clip.name}_{frame}.png"


def require_sounds(found: tuple[Clip, ...], name: str) -> None:
  """Raises `UserError` for the first clip of the metadata that has no sound file."""
  missing = [clip for clip in found if not clip.sound.is_file()]
  if missing:
    raise UserError(
      f"{name}: {len(missing)} of {len(found)} clips in the metadata have no sound; the first is"
      f" {missing[0].name}, for which {missing[0].sound} is missing."
    )


def read_binary_mask(path: Path) -> np.ndarray:
  """Reads a mask: every pixel that is not black is foreground.

  Official masks come as 1-bit, grey and palette pictures whose white is 1 or 255.

  Returns:
    uint8 (H, W), 0 and 1.

  Raises:
    UserError: if the file is missing or cannot be decoded.
  """
  if not path.is_file():
    raise UserError(f"{path} is missing; expected the mask of a frame.")
  try:
    with Image.open(path) as picture:
      grey = np.asarray(picture.convert("L"))
  except (UnidentifiedImageError, OSError, SyntaxError) as error:
    raise UserError(f"{path} cannot be decoded ({error}); expected a PNG mask.") from None
  return (grey > 0).astype(np.uint8)


def voc_palette(num_classes: int) -> np.ndarray:
  """The colours of PASCAL VOC: the bits of the class id, dealt to red, green and blue in turn.

  Returns:
    uint8 (num_classes, 3); class 0 is black.
  """
  ids = np.arange(num_classes)[:, None]
  channel = np.arange(3)[None, :]
  colours = np.zeros((num_classes, 3), np.int64)
  for place in range(8):
    colours |= (ids >> (3 * place + channel) & 1) << (7 - place)
  return colours.astype(np.uint8)


def colours_to_ids(picture: np.ndarray, palette: np.ndarray, path: Path) -> np.ndarray:
  """Class ids of a colour mask.

  A stray pixel of another colour is background, as in the reference.

  Args:
    picture: uint8 (H, W, 3).
    palette: uint8 (K, 3).
    path: for the message.

  Returns:
    uint8 (H, W).

  Raises:
    UserError: if more than a hundredth of the pixels have colours that are no class's.
  """
  codes = _codes(palette)
  order = np.argsort(codes)
  found = _codes(picture)
  place = np.minimum(np.searchsorted(codes[order], found), len(codes) - 1)
  ids = order[place]
  stray = codes[ids] != found
  if np.mean(stray) > 0.01:
    colour = picture[stray][0]
    raise UserError(
      f"{path} has the colour {tuple(int(v) for v in colour)}, which is none of the"
      f" {len(palette)} classes'; expected the colours of PASCAL VOC in the order of"
      " label2idx.json."
    )
  return np.where(stray, 0, ids).astype(np.uint8)


def _codes(colours: np.ndarray) -> np.ndarray:
  wide = colours.astype(np.int32)
  return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _existing(paths: tuple[Path, ...]) -> list[Path]:
  """The frames up to the last one that exists; all before it must."""
  present = [path.is_file() for path in paths]
  count = max((k + 1 for k, here in enumerate(present) if here), default=0)
  missing = [path for path, here in zip(paths[: max(count, 1)], present, strict=False) if not here]
  if missing:
    raise UserError(
      f"{missing[0]} is missing; expected {len(paths)} frames, {paths[-1].name} last."
    )
  return list(paths[:count])


def _check_size(path: Path, size: tuple[int, ...], other: Path, expected: tuple[int, ...]) -> None:
  if tuple(size) != tuple(expected):
    raise UserError(
      f"{path} is {size[0]}x{size[1]} and {other} is {expected[0]}x{expected[1]}; expected the same"
      " size within a clip."
    )
