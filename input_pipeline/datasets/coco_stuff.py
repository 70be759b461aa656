"""COCO-Stuff, 171 classes, in two editions: 10k (9,000 / 1,000) and 164k (118,287 / 5,000)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets import base, files
from effseg_jax.input_pipeline.datasets.ade20k import zero_to_ignored

TREE_10K = """  images/*.jpg    annotations/*.mat    imageLists/{train,test}.txt
(cocostuff-10k-v1.1.zip, unpacked), or as MMSegmentation's converter leaves it:
  images/{train2014,test2014}/*.jpg
  annotations/{train2014,test2014}/*_labelTrainIds.png    0 is void, 1 to 171 are the classes"""
TREE_164K = """  images/{train2017,val2017}/*.jpg
  annotations/{train2017,val2017}/*.png    ids 0 to 181, 255 is void (stuffthingmaps); or
  annotations/{train2017,val2017}/*_labelTrainIds.png    0 to 170, 255 is void"""

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge,
building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth,
clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble,
floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal,
mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic,
platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea,
shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""
CLASSES = files.split_names(_NAMES)
# The colours in use elsewhere give several classes the same one; these differ.
PALETTE = files.distinct_palette(len(CLASSES))

# Of the 182 ids these have a name (street sign, hat, ...) and no annotations.
_UNUSED_IDS = frozenset((11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90))
_USED_IDS = tuple(stored for stored in range(182) if stored not in _UNUSED_IDS)
_ID_TABLE = files.label_table({stored: i for i, stored in enumerate(_USED_IDS)}, 182)
_SUFFIX = {"ids": ".png", "train_ids": "_labelTrainIds.png"}
_SPLITS_10K = {"train2014": "train", "test2014": "test"}
_SPLITS_164K = ("train2017", "val2017")


def ids_to_classes(label: np.ndarray) -> np.ndarray:
  """The 182 official ids, counted from 0, to 171 classes."""
  return files.by_table(label, _ID_TABLE)


def read_mat(path: Path) -> np.ndarray:
  """Reads `S` of a COCO-Stuff-10k annotation: ids counted from 0, uint8 (H, W), 255 void.

  Raises:
    UserError: if the file is missing or is no such annotation.
  """
  from scipy.io import loadmat

  if not path.is_file():
    raise UserError(f"{path} is missing.")
  try:
    stored = loadmat(path, variable_names=["S"])["S"]
  except (KeyError, ValueError, TypeError, OSError, NotImplementedError) as error:
    raise UserError(f"{path} is no COCO-Stuff annotation with the map S ({error}).") from None
  return np.where(stored == 0, base.IGNORE_LABEL, stored.astype(np.int32) - 1)


def open_10k(root: str | Path | None, split: str) -> base.SegmentationFiles:
  """Opens `train2014` or `test2014`, from the official lists if there are any."""
  name = "coco_stuff_10k"
  base.require_split(split, tuple(_SPLITS_10K), name)
  folder = base.require_tree(root, name, "images", TREE_10K)
  listing = folder / "imageLists" / f"{_SPLITS_10K[split]}.txt"
  if listing.is_file():
    stems = listing.read_text(encoding="utf-8").split()
    images = [folder / "images" / f"{stem}.jpg" for stem in stems]
    pairs = files.pair_up(images, lambda path: folder / "annotations" / f"{path.stem}.mat", name)
    base.require_some(pairs, name, split, listing)
    return base.SegmentationFiles(name, split, CLASSES, PALETTE, pairs, ids_to_classes, read_mat)
  base.require_tree(root, name, f"images/{split}", TREE_10K)
  labels = folder / "annotations" / split
  pairs = files.pair_up(
    files.list_images(folder / "images" / split),
    lambda path: labels / (path.stem + _SUFFIX["train_ids"]),
    name,
  )
  base.require_some(pairs, name, split, folder / "images" / split)
  return base.SegmentationFiles(name, split, CLASSES, PALETTE, pairs, zero_to_ignored)


def open_164k(
  root: str | Path | None, split: str, *, labels: str = "auto"
) -> base.SegmentationFiles:
  """Opens `train2017` or `val2017`.

  Args:
    root: folder with `images` and `annotations`.
    split: of the data set.
    labels: `ids` for the official PNGs, `train_ids` for *_labelTrainIds.png, `auto` for the first
      of them that the first image has.
  """
  name = "coco_stuff_164k"
  base.require_split(split, _SPLITS_164K, name)
  if labels not in (*_SUFFIX, "auto"):
    raise UserError(f"data.options.labels is {labels!r}; expected auto, {', '.join(_SUFFIX)}.")
  folder = base.require_tree(root, name, f"images/{split}", TREE_164K)
  images = files.list_images(folder / "images" / split)
  base.require_some(tuple(images), name, split, folder / "images" / split)
  maps = folder / "annotations" / split
  if labels == "auto":
    first = images[0].stem
    labels = next((kind for kind in _SUFFIX if (maps / (first + _SUFFIX[kind])).is_file()), "ids")
  suffix = _SUFFIX[labels]
  pairs = files.pair_up(images, lambda path: maps / (path.stem + suffix), name)
  rule = ids_to_classes if labels == "ids" else files.unchanged
  return base.SegmentationFiles(name, split, CLASSES, PALETTE, pairs, rule)
