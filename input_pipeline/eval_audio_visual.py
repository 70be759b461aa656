"""Evaluation batches of clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from effseg_jax.input_pipeline.audio import silence
from effseg_jax.input_pipeline.datasets.base import Example
from effseg_jax.input_pipeline.datasets.clips import EMBEDDING
from effseg_jax.input_pipeline.eval_batches import Batch, EvalBatches
from effseg_jax.input_pipeline.transforms_audio_visual import resize_each


class AudioVisualEvalBatches(EvalBatches):
  """Whole clips, frames at the network's size and masks at the size at which they are compared.

  A batch holds `frames` uint8 (B, T, H, W, 3), `log_mel` float32 (B, T, 96, 64) or stored
  embeddings (B, T, 128), `masks` uint8 (B, T, Hm, Wm), `frame_weight` and `valid_frames` float32
  (B, T), `index` int32 (B,) and `weight` float32 (B,).
  """

  def __init__(
    self, dataset: Any, *, size: tuple[int, int], mask_size: tuple[int, int], **loading: Any
  ):
    """Plans the batches; no file is opened.

    Args:
      dataset: of clips, with `num_frames`.
      size: rows and columns that the network sees; frames are stretched to it.
      mask_size: rows and columns of the masks.
      **loading: see `EvalBatches`.
    """
    self._size, self._mask_size = size, mask_size
    stored = getattr(dataset, "embeddings", None) is not None
    self._silence = np.zeros(EMBEDDING, np.float32) if stored else silence()
    super().__init__(dataset, {dataset.num_frames: range(len(dataset))}, **loading)

  def filler(self, shape: Any) -> Batch:
    """Black frames, silence, nothing supervised."""
    return {
      "frames": np.zeros((shape, *self._size, 3), np.uint8),
      "log_mel": np.broadcast_to(self._silence, (shape, *self._silence.shape)),
      "masks": np.zeros((shape, *self._mask_size), np.uint8),
      "frame_weight": np.zeros(shape, np.float32),
      "valid_frames": np.zeros(shape, np.float32),
    }

  def prepare(self, example: Example, shape: Any) -> Batch:
    """Frames bilinear, masks nearest."""
    del shape
    frames = resize_each(example["frames"], self._size, Image.Resampling.BILINEAR)
    masks = resize_each(example["masks"], self._mask_size, Image.Resampling.NEAREST)
    unchanged = {key: example[key] for key in ("log_mel", "frame_weight", "valid_frames")}
    return {"frames": frames, "masks": masks, **unchanged}


def audio_visual_eval_batches(
  dataset: Any, options: Mapping[str, Any], **loading: Any
) -> AudioVisualEvalBatches:
  """Batches for `options.size` and `options.mask_size`."""
  return AudioVisualEvalBatches(
    dataset, size=tuple(options["size"]), mask_size=tuple(options["mask_size"]), **loading
  )
