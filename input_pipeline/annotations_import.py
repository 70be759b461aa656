"""Polygons and masks of other tools as a data set of this library.

Each reader yields `Picture`: a file, its size and its objects. They become COCO's instances
(`annotations/instances_<split>.json` with the pictures in `<split>`), which `coco_instances` reads.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from effseg_jax.errors import UserError, extra, suggestion
from effseg_jax.input_pipeline import codecs
from effseg_jax.input_pipeline.datasets import class_list, coco_json, coco_values
from effseg_jax.input_pipeline.datasets.files import split_names


@dataclasses.dataclass
class Picture:
  """A picture and its objects.

  Attributes:
    path: of the file.
    split: it belongs to.
    objects: (class name, polygons of x, y in pixels, or a mask bool (H, W)).
  """

  path: Path
  split: str
  objects: list[tuple[str, list[list[float]] | np.ndarray]]


Reader = Callable[[Path], Iterator[Picture]]


def import_annotations(form: str, source: Path, output: Path) -> dict[str, Counter[str]]:
  """Writes the pictures and annotations of another tool as COCO instances.

  Args:
    form: one of `READERS`.
    source: folder (or json) of the tool's export.
    output: folder of the data set; made if it is missing.

  Returns:
    By split, the number of pictures ("pictures") and of objects of each class.

  Raises:
    UserError: for an unknown form, a missing folder, an annotation that cannot be read, or nothing.
  """
  if form not in READERS:
    raise UserError(
      f"--from={form}: expected one of {', '.join(READERS)}.{suggestion(form, READERS)}"
    )
  if not source.exists():
    raise UserError(f"{source} does not exist; expected {TREES[form]}.")
  pictures = list(READERS[form](source))
  if not pictures:
    raise UserError(f"{source} has no annotated pictures; expected {TREES[form]}.")
  names = sorted({name for picture in pictures for name, _ in picture.objects})
  if (listed := _listed_classes(form, source)) is not None:
    names = listed
  counts: dict[str, Counter[str]] = {}
  for split in sorted({picture.split for picture in pictures}):
    chosen = [picture for picture in pictures if picture.split == split]
    counts[split] = _write(chosen, split, names, output)
  return counts


def _write(pictures: list[Picture], split: str, names: list[str], output: Path) -> Counter[str]:
  """Copies the pictures of a split and writes its json."""
  (output / split).mkdir(parents=True, exist_ok=True)
  (output / "annotations").mkdir(exist_ok=True)
  images: list[dict[str, Any]] = []
  annotations: list[dict[str, Any]] = []
  counts: Counter[str] = Counter(pictures=len(pictures))
  taken: Counter[str] = Counter()
  for number, picture in enumerate(pictures, 1):
    rows, cols = codecs.image_size(picture.path)
    name = picture.path.name
    taken[name] += 1
    if taken[name] > 1:  # pictures of one name in several folders
      name = f"{picture.path.stem}_{taken[name]}{picture.path.suffix}"
    shutil.copyfile(picture.path, output / split / name)
    images.append({"id": number, "file_name": name, "height": rows, "width": cols})
    for label, shape in picture.objects:
      segmentation = _run_lengths(shape) if isinstance(shape, np.ndarray) else shape
      problem = coco_values.mask_problem(segmentation)
      found = None if problem is not None else coco_values.runs(segmentation, (rows, cols))
      if problem:
        raise UserError(f"{picture.path}: an object of {label!r} {problem}; {coco_values.SHAPE}.")
      if found is None:
        counts["without a pixel"] += 1
        continue
      counts[label] += 1
      category = names.index(label) + 1
      entry = _annotation(len(annotations) + 1, number, category, segmentation, found)
      annotations.append(entry)
  categories = [{"id": row, "name": name} for row, name in enumerate(names, 1)]
  content = {"images": images, "categories": categories, "annotations": annotations}
  path = output / "annotations" / f"instances_{split}.json"
  path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
  return counts


def _annotation(number: int, image: int, category: int, segmentation: Any, runs: Any) -> Any:
  """An entry of the json; area and box are those of the drawn mask."""
  with extra("coco"):
    from pycocotools import mask as coco_mask

  return {
    "id": number,
    "image_id": image,
    "category_id": category,
    "segmentation": segmentation,
    "area": float(coco_mask.area(runs)),
    "bbox": [float(side) for side in coco_mask.toBbox(runs)],
    "iscrowd": 0,
  }


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
  """bool (H, W) -> run lengths for a json."""
  with extra("coco"):
    from pycocotools import mask as coco_mask

  runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
  return {"size": list(map(int, runs["size"])), "counts": runs["counts"].decode("ascii")}


def _listed_classes(form: str, source: Path) -> list[str] | None:
  """The tool's own order of classes, where it has one."""
  if form == "yolo":
    return list(_yolo_names(source).values())
  return None


# YOLO: class x1 y1 x2 y2 ... a line, as shares of the width and height.


def _yolo(source: Path) -> Iterator[Picture]:
  names = _yolo_names(source)
  for image in codecs.list_pictures(source, recursive=True):
    parts = image.relative_to(source).parts
    if "images" not in parts:
      continue
    place = len(parts) - 1 - parts[::-1].index("images")
    label = source.joinpath(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
    others = [part for part in (*parts[:place], *parts[place + 1 : -1])]
    split = others[0] if others else "train"
    rows, cols = codecs.image_size(image)
    objects = []
    text = class_list.read_text(label) if label.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
      words = line.split()
      if not words:
        continue
      values = _numbers(words)
      if values is None or int(values[0]) not in names:
        raise UserError(
          f'{label}, line {number}: {line[:40]!r}; expected "class x1 y1 x2 y2 ..." with a class of'
          f" {len(names)}."
        )
      if len(words) in (5, 6) or not len(words) % 2:
        raise UserError(
          f"{label}, line {number} has {len(words)} numbers, a box; expected a polygon of three"
          " points at least (the segmentation format of YOLO)."
        )
      points = np.array(values[1:]).reshape(-1, 2) * (cols, rows)
      objects.append((names[int(values[0])], [points.ravel().tolist()]))
    yield Picture(image, "val" if split == "valid" else split, objects)


def _yolo_names(source: Path) -> dict[int, str]:
  for path in sorted(source.glob("*.y*ml")):
    found = _yaml_names(path)
    if found:
      return found
  for name in ("classes.txt", "obj.names"):
    if (source / name).is_file():
      return dict(enumerate(class_list.read_classes(source / name)[0]))
  raise UserError(
    f"{source} has no list of classes; expected data.yaml with names, or classes.txt."
  )


def _yaml_names(path: Path) -> dict[int, str]:
  """`names` of a data.yaml, a list or numbered; empty if it has none."""
  import yaml  # ml_collections brings it

  try:
    content = yaml.safe_load(class_list.read_text(path))
  except yaml.YAMLError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{path} is no YAML ({reason}); expected names of classes.") from None
  names = content.get("names") if isinstance(content, dict) else None
  if isinstance(names, dict) and all(isinstance(number, int) for number in names):
    return {number: str(names[number]) for number in sorted(names)}
  return dict(enumerate(map(str, names))) if isinstance(names, list) else {}


# labelme: one json beside each picture.


def _labelme(source: Path) -> Iterator[Picture]:
  for path in codecs.list_files(source, recursive=True):
    if path.suffix.lower() != ".json":
      continue
    content = _json(path)
    if not isinstance(content, dict) or "shapes" not in content:
      continue
    image = path.parent / Path(str(content.get("imagePath", "")).replace("\\", "/")).name
    if not image.is_file():
      beside = [other for other in codecs.list_pictures(path.parent) if other.stem == path.stem]
      if not beside:
        raise UserError(f"{path}: its picture {image.name} is not beside it.")
      image = beside[0]
    objects: dict[Any, tuple[str, list[list[float]]]] = {}
    for number, shape in enumerate(content["shapes"]):
      polygon = _labelme_polygon(shape)
      if polygon is None:
        continue
      label, group = str(shape["label"]), shape.get("group_id")
      key = ("alone", number) if group is None else (label, group)
      objects.setdefault(key, (label, []))[1].append(polygon)
    parts = path.relative_to(source).parts
    yield Picture(image, parts[0] if len(parts) > 1 else "train", list(objects.values()))


def _labelme_polygon(shape: dict[str, Any]) -> list[float] | None:
  points = np.array(shape.get("points", []), float).reshape(-1, 2)
  kind = shape.get("shape_type", "polygon")
  if kind == "rectangle" and len(points) == 2:
    (left, top), (right, bottom) = points
    return [left, top, right, top, right, bottom, left, bottom]
  if kind == "circle" and len(points) == 2:
    radius = float(np.hypot(*(points[1] - points[0])))
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return (points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], -1)).ravel().tolist()
  return points.ravel().tolist() if kind == "polygon" and len(points) >= 3 else None


# VOC: JPEGImages, SegmentationObject and SegmentationClass, Annotations/*.xml.


def _voc(source: Path) -> Iterator[Picture]:
  instances, classes = source / "SegmentationObject", source / "SegmentationClass"
  if not (source / "JPEGImages").is_dir() or not classes.is_dir():
    raise UserError(f"{source} lacks JPEGImages or SegmentationClass; expected {TREES['voc']}.")
  names, palette = _voc_names(source)
  lists = {
    path.stem: class_list.read_text(path).split()
    for path in sorted((source / "ImageSets" / "Segmentation").glob("*.txt"))
    if path.stem != "trainval"
  } or {"train": [path.stem for path in codecs.list_files(classes)]}
  images = {path.stem: path for path in codecs.list_pictures(source / "JPEGImages")}
  for split, stems in lists.items():
    for stem in stems:
      if stem not in images:
        raise UserError(f"{source / 'JPEGImages'} has no picture {stem}, which {split}.txt lists.")
      class_map = _voc_map(classes / f"{stem}.png", palette)
      objects = []
      if (instances / f"{stem}.png").is_file():
        numbers = _voc_instances(instances / f"{stem}.png")
        for number in np.unique(numbers[(numbers > 0) & (numbers != 255)]):
          mask = numbers == number
          kinds = np.bincount(class_map[mask], minlength=256)
          kinds[[0, 255]] = 0
          if kinds.any():
            objects.append((names[int(kinds.argmax())], mask))
      else:
        kinds = [kind for kind in np.unique(class_map).tolist() if kind not in (0, 255)]
        objects = [(names[kind], class_map == kind) for kind in kinds]
      yield Picture(images[stem], split, objects)


_VOC_CLASSES = """
background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog,
horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
"""


def _voc_names(source: Path) -> tuple[list[str], np.ndarray]:
  """Names by number, and colours: of CVAT's labelmap, or those of VOC."""
  from effseg_jax.input_pipeline.datasets.clips import voc_palette

  for name in ("labelmap.txt", "classes.txt"):
    if (source / name).is_file():
      names, palette = class_list.read_classes(source / name)
      return list(names), palette
  names = list(split_names(_VOC_CLASSES))
  return names, voc_palette(len(names))


def _voc_map(path: Path, palette: np.ndarray) -> np.ndarray:
  """Numbers of a class picture, of a palette PNG or of colours: uint8, 255 where unknown."""
  rgb, _ = codecs.read_colours(path)
  codes = rgb.astype(np.int64) @ (1, 256, 65536)
  numbers = np.full(codes.shape, 255, np.uint8)
  for number, code in enumerate(palette.astype(np.int64) @ (1, 256, 65536)):
    numbers[codes == code] = number
  return numbers


def _voc_instances(path: Path) -> np.ndarray:
  """Numbers of objects: those of a palette PNG, or one for each colour but black and VOC's void."""
  rgb, _ = codecs.read_colours(path)
  codes = rgb.astype(np.int64) @ (1, 256, 65536)
  void = np.array([224, 224, 192]) @ (1, 256, 65536)
  values, numbers = np.unique(np.where(codes == void, 0, codes), return_inverse=True)
  return numbers.reshape(codes.shape) + (0 if values[0] == 0 else 1)


# CVAT for images: annotations.xml.


def _cvat(source: Path) -> Iterator[Picture]:
  path = source if source.is_file() else source / "annotations.xml"
  if not path.is_file():
    raise UserError(f"{path} is missing; expected {TREES['cvat']}.")
  try:
    content = class_list.read_text(path)
    if "<!ENTITY" in content:
      raise UserError(f"{path} declares entities; expected an export of CVAT.")
    root = ElementTree.fromstring(content)
  except ElementTree.ParseError as error:
    raise UserError(f"{path} is no XML ({error}); expected an export of CVAT.") from None
  found = {image.name: image for image in codecs.list_pictures(path.parent, recursive=True)}
  for entry in root.iter("image"):
    name = str(entry.get("name")).replace("\\", "/")
    image = path.parent / name
    image = image if image.is_file() else found.get(Path(name).name, image)
    objects: dict[Any, tuple[str, Any]] = {}
    for number, shape in enumerate(entry):
      label, group = str(shape.get("label")), shape.get("group_id")
      if shape.tag == "polygon":
        points = [float(value) for value in re.split(r"[;,]", str(shape.get("points")))]
        key = ("alone", number) if group in (None, "0") else (label, group)
        objects.setdefault(key, (label, []))[1].append(points)
      elif shape.tag == "mask":
        objects[number] = (label, _cvat_mask(shape, entry))
    subset = str(entry.get("subset") or "train").lower()
    yield Picture(image, subset, list(objects.values()))


def _cvat_mask(shape: ElementTree.Element, entry: ElementTree.Element) -> np.ndarray:
  """Run lengths of a box inside the picture, by rows, beginning with what is not covered."""
  side = lambda element, name: int(element.get(name) or 0)  # noqa: E731
  runs = [int(run) for run in str(shape.get("rle")).split(",")]
  window = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
  rows, cols = side(shape, "height"), side(shape, "width")
  mask = np.zeros((side(entry, "height"), side(entry, "width")), bool)
  top, left = side(shape, "top"), side(shape, "left")
  mask[top : top + rows, left : left + cols] = window.reshape(rows, cols)
  return mask


# COCO jsons of Roboflow and Label Studio.


def _roboflow(source: Path) -> Iterator[Picture]:
  for path in sorted(source.glob("*/_annotations.coco.json")):
    split = {"valid": "val"}.get(path.parent.name, path.parent.name)
    yield from _coco(path, path.parent, split)


def _labelstudio(source: Path) -> Iterator[Picture]:
  path = source if source.is_file() else source / "result.json"
  if not path.is_file():
    raise UserError(f"{path} is missing; expected {TREES['labelstudio']}.")
  folder = path.parent / "images"
  yield from _coco(path, folder if folder.is_dir() else path.parent, "train")


def _coco(path: Path, folder: Path, split: str) -> Iterator[Picture]:
  found = coco_json.read_instances(path)
  names = {entry["id"]: entry["name"] for entry in found.categories}
  files = coco_json.find_files(folder, found.image_names, path)
  for row, name in enumerate(files.tolist()):
    window = slice(*found.offsets[row : row + 2])
    annotations = coco_json.read_annotations(path, found.begins[window], found.lengths[window])
    objects = [
      (names[int(category)], annotation["segmentation"])
      for category, annotation in zip(found.category_ids[window], annotations, strict=True)
    ]
    yield Picture(folder / name.decode(), split, objects)


def _json(path: Path) -> Any:
  try:
    return json.loads(class_list.read_text(path))
  except ValueError as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"{path} is no json ({error}).") from None


def _numbers(words: list[str]) -> list[float] | None:
  try:
    return [float(word) for word in words]
  except ValueError:
    return None


READERS: dict[str, Reader] = {
  "yolo": _yolo,
  "labelme": _labelme,
  "voc": _voc,
  "cvat": _cvat,
  "roboflow": _roboflow,
  "labelstudio": _labelstudio,
}
TREES = {
  "yolo": "data.yaml with images/{train,val}/*.jpg and labels/{train,val}/*.txt of polygons",
  "labelme": "pictures with a json of the same name beside each",
  "voc": "JPEGImages, SegmentationClass and SegmentationObject",
  "cvat": "annotations.xml (CVAT for images 1.1) with the pictures beside or below it",
  "roboflow": "{train,valid}/_annotations.coco.json beside the pictures",
  "labelstudio": "result.json of the COCO export, with its folder images",
}
