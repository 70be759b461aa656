"""AVSBench in its official layouts: single source (S4), multiple sources (MS3), semantic (AVSS).

Log-mel patches are computed from the sound files; the official `.pkl` files hold the same numbers
as pickles, which are not read. With `embeddings`, a folder written by `effseg embed_audio`, the
embeddings of a frozen audio backbone are read instead of the sounds.
"""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import base, clips

S4_TREE = """  s4_meta_data.csv     name, start, category, split
  s4_data/visual_frames/<split>/<category>/<name>/<name>_{1..5}.png
  s4_data/gt_masks/<split>/<category>/<name>/<name>_{1..5}.png     train: only _1
  s4_data/audio_wav/<split>/<category>/<name>.wav
(the folder itself, or the one with Single-source in it)"""
MS3_TREE = """  ms3_meta_data.csv    video, split
  ms3_data/visual_frames/<video>/<video>.mp4_{1..5}.png
  ms3_data/gt_masks/<split>/<video>/<video>_{1..5}.png
  ms3_data/audio_wav/<split>/<video>.wav
(the folder itself, or the one with Multi-sources in it)"""
AVSS_TREE = """  metadata.csv         vid, uid, s_min, s_sec, a_obj, split, label
  label2idx.json       class name -> number
  {v1s,v1m,v2}/<uid>/frames/{0..}.jpg       5 (v1s, v1m) or 10 (v2)
  {v1s,v1m,v2}/<uid>/labels_rgb/{0..}.png   or labels_semantic/; train v1s: only 0.png
  {v1s,v1m,v2}/<uid>/audio.wav
(the folder itself, or the one with AVSS in it)"""

_SPLITS = ("train", "val", "test")
_FRAMES = 5
_MOST_FRAMES = 10
# Frames of a clip by its source: v1s and v1m are the clips of S4 and MS3 again.
_SOURCES = {"v1s": 5, "v1m": 5, "v2": 10}

# Those of `avss` are in its own files.
FIXED_CLASSES = {name: (clips.SOUNDING, clips.SOUNDING_COLOUR) for name in ("s4", "ms3")}


def open_s4(root: str | Path | None, split: str, embeddings: str | None = None) -> clips.ClipFiles:
  """Opens `train`, `val` or `test` of the single-source subset.

  In `train` only the first frame of a clip has a mask.
  """
  folder = _root(root, "s4", split, probe="s4_meta_data.csv", inner="Single-source", tree=S4_TREE)
  rows = _read_table(folder / "s4_meta_data.csv", 4)

  def clip(name: str, category: str) -> clips.Clip:
    frames, masks = (
      folder / "s4_data" / kind / split / category / name for kind in ("visual_frames", "gt_masks")
    )
    supervised = 1 if split == "train" else _FRAMES
    return clips.Clip(
      name,
      category,
      f"{category}/{name}",
      tuple(frames / f"{name}_{k + 1}.png" for k in range(_FRAMES)),
      tuple(masks / f"{name}_{k + 1}.png" if k < supervised else None for k in range(_FRAMES)),
      folder / "s4_data" / "audio_wav" / split / category / f"{name}.wav",
    )

  found = tuple(clip(row[0], row[2]) for row in rows if row[3] == split)
  return _binary("s4", split, found, folder, embeddings)


def open_ms3(root: str | Path | None, split: str, embeddings: str | None = None) -> clips.ClipFiles:
  """Opens `train`, `val` or `test` of the multi-source subset; every frame has a mask."""
  folder = _root(
    root, "ms3", split, probe="ms3_meta_data.csv", inner="Multi-sources", tree=MS3_TREE
  )
  rows = _read_table(folder / "ms3_meta_data.csv", 2)

  def clip(name: str) -> clips.Clip:
    frames = folder / "ms3_data" / "visual_frames" / name
    masks = folder / "ms3_data" / "gt_masks" / split / name
    return clips.Clip(
      name,
      "",
      name,
      tuple(frames / f"{name}.mp4_{k + 1}.png" for k in range(_FRAMES)),
      tuple(masks / f"{name}_{k + 1}.png" for k in range(_FRAMES)),
      folder / "ms3_data" / "audio_wav" / split / f"{name}.wav",
    )

  found = tuple(clip(row[0]) for row in rows if row[1] == split)
  return _binary("ms3", split, found, folder, embeddings)


def open_avss(
  root: str | Path | None, split: str, embeddings: str | None = None
) -> clips.ClipFiles:
  """Opens `train`, `val` or `test` of the semantic subset.

  Every clip has ten frames; those of five are continued with zeros that do not count in the loss.
  In `train` the single-source clips (v1s) have a label for their first frame alone.
  """
  folder = _root(root, "avss", split, probe="metadata.csv", inner="AVSS", tree=AVSS_TREE)
  classes = _read_classes(folder / "label2idx.json")
  palette = clips.voc_palette(len(classes))
  rows = _read_table(folder / "metadata.csv", 7)

  def clip(uid: str, source: str) -> clips.Clip:
    if source not in _SOURCES:
      raise UserError(
        f"{folder / 'metadata.csv'}: the clip {uid} has the label {source!r}; expected one of"
        f" {', '.join(_SOURCES)}."
      )
    count = _SOURCES[source]
    home = folder / source / uid
    supervised = 1 if (split, source) == ("train", "v1s") else count
    return clips.Clip(
      uid,
      source,
      uid,
      tuple(home / "frames" / f"{k}.jpg" for k in range(count)),
      tuple(home / "labels_rgb" / f"{k}.png" if k < supervised else None for k in range(count)),
      home / "audio.wav",
    )

  found = tuple(clip(row[1], row[6]) for row in rows if row[5] == split)
  base.require_some(found, "avss", split, folder / "metadata.csv")
  clips.require_sounds(found, "avss")
  return clips.ClipFiles(
    name="avss",
    split=split,
    classes=classes,
    palette=palette,
    clips=found,
    num_frames=_MOST_FRAMES,
    read_mask=partial(_read_semantic, palette=palette),
    padding="zeros",
    prediction_size=(240, 360),
    embeddings=Path(embeddings) if embeddings else None,
  )


def _binary(
  name: str, split: str, found: tuple[clips.Clip, ...], folder: Path, embeddings: str | None
) -> clips.ClipFiles:
  base.require_some(found, name, split, folder)
  clips.require_sounds(found, name)
  return clips.ClipFiles(
    name=name,
    split=split,
    classes=clips.SOUNDING,
    palette=clips.SOUNDING_COLOUR,
    clips=found,
    num_frames=_FRAMES,
    read_mask=clips.read_binary_mask,
    padding="repeat",
    embeddings=Path(embeddings) if embeddings else None,
  )


def _root(
  root: str | Path | None, name: str, split: str, *, probe: str, inner: str, tree: str
) -> Path:
  """The subset's folder: the given one, or the one inside it."""
  base.require_split(split, _SPLITS, name)
  if root is not None and (Path(root) / inner / probe).is_file():
    root = Path(root) / inner
  return base.require_tree(root, name, probe, tree)


def _read_table(path: Path, columns: int) -> list[list[str]]:
  """The rows of a metadata file without its header; columns count by position."""
  with path.open(newline="", encoding="utf-8-sig") as lines:
    rows = [[value.strip() for value in row] for row in csv.reader(lines)]
  for number, row in enumerate(rows, 1):
    if row and len(row) < columns:
      raise UserError(f"{path}, line {number} has {len(row)} columns; expected {columns} at least.")
  return [row for row in rows[1:] if row]


def _read_classes(path: Path) -> tuple[str, ...]:
  """The class names in the order of their numbers, which begin at 0 or at 1."""
  if not path.is_file():
    raise UserError(f"{path} is missing; expected the class names and numbers of AVSS.")
  try:
    numbers = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(numbers, key=lambda name: int(numbers[name]))
    ranks = [int(numbers[name]) for name in names]
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path} cannot be read ({error}); expected {{"background": 0, ...}}.'
    ) from None
  if not 2 <= len(names) <= base.IGNORE_LABEL or ranks != list(
    range(ranks[0], ranks[0] + len(ranks))
  ):
    raise UserError(
      f"{path} numbers its {len(ranks)} classes with gaps or twice; expected 0, 1, ..."
    )
  return tuple(names)


def _read_semantic(path: Path, palette: np.ndarray) -> np.ndarray:
  """Class ids from a colour mask, or from the index mask of the same frame in its place."""
  if not path.is_file():
    index_path = path.parents[1] / "labels_semantic" / path.name
    if index_path.is_file():
      ids = codecs.read_label(index_path)
      base.check_labels(ids, len(palette), index_path)
      return ids.astype(np.uint8)
  return clips.colours_to_ids(codecs.read_image(path), palette, path)
