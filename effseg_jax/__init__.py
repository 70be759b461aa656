"""Efficient segmentation transformers in JAX: AFFormer, PRO-SCALE on Mask2Former, AVESFormer.

Use a trained model, here a released one:

>>> import effseg_jax
>>> segment = effseg_jax.load("afformer_tiny_camvid")
>>> result = segment("street.jpg")            # or an array uint8 (H, W, 3), a Pillow image, a list
>>> result.class_map                          # uint8 (H, W) at the picture's own size
>>> result.shares(), result.overlay(), result.save("out/street")

`load` takes the name of a released checkpoint (`list_checkpoints`), a bundle, the working directory
of a run, or an official file together with `dataset=`. What a call returns depends on the task:

* semantic: `SemanticResult` with `class_map`, `classes`, `shares()`, `overlay()`, `save(stem)`;
* universal: `UniversalResult` with `segments` (id, label, name, score, mask, box), `panoptic_map`,
  `instances` and `class_map`, what the model was trained for; a call takes `score_threshold=0.3`;
* audio-visual: `ClipResult`; `segment("clip.mp4")` for the whole clip, and
  `segment.stream("clip.mp4")` for one `SoundingSecond` after the other.

`segment.map(iterator, batch_size=8)` serves many pictures, and keeps their order.

Use a network itself:

>>> model = effseg_jax.create_model("afformer_base", num_classes=150)
>>> variables = effseg_jax.load_weights(model, "AFFormer_base_ade20k.pth")
>>> images = effseg_jax.normalize(pictures)   # uint8 (B, H, W, 3) -> float32
>>> logits = model.apply(variables, images, train=False)

Models are Flax Linen modules; images are float32 (B, H, W, 3), normalised with `IMAGENET_MEAN` and
`IMAGENET_STD`. Models of one task return one kind of output, in training and out of it:

* semantic: logits (B, ceil(H/8), ceil(W/8), num_classes) for AFFormer;
* universal: `class_logits` (B, Q, num_classes + 1), `mask_logits` (B, Q, ceil(H/4), ceil(W/4)) and
  `aux`, a list of the same from earlier layers;
* audio-visual: mask logits (B, T, H, W, num_classes) of frames (B, T, H, W, 3) and log-mel patches
  (B, T, 96, 64).

Train one, in a shell with `effseg train --config=afformer/synthetic --workdir=runs/first`, or with
`effseg_jax.experiment.build(config)`.

A mistake ends in a `UserError` whose message says what was found, what was expected and what to do.
Importing this package loads neither jax nor flax; the first use does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from effseg_jax.errors import UserError
from effseg_jax.models import create_model, list_models
from effseg_jax.weights import load_weights

if TYPE_CHECKING:
  from effseg_jax import experiment
  from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD
  from effseg_jax.ops.normalize import normalize_images as normalize
  from effseg_jax.prediction import list_checkpoints, load
  from effseg_jax.prediction.audio_visual import ClipResult, SoundingSecond
  from effseg_jax.prediction.results import Segment, SemanticResult, UniversalResult

__all__ = [
  "IMAGENET_MEAN",
  "IMAGENET_STD",
  "ClipResult",
  "Segment",
  "SemanticResult",
  "SoundingSecond",
  "UniversalResult",
  "UserError",
  "create_model",
  "experiment",
  "list_checkpoints",
  "list_models",
  "load",
  "load_weights",
  "normalize",
]
__version__ = "0.2.0"

# What is imported when it is first used: name -> module and the name there.
_LATER = {
  "IMAGENET_MEAN": "effseg_jax.ops.normalize:IMAGENET_MEAN",
  "IMAGENET_STD": "effseg_jax.ops.normalize:IMAGENET_STD",
  "normalize": "effseg_jax.ops.normalize:normalize_images",
  "load": "effseg_jax.prediction:load",
  "list_checkpoints": "effseg_jax.prediction:list_checkpoints",
  "ClipResult": "effseg_jax.prediction.audio_visual:ClipResult",
  "SoundingSecond": "effseg_jax.prediction.audio_visual:SoundingSecond",
  "Segment": "effseg_jax.prediction.results:Segment",
  "SemanticResult": "effseg_jax.prediction.results:SemanticResult",
  "UniversalResult": "effseg_jax.prediction.results:UniversalResult",
  "experiment": "effseg_jax.experiment",
}


def __getattr__(name: str) -> Any:
  """Imports a public name when it is first used."""
  if name not in _LATER:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, _, attribute = _LATER[name].partition(":")
  found = importlib.import_module(module)
  value = getattr(found, attribute) if attribute else found
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
