"""ADE20K in the form of the scene-parsing challenge: 150 classes, 20,210 / 2,000 images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effseg_jax.input_pipeline.datasets import base, files

TREE = """  images/training/*.jpg      annotations/training/*.png
  images/validation/*.jpg    annotations/validation/*.png    0 is void, 1 to 150 are the classes
(ADEChallengeData2016.zip of the scene-parsing benchmark, unpacked)"""

_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
monitor, bulletin board, shower, radiator, glass, clock, flag
"""
# The benchmark's colours, six hexadecimal digits a class.
_COLOURS = (
  "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33"
  "ff06528fff8cccff04ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff"
  "08ffd607ffe0ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ff"
  "eb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff"
  "0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad"
  "0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
  "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa"
  "8500ff00ff5cb800ffff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3"
  "ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff"
  "00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cffb8ff000085ffffd60019c2c266ff005c00ff"
)
CLASSES = files.split_names(_NAMES)
PALETTE = np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3)

_SPLITS = ("training", "validation")


_SHIFTED = files.label_table({stored: stored - 1 for stored in range(1, 255)}, 255)


def zero_to_ignored(label: np.ndarray) -> np.ndarray:
  """0 and 255 are void; the classes begin at 1."""
  if label.dtype == np.uint8:
    return files.by_table(label, _SHIFTED)
  void = (label == 0) | (label == base.IGNORE_LABEL)
  return np.where(void, base.IGNORE_LABEL, label.astype(np.int32) - 1)


def open_split(root: str | Path | None, split: str) -> base.SegmentationFiles:
  """Opens `training` or `validation`."""
  base.require_split(split, _SPLITS, "ade20k")
  folder = base.require_tree(root, "ade20k", f"images/{split}", TREE)
  images, labels = folder / "images" / split, folder / "annotations" / split
  pairs = files.pair_up(
    files.list_images(images), lambda image: labels / f"{image.stem}.png", "ade20k"
  )
  base.require_some(pairs, "ade20k", split, images)
  return base.SegmentationFiles("ade20k", split, CLASSES, PALETTE, pairs, zero_to_ignored)
