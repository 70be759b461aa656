"""Evaluation of audio-visual segmentation: AVSBench's M_J and M_F, and scores by kind of clip."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effseg_jax.evaluators import EvaluationResult, spread, sum_over_processes
from effseg_jax.metrics.audio_visual import SemanticScores, SoundingScores
from effseg_jax.ops.resize import resize_bilinear
from effseg_jax.pictures import semantic as pictures
from effseg_jax.tasks.audio_visual import AudioVisualTask

# Frames of a clip that are drawn.
_DRAWN_FRAMES = 2


class AudioVisualEvaluator:
  """M_J and M_F; a line for each group of clips, and for each class where there are classes."""

  def __init__(
    self, model: nn.Module, task: AudioVisualTask, dataset: Any, options: Mapping[str, Any]
  ):
    """Sets the evaluation up.

    Args:
      model: frames and log-mel patches -> logits.
      task: gives the model's inputs, classes and colours.
      dataset: the open split; gives groups of clips and the names of the official predictions.
      options: `clips_per_batch`, on which the reference's M_F depends, and `pictures`, the number
        of clips to draw.
    """
    self._model, self._task, self._dataset = model, task, dataset
    self._clips_per_batch = options["clips_per_batch"]
    self._drawn = spread(options.get("pictures", 0), len(dataset))
    self._samples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    self._predictions: dict[int, tuple[tuple[int, ...], bytes]] = {}
    if task.semantic:
      groups = sorted({dataset.group(index) for index in range(len(dataset))})
      self._padded = SemanticScores(task.num_classes)
      self._groups = {group: SemanticScores(task.num_classes) for group in groups}
    else:
      self._scores = SoundingScores(len(dataset))

  @staticmethod
  def metric_names(options: Mapping[str, Any], num_classes: int | None) -> tuple[str, ...]:
    """The scalars of the result, see `Evaluator`."""
    del options
    binary = ("M_J", "M_F", "F_dataset", "J_frames")
    semantic = ("M_J", "M_F", "M_J_frames", "M_F_frames")
    if num_classes is None:
      return tuple(dict.fromkeys((*binary, *semantic)))
    return semantic if num_classes > 1 else binary

  def step(self, variables: Any, batch: Mapping[str, jax.Array]) -> tuple[None, jax.Array]:
    """Segments a batch at the masks' size.

    Returns:
      No totals; logits float32 (B, T, H, W) of the sounding objects, or class ids uint8 (B, T, H,
      W).
    """
    logits = self._model.apply(variables, *self._task.model_inputs(batch), train=False)
    logits = self._task.valid_logits(logits, batch)
    size = batch["masks"].shape[2:4]
    flat = resize_bilinear(logits.reshape(-1, *logits.shape[2:]), size)
    logits = flat.reshape(*logits.shape[:2], *size, logits.shape[-1])
    if self._task.semantic:
      return None, jnp.argmax(logits, axis=-1).astype(jnp.uint8)
    return None, logits[..., 0]

  def update(self, batch: Mapping[str, np.ndarray], totals: Any, examples: np.ndarray) -> None:
    """Scores the clips; keeps predictions that may be drawn or written."""
    del totals
    for row in np.flatnonzero(batch["weight"] > 0):
      index, masks = int(batch["index"][row]), batch["masks"][row]
      counted, valid = batch["frame_weight"][row] > 0, batch["valid_frames"][row] > 0
      if self._task.semantic:
        prediction = examples[row]
        group = self._groups[self._dataset.group(index)]
        for frame in np.flatnonzero(counted | ~valid):
          self._padded.update(prediction[frame], masks[frame])
          if counted[frame]:
            group.update(prediction[frame], masks[frame])
      else:
        self._scores.update(index, examples[row], masks, counted)
        prediction = (examples[row] > 0).astype(np.uint8)
      packed = zlib.compress(np.ascontiguousarray(prediction[valid]).tobytes(), 1)
      self._predictions[index] = (prediction[valid].shape, packed)
      if index in self._drawn:
        frames = np.flatnonzero(counted)
        for frame in sorted({frames[0], frames[-1]})[:_DRAWN_FRAMES] if len(frames) else ():
          self._samples.append((batch["frames"][row, frame], prediction[frame], masks[frame]))

  def result(self) -> EvaluationResult:
    """Merges over processes; pictures and predictions are this process's."""
    scalars, table, report = self._semantic() if self._task.semantic else self._binary()
    drawn = {}
    if self._samples:
      palette = self._task.palette
      palette = palette if self._task.semantic else ((0, 0, 0), *palette)
      drawn["samples"] = pictures.side_by_side(self._samples, palette)
    return EvaluationResult(scalars, table, report, drawn, self._write_predictions)

  def _binary(self) -> tuple[dict[str, float], str, dict[str, Any]]:
    scores = self._scores
    for name in ("jaccard", "frames", "f_curves", "sounding_frames"):
      setattr(scores, name, sum_over_processes(getattr(scores, name)))
    scalars = scores.summary(self._clips_per_batch)
    groups = {
      group: {**scores.select(clips).summary(self._clips_per_batch), "clips": len(clips)}
      for group, clips in self._clips_by_group().items()
    }
    rows = [("all", {**scalars, "clips": int(np.count_nonzero(scores.frames))}), *groups.items()]
    note = (
      f"M_J, M_F: AVSBench's, {self._clips_per_batch} clip(s) a batch (M_F depends on it);"
      " F: one threshold for the data set"
    )
    report = {
      **scalars,
      "clips_per_batch": self._clips_per_batch,
      "frames": int(scores.frames.sum()),
      "frames_with_sound": int(scores.sounding_frames.sum()),
      "groups": groups,
    }
    return scalars, f"{_table(rows)}\n{note}", report

  def _semantic(self) -> tuple[dict[str, float], str, dict[str, Any]]:
    total = SemanticScores(self._task.num_classes)
    for scores in (self._padded, *self._groups.values()):
      for name in ("jaccard", "f", "frames"):
        setattr(scores, name, sum_over_processes(getattr(scores, name)))
    for scores in self._groups.values():
      total.merge(scores)
    classes = self._task.classes
    real, padded = total.to_json(classes), self._padded.summary()
    # The reference counts the frames that pad a clip: its numbers are the ones to compare.
    scalars = {
      "M_J": padded["M_J"],
      "M_F": padded["M_F"],
      "M_J_frames": real["M_J"],
      "M_F_frames": real["M_F"],
    }
    lines = [total.table(classes), "", f"{'':<12}  {'M_J':>6}  {'M_F':>6}"]
    named = {"as AVSBench": padded, "real frames": real}
    groups = {name: scores.summary() for name, scores in self._groups.items() if name}
    for name, numbers in {**named, **groups}.items():
      lines.append(f"{name:<12}  {100 * numbers['M_J']:6.2f}  {100 * numbers['M_F']:6.2f}")
    lines.append("AVSBench counts the frames that pad a clip; classes and sources: real frames")
    report = {**scalars, "as_avsbench": padded, "real_frames": real, "sources": groups}
    return scalars, "\n".join(lines), report

  def _clips_by_group(self) -> dict[str, np.ndarray]:
    """Group -> clips that were scored; nothing where clips have no groups."""
    found: dict[str, list[int]] = {}
    for index in np.flatnonzero(self._scores.frames):
      found.setdefault(self._dataset.group(int(index)), []).append(int(index))
    return {group: np.array(clips) for group, clips in sorted(found.items()) if group}

  def _write_predictions(self, folder: Path) -> None:
    """Writes AVSBench's pictures: white on black, or the classes' colours; frames count from 0."""
    size = self._dataset.prediction_size
    for index, (shape, packed) in self._predictions.items():
      maps = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(shape)
      for frame, ids in enumerate(maps):
        path = folder / self._dataset.prediction_path(index, frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = pictures.colorize(ids, self._task.palette) if self._task.semantic else 255 * ids
        if size is not None:
          picture = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_NEAREST)
        Image.fromarray(picture).save(path)


def _table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
  """A line per group of clips."""
  width = max(len("clips"), *(len(name) for name, _ in rows))
  lines = [f"{'':<{width}}  {'M_J':>6}  {'M_F':>6}  {'F':>6}  {'clips':>6}"]
  for name, numbers in rows:
    shares = "  ".join(f"{100 * numbers[key]:6.2f}" for key in ("M_J", "M_F", "F_dataset"))
    lines.append(f"{name:<{width}}  {shares}  {numbers['clips']:6d}")
  return "\n".join(lines)
