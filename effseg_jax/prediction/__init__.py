"""From pictures and clips to segments: what `effseg_jax.load` and `effseg predict` are made of.

`load` gives an object to call. Results are dataclasses of `prediction.results` and
`prediction.audio_visual`, one kind for each task; `prediction.files` reads and writes folders.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from effseg_jax import task_table
from effseg_jax.errors import UserError, suggestion
from effseg_jax.prediction.card import task_name
from effseg_jax.prediction.source import list_checkpoints, read_source

if TYPE_CHECKING:
  from effseg_jax.prediction.audio_visual import ClipSegmenter
  from effseg_jax.prediction.pictures import PictureSegmenter
  from effseg_jax.weights.bundle import Bundle

__all__ = ["list_checkpoints", "load", "make_segmenter"]


def load(
  source: str | os.PathLike[str],
  dataset: str | None = None,
  *,
  model: str | None = None,
  **options: Any,
) -> PictureSegmenter | ClipSegmenter:
  """Loads a trained model as something to call.

  >>> segment = effseg_jax.load("afformer_tiny_camvid")
  >>> result = segment("street.jpg")
  >>> result.class_map.shape, result.shares()

  Args:
    source: the name of a released checkpoint (see `list_checkpoints`); or the path of a bundle
      (`.safetensors`), of a run's working directory, which stands for its best checkpoint, or of an
      official file (`.pth`, `.pkl`, ...).
    dataset: whose classes an official file knows: `"ade20k"`, `"cityscapes"`, ...
    model: one of `list_models()`, for an official file; without it, the one that fits.
    **options: `scale`, the size at which the network sees pictures, `"720x540"` or a factor such as
      1.5, instead of that of the evaluation; `batch_size`, pictures that it sees at once;
      `exact_size=True` for semantic models: exactly the size of the evaluation, where otherwise
      sides are rounded to multiples of 32, so that similar sizes share a program;
      `score_threshold` for universal models, above which a query becomes a segment.

  Returns:
    A `PictureSegmenter`, to be called with a picture (array uint8 (H, W, 3), Pillow image or path)
    or a list of them, which gives a `SemanticResult` or `UniversalResult` each; for an audio-visual
    model a `ClipSegmenter`, to be called with the path of a clip.

  Raises:
    UserError: if nothing can be read there, or an option means nothing to the model.
  """
  bundle = read_source(source, dataset=dataset, model=model)
  return make_segmenter(bundle, origin=str(source), **options)


def make_segmenter(
  bundle: Bundle, *, origin: str = "the checkpoint", **options: Any
) -> PictureSegmenter | ClipSegmenter:
  """`load` for a bundle that is in memory.

  Args:
    bundle: model, variables and card.
    origin: how messages call it.
    **options: see `load`.

  Raises:
    UserError: if nothing can be predicted for its task, its card is broken, or an option means
      nothing to it.
  """
  name = task_name(bundle.card, origin)
  make = task_table.find(name, "predictor")
  if make is None:
    known = [task for task, parts in task_table.TASKS.items() if parts.predictor]
    raise UserError(
      f"{origin} was trained for {name}; prediction needs one for {', '.join(known)}."
    )
  options = {key: value for key, value in options.items() if value is not None}
  known = list(inspect.signature(make).parameters)[2:]
  for option in options:
    if option not in known:
      raise UserError(
        f"--{option} means nothing to a checkpoint for {name}, which knows"
        f" {', '.join(f'--{k}' for k in known)}.{suggestion(option, known)}"
      )
  return make(bundle, origin, **options)
