"""COCO panoptic: 80 things and 53 stuff classes, 118,287 / 5,000 images; or yours in its form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax.input_pipeline.datasets import base, coco_json, files, panoptic

TREE = """  annotations/panoptic_{train2017,val2017}.json
  annotations/panoptic_{train2017,val2017}/*.png    or panoptic_{train2017,val2017}/*.png
  {train2017,val2017}/*.jpg
  annotations/instances_val2017.json                optional: ground truth of AP
(train2017.zip, val2017.zip, panoptic_annotations_trainval2017.zip with its inner zips, unpacked)"""

_THINGS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush
"""
_STUFF = """
banner, blanket, bridge, cardboard, counter, curtain, door-stuff, floor-wood, flower, fruit,
gravel, house, light, mirror-stuff, net, pillow, platform, playingfield, railroad, river, road,
roof, sand, sea, shelf, snow, stairs, tent, towel, wall-brick, wall-stone, wall-tile, wall-wood,
water-other, window-blind, window-other, tree-merged, fence-merged, ceiling-merged,
sky-other-merged, cabinet-merged, table-merged, floor-other-merged, pavement-merged,
mountain-merged, grass-merged, dirt-merged, paper-merged, food-other-merged,
building-other-merged, rock-merged, wall-other-merged, rug-merged
"""
# The numbers that COCO left out among its things; its stuff begins at 92 and has larger gaps.
_NO_THINGS = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_THING_IDS = tuple(stored for stored in range(1, 91) if stored not in _NO_THINGS)
_STUFF_IDS = (
  *(92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145),
  *(147, 148, 149, 151, 154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181),
  *range(184, 201),
)
# The benchmark's colours, six hexadecimal digits a class.
_COLOURS = (
  "dc143c770b2000008e0000e66a00e4003c640050640000460000c0faaa1e64aa1edcdc00af74affa001ea52a2a"
  "ff4dff00e2fcb6b6ff00520078a69d6e4c00ae39ffc76400480076ffb3f0007d5cd10097bcd0b600dcb0ff63a4"
  "5c00498581ff4eb4ff00e400aefff32d59ff8686679194aeffd0bac5e2ffab86016d3f36cf8aff97005f09503d"
  "5469334a4169a6c466d0c3d2ff6d41008f95b300c2d1636a057900e3ffcd93bad0994501035fa1a3ff007700aa"
  "00b6c700a578b782585f20008272826e8185a64a76db8e5f4fd272b25a3b41460f7fa7733b6a6a8e6c2dc4ac00"
  "5f3650804cffc93901f6007abfa2d0ffff8093d3cb966464a8abac9270c6d2aa645c8859da58b8f18100d911ff"
  "7c4ab5464646ffe4ff9ad000c1005c4c5b71ffb4c36a9ab0e6968c3c8fff8040805c5237fed47c494daeffa062"
  "ffffff68546da9a483e1c7ff89364a879edf07f6e76bffc83a2995b7798eff49616b8e23be9999928b8d4682b4"
  "86c79cd1e28c60246c60606040aa4098fb98d0e5e4cebaab98a14074700000728f66669cfa8dff"
)

CLASS_TABLE = panoptic.ClassTable(
  names=files.split_names(_THINGS) + files.split_names(_STUFF),
  things=np.arange(133) < 80,
  ids=np.array(_THING_IDS + _STUFF_IDS, np.int64),
  palette=np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3),
)
CLASSES, PALETTE = CLASS_TABLE.names, CLASS_TABLE.palette

_SPLITS = ("train2017", "val2017")


def open_split(root: str | Path | None, split: str, *, first: int = 0) -> panoptic.PanopticFiles:
  """Opens `train2017`, `val2017`, or any `annotations/panoptic_<split>.json` with its folders.

  The classes are those of the json, things first, each sorted by id: 0 to 79 and 80 to 132.

  Args:
    root: of the data set.
    split: of it.
    first: take so many images, those the json lists first; 0: all.
  """
  known = known_splits(root, "panoptic", _SPLITS)
  base.require_split(split, known, "coco_panoptic")
  probe = f"annotations/panoptic_{split}.json"
  folder = base.require_tree(root, "coco_panoptic", probe, TREE)
  base.require_tree(root, "coco_panoptic", split, TREE)
  pngs = folder / "annotations" / f"panoptic_{split}"
  if not pngs.is_dir():
    pngs = base.require_tree(root, "coco_panoptic", pngs.name, TREE) / pngs.name
  instances = folder / "annotations" / f"instances_{split}.json"
  dataset = open_json(
    "coco_panoptic",
    split,
    folder / probe,
    image_folder=folder / split,
    png_folder=pngs,
    things_first=True,
    official=CLASS_TABLE,
    instances_json=instances if instances.is_file() else None,
  )
  names = dataset.image_names
  return dataclasses.replace(dataset, image_names=names[:first] if first else names)


def open_json(
  name: str,
  split: str,
  path: Path,
  *,
  image_folder: Path,
  png_folder: Path,
  things_first: bool,
  official: panoptic.ClassTable,
  image_name: Callable[[Any, str], str] | None = None,
  instances_json: Path | None = None,
  stuff_may_be_covered: bool = False,
) -> panoptic.PanopticFiles:
  """Opens a data set in the COCO panoptic format.

  Args:
    name: of the data set.
    split: of it.
    path: of the json.
    image_folder: of the photographs.
    png_folder: of the segment ids.
    things_first: see `panoptic.category_table`.
    official: gives the colours, if the json has the same category ids.
    image_name: (image id, name in the json) -> name below `image_folder`; None: as in the json.
    instances_json: see `panoptic.UniversalDataset`.
    stuff_may_be_covered: see `panoptic.PanopticFiles`.

  Raises:
    UserError: for a json that is broken or of another format, a category that it does not list, or
      missing files.
  """
  records = coco_json.read_panoptic(path)
  base.require_some(tuple(records.png_names[:1]), name, split, path)
  table = panoptic.category_table(
    records.categories, files.distinct_palette(len(records.categories)), things_first=things_first
  )
  if np.array_equal(table.ids, official.ids):
    table = panoptic.ClassTable(table.names, table.things, table.ids, official.palette)
  labels = coco_json.class_ids(
    records.category_ids, table.ids, path, records.offsets, records.image_ids
  )
  names = records.image_names
  if image_name is not None:
    pairs = zip(records.image_ids.tolist(), names.tolist(), strict=True)
    names = coco_json.compact([image_name(coco_json.text(i), n.decode()) for i, n in pairs])
  names = coco_json.find_files(image_folder, names, path)
  png_names = coco_json.find_files(png_folder, records.png_names, path)
  return panoptic.PanopticFiles(
    name,
    split,
    table,
    path,
    image_folder,
    png_folder,
    names,
    png_names,
    records.image_ids,
    records.sizes,
    records.offsets,
    records.segment_ids,
    labels,
    records.segment_crowd,
    records.segment_areas,
    instances_json,
    stuff_may_be_covered,
  )


def known_splits(root: str | Path | None, kind: str, official: tuple[str, ...]) -> tuple[str, ...]:
  """The splits that have an `annotations/<kind>_<split>.json`; the official ones if none has.

  For `instances` also those with annotations beside their pictures, as Roboflow exports them.
  """
  folder = Path(root or "")
  found = (
    re.fullmatch(rf"{kind}_([^.].*)\.json", path.name)
    for path in sorted((folder / "annotations").glob("*.json"))
  )
  splits = [match[1] for match in found if match]
  if root is not None and kind == "instances":
    splits += sorted(path.parent.name for path in folder.glob("*/_annotations.coco.json"))
  return tuple(splits) or official
