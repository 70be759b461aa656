"""AVSBench's measures: Jaccard index M_J and F-score M_F, as its evaluation code computes them.

The rules are odd in places, and the numbers in papers follow them: in frames without a sounding
object M_J is the share of correct background pixels, and M_F leaves them out; M_F takes the best
threshold of each *batch* of clips, so that it depends on the batch size; the semantic measures
count the frames that only pad a clip. All this is computed here as it is there, and beside it what
depends on the predictions alone. Accumulators hold sums per clip or class, which add up over
processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Precision weighs more than recall: beta^2 of the F-score.
_BETA2 = 0.3
_NUM_THRESHOLDS = 255


def _thresholds() -> np.ndarray:
  """`torch.linspace(0, 1 - 1e-10, 255)` bit by bit: multiples of a float32 step from both ends."""
  step, index = np.float64(np.float32(1) / np.float32(_NUM_THRESHOLDS - 1)), np.arange(255)
  rising, falling = index * step, 1 - step * (_NUM_THRESHOLDS - 1 - index)
  return np.where(index < _NUM_THRESHOLDS // 2, rising, falling).astype(np.float32)


THRESHOLDS = _thresholds()


def probabilities(logits: np.ndarray) -> np.ndarray:
  """The sigmoid in float32; logits of any size do not overflow."""
  logits = np.asarray(logits, np.float32)
  small = np.exp(-np.abs(logits))
  return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def frame_jaccard(logits: np.ndarray, mask: np.ndarray) -> float:
  """Intersection over union of one frame.

  Without a sounding object it is the share of pixels that are correctly background.

  Args:
    logits: (H, W); a pixel sounds if its probability is above one half.
    mask: (H, W), 0 to 1.
  """
  sounding = probabilities(logits) > 0.5
  mask = np.asarray(mask, np.float64)
  if not mask.any():
    return float(np.mean(~sounding))
  intersection = np.sum(mask, where=sounding)
  return float(intersection / (np.sum(np.maximum(sounding, mask)) + 1e-7))


def frame_curves(logits: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Precision and recall of one frame at each of `THRESHOLDS`, float64 (255,).

  Args:
    logits: (H, W); a pixel sounds if its probability is at least the threshold.
    mask: (H, W), 0 to 1.
  """
  # The number of thresholds that a pixel passes determines at which of them it counts.
  passed = np.searchsorted(THRESHOLDS, probabilities(logits).ravel(), side="right")
  weights = np.asarray(mask, np.float64).ravel()

  def at_least(histogram: np.ndarray) -> np.ndarray:
    return np.cumsum(histogram[::-1])[::-1][1:]

  predicted = at_least(np.bincount(passed, minlength=_NUM_THRESHOLDS + 1))
  hits = at_least(np.bincount(passed, weights, minlength=_NUM_THRESHOLDS + 1))
  return hits / (predicted + 1e-20), hits / (weights.sum() + 1e-20)


def f_score(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
  """F with beta^2 = 0.3; 0 where precision and recall are 0."""
  denominator = _BETA2 * precision + recall
  return np.divide(
    (1 + _BETA2) * precision * recall,
    denominator,
    out=np.zeros_like(denominator),
    where=denominator > 0,
  )


class SoundingScores:
  """M_J and M_F of binary masks (the single-source and the multi-source subset).

  Attributes:
    jaccard: float64 (N,), sum over the frames of each clip.
    frames: int64 (N,), frames of each clip that count.
    f_curves: float64 (N, 255), sum of the F-scores at each threshold over the frames in which
      something sounds.
    sounding_frames: int64 (N,), number of those.
  """

  def __init__(self, num_clips: int):
    self.jaccard = np.zeros(num_clips)
    self.frames = np.zeros(num_clips, np.int64)
    self.f_curves = np.zeros((num_clips, _NUM_THRESHOLDS))
    self.sounding_frames = np.zeros(num_clips, np.int64)

  def update(self, clip: int, logits: np.ndarray, masks: np.ndarray, counted: np.ndarray) -> None:
    """Adds a clip.

    Args:
      clip: its position in the data set.
      logits: (T, H, W).
      masks: (T, H, W), 0 to 1.
      counted: (T,), not 0 for the frames that count.
    """
    for frame in np.flatnonzero(counted):
      self.jaccard[clip] += frame_jaccard(logits[frame], masks[frame])
      self.frames[clip] += 1
      if np.any(masks[frame]):
        self.f_curves[clip] += f_score(*frame_curves(logits[frame], masks[frame]))
        self.sounding_frames[clip] += 1

  def select(self, clips: np.ndarray) -> SoundingScores:
    """The scores of some clips alone."""
    part = SoundingScores(len(clips))
    part.jaccard, part.frames = self.jaccard[clips], self.frames[clips]
    part.f_curves, part.sounding_frames = self.f_curves[clips], self.sounding_frames[clips]
    return part

  def summary(self, clips_per_batch: int = 1) -> dict[str, float]:
    """The measures over all clips that were added.

    Args:
      clips_per_batch: clips in a batch of the reference evaluation: 1 in AVSBench's `test.py`, 4 in
        its `test.sh`, 2 in AVSegFormer.

    Returns:
      `M_J` and `M_F`, means over batches of consecutive clips as the reference computes them
      (a batch without a sounding object has an M_F of 0); `F_dataset`, the best threshold of all
      frames together, which no batch size changes; and `J_frames`, the mean over frames.
    """
    seen = np.flatnonzero(self.frames)
    if not len(seen):
      return {"M_J": 0.0, "M_F": 0.0, "F_dataset": 0.0, "J_frames": 0.0}
    batches = [seen[i : i + clips_per_batch] for i in range(0, len(seen), clips_per_batch)]
    return {
      "M_J": float(np.mean([self.jaccard[b].sum() / self.frames[b].sum() for b in batches])),
      "M_F": float(np.mean([self._best_f(b) for b in batches])),
      "F_dataset": self._best_f(seen),
      "J_frames": float(self.jaccard.sum() / self.frames.sum()),
    }

  def _best_f(self, clips: np.ndarray) -> float:
    frames = self.sounding_frames[clips].sum()
    return float(self.f_curves[clips].sum(axis=0).max() / frames) if frames else 0.0


class SemanticScores:
  """Jaccard index and F-score per class (the semantic subset).

  A class scores in every frame in which it is labelled or predicted; the scores of a class are
  averaged over those frames, and then over the classes.

  Attributes:
    jaccard: float64 (K,), sum over frames.
    f: float64 (K,), sum over frames.
    frames: int64 (K,), frames in which the class was labelled or predicted.
  """

  def __init__(self, num_classes: int):
    self.jaccard = np.zeros(num_classes)
    self.f = np.zeros(num_classes)
    self.frames = np.zeros(num_classes, np.int64)

  def update(self, prediction: np.ndarray, label: np.ndarray) -> None:
    """Adds a frame: class ids (H, W) each."""
    num_classes = len(self.frames)
    pairs = label.astype(np.int64).ravel() * num_classes + prediction.ravel()
    counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    hits, labelled, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    union = labelled + predicted - hits
    self.jaccard += hits / np.maximum(union, 1)
    self.f += f_score(hits / np.maximum(predicted, 1), hits / np.maximum(labelled, 1))
    self.frames += union > 0

  def merge(self, other: SemanticScores) -> None:
    """Adds another accumulator's frames."""
    self.jaccard += other.jaccard
    self.f += other.f
    self.frames += other.frames

  def per_class(self) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard index and F-score float64 (K,); 0 for a class that never occurred."""
    frames = np.maximum(self.frames, 1)
    return self.jaccard / frames, self.f / frames

  def summary(self) -> dict[str, float]:
    """Means over the classes.

    Returns:
      `M_J` and `M_F` over all classes, absent ones as 0; `M_J_seen` and `M_F_seen` over those that
      occurred; `M_J_without_last` and `M_F_without_last`, which the reference logs as "without
      background" although the background is the first class.
    """
    numbers = {}
    for name, scores in zip(("M_J", "M_F"), self.per_class(), strict=True):
      numbers[name] = float(scores.mean())
      numbers[f"{name}_seen"] = float(scores[self.frames > 0].mean()) if self.frames.any() else 0.0
      numbers[f"{name}_without_last"] = float(scores[:-1].mean())
    return numbers

  def table(self, classes: Any) -> str:
    """One line per class that occurred: Jaccard, F and frames; then the means over all classes."""
    width = max(len("class"), *(len(name) for name in classes))
    lines = [f"{'class':<{width}}  {'M_J':>6}  {'M_F':>6}  {'frames':>6}"]
    for name, jaccard, f, frames in zip(classes, *self.per_class(), self.frames, strict=True):
      if frames:
        lines.append(f"{name:<{width}}  {100 * jaccard:6.2f}  {100 * f:6.2f}  {frames:6d}")
    numbers = self.summary()
    lines.append(f"{'mean':<{width}}  {100 * numbers['M_J']:6.2f}  {100 * numbers['M_F']:6.2f}")
    return "\n".join(lines)

  def to_json(self, classes: Any) -> dict[str, Any]:
    """The summary, and `classes`: name -> Jaccard, F and frames; None for an absent class."""
    each = {}
    for name, jaccard, f, frames in zip(classes, *self.per_class(), self.frames, strict=True):
      seen = {"jaccard": float(jaccard), "f": float(f)} if frames else {"jaccard": None, "f": None}
      each[name] = {**seen, "frames": int(frames)}
    return {**self.summary(), "classes": each}
