"""Predictions in COCO's result formats, as its evaluation server expects them."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from effseg_jax.errors import extra

ImageId = int | str


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
  """bool (H, W) -> run lengths as they stand in a json: `size` and `counts`."""
  with extra("coco"):
    from pycocotools import mask as coco_mask

  runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
  return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")}


def detections(
  image_id: ImageId,
  masks: np.ndarray,
  categories: Sequence[int],
  scores: Sequence[float],
) -> list[dict[str, Any]]:
  """The instances of an image as entries of a results json.

  Args:
    image_id: as in the data set.
    masks: bool (n, H, W), at the image's own size.
    categories: int (n,), the data set's category ids.
    scores: float (n,).
  """
  return [
    {
      "image_id": image_id,
      "category_id": int(category),
      "segmentation": encode_mask(mask),
      "score": float(score),
    }
    for mask, category, score in zip(masks, categories, scores, strict=True)
  ]


def write_detections(path: Path, entries: Sequence[dict[str, Any]]) -> None:
  """Writes the entries of all images as one results json."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(list(entries)), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class PanopticPrediction:
  """The predictions for one image, compressed, so that a data set's fit into memory.

  Attributes:
    annotation: entry of the json, with `image_id`, `file_name` and `segments_info`.
    png: the encoded picture of segment ids.
  """

  annotation: dict[str, Any]
  png: bytes


def panoptic_prediction(
  image_id: ImageId, name: str, segment_map: np.ndarray, categories: Sequence[int]
) -> PanopticPrediction:
  """Encodes the segments of an image.

  Args:
    image_id: as in the data set.
    name: of the picture, without its ending.
    segment_map: int (H, W), row in `categories` at each pixel; negative for void.
    categories: int (n,), the data set's category ids. A segment without a pixel is left out.
  """
  ids = np.maximum(segment_map, -1).astype(np.int32) + 1  # 0 is void
  present = np.flatnonzero(np.bincount(ids.ravel(), minlength=len(categories) + 1)[1:])
  colours = np.stack([ids & 255, (ids >> 8) & 255, ids >> 16], axis=-1).astype(np.uint8)
  encoded = io.BytesIO()
  Image.fromarray(colours).save(encoded, "PNG", compress_level=4)
  segments = [{"id": int(row) + 1, "category_id": int(categories[row])} for row in present]
  file_name = f"{name}.png"
  return PanopticPrediction(
    {"image_id": image_id, "file_name": file_name, "segments_info": segments}, encoded.getvalue()
  )


def write_panoptic(path: Path, predictions: Iterable[PanopticPrediction]) -> None:
  """Writes a json, and its pictures into the folder of the same name beside it.

  Args:
    path: of the json; `panoptic.json` has its pictures in `panoptic`.
    predictions: of all images.
  """
  folder = path.with_suffix("")
  folder.mkdir(parents=True, exist_ok=True)
  annotations = []
  for prediction in predictions:
    (folder / prediction.annotation["file_name"]).write_bytes(prediction.png)
    annotations.append(prediction.annotation)
  path.write_text(json.dumps({"annotations": annotations}), encoding="utf-8")
