"""Which values the fields of a configuration may have.

Fields are named by their path, `train.batch_size`. Fields of `model`, `data.options` and
`data.augment` without a row here are compared with the defaults of the model, the data set and the
augmentation that read them. What belongs together (class weights and classes, say) is checked by
`effseg_jax.validation`, too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from effseg_jax.configs.defaults import CHOICES


class Rule(Protocol):
  """The valid values of a field."""

  def allows(self, value: Any) -> bool:
    """Whether the field may have this value."""

  @property
  def expected(self) -> str:
    """The allowed values in words: "a whole number, 1 or more"."""


@dataclasses.dataclass(frozen=True)
class Number:
  """A number between bounds.

  Attributes:
    low: the least.
    high: the greatest.
    whole: whether it has to be an integer.
    open_low: whether `low` itself is excluded.
    open_high: whether `high` itself is excluded.
    also: a value beyond the bounds that is allowed, too.
  """

  low: float = -math.inf
  high: float = math.inf
  whole: bool = False
  open_low: bool = False
  open_high: bool = False
  also: float | None = None

  def allows(self, value: Any) -> bool:
    """Numbers that are finite and within the bounds; True and False are none."""
    kinds = int if self.whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
      return False
    if value == self.also:
      return True
    above = value > self.low if self.open_low else value >= self.low
    below = value < self.high if self.open_high else value <= self.high
    return above and below

  @property
  def expected(self) -> str:
    """The bounds in words."""
    words = ["a whole number" if self.whole else "a number"]
    if self.low > -math.inf and self.high < math.inf:
      words.append(f"from {self.low:g}" + (" (excluded)" if self.open_low else ""))
      words.append(f"to {self.high:g}" + (" (excluded)" if self.open_high else ""))
    elif self.low > -math.inf:
      words.append(f"above {self.low:g}" if self.open_low else f"of {self.low:g} or more")
    if self.also is not None:
      words.append(f"or {self.also:g}")
    return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Word:
  """One of some words.

  Attributes:
    choices: which.
    note: why another one that people try is not among them.
  """

  choices: tuple[str, ...]
  note: str = ""

  def allows(self, value: Any) -> bool:
    """The words themselves."""
    return isinstance(value, str) and value in self.choices

  @property
  def expected(self) -> str:
    """The words."""
    many = "one of " if len(self.choices) > 2 else ""
    between = ", " if many else " or "
    return many + between.join(map(repr, self.choices)) + (f" ({self.note})" if self.note else "")


@dataclasses.dataclass(frozen=True)
class Text:
  """Any string.

  Attributes:
    pattern: whether it has to be a regular expression.
  """

  pattern: bool = False

  def allows(self, value: Any) -> bool:
    """Strings, and regular expressions that compile."""
    if not isinstance(value, str):
      return False
    try:
      return not self.pattern or bool(re.compile(value))
    except re.error:
      return False

  @property
  def expected(self) -> str:
    """In words."""
    return "a regular expression" if self.pattern else "a text"


@dataclasses.dataclass(frozen=True)
class Switch:
  """True or False."""

  expected: str = "True or False"

  def allows(self, value: Any) -> bool:
    """Those two alone."""
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Several:
  """A tuple of values of one kind.

  Attributes:
    item: valid values of each.
    length: how many; None: any number.
    least: how many there are at least.
    ascending: whether none may be smaller than the one before.
  """

  item: Rule
  length: int | None = None
  least: int = 0
  ascending: bool = False

  def allows(self, value: Any) -> bool:
    """Tuples (lists, read from JSON) whose items are allowed."""
    if not isinstance(value, tuple | list) or not all(map(self.item.allows, value)):
      return False
    if len(value) < self.least or len(value) != (self.length or len(value)):
      return False
    return not self.ascending or list(value) == sorted(value)

  @property
  def expected(self) -> str:
    """In words."""
    count = f"{self.length} values" if self.length else "a tuple"
    if self.least:
      count += f" of {self.least} or more"
    order = ", ascending" if self.ascending else ""
    return f"{count}, each {self.item.expected}{order}"


@dataclasses.dataclass(frozen=True)
class Entries:
  """A tuple of tuples of one form, of rules by name for example.

  Attributes:
    items: valid values of the parts of an entry.
    form: an entry, for messages.
  """

  items: tuple[Rule, ...]
  form: str

  def allows(self, value: Any) -> bool:
    """Tuples of such entries."""
    return isinstance(value, tuple | list) and all(map(self._allows_entry, value))

  def _allows_entry(self, entry: Any) -> bool:
    if not isinstance(entry, tuple | list) or len(entry) != len(self.items):
      return False
    return all(rule.allows(part) for rule, part in zip(self.items, entry, strict=True))

  @property
  def expected(self) -> str:
    """In words."""
    return f"a tuple of entries {self.form}"


@dataclasses.dataclass(frozen=True)
class Sides:
  """One side of a square, or rows and columns."""

  expected: str = "a whole number, 1 or more, or (rows, columns)"

  def allows(self, value: Any) -> bool:
    """One number or two."""
    return _COUNT.allows(value) or _SIZE.allows(value)


@dataclasses.dataclass(frozen=True)
class Changes:
  """Arguments that are others for some parameters."""

  expected: str = "a mapping of names to numbers"

  def allows(self, value: Any) -> bool:
    """Mappings of names to numbers."""
    return isinstance(value, Mapping) and all(
      isinstance(name, str) and _WEIGHT.allows(number) for name, number in value.items()
    )


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where a parameter lies, see `training.sharding.Rule`."""

  expected: str = "'replicate', 'fsdp' or a tuple of axes"

  def allows(self, value: Any) -> bool:
    """Two words, or an axis or None for each dimension."""
    if isinstance(value, str):
      return value in ("replicate", "fsdp")
    axes = ("data", "fsdp", "model", None)
    return isinstance(value, tuple | list) and all(axis in axes for axis in value)


_COUNT = Number(1, whole=True)
_NATURAL = Number(0, whole=True)  # 0: never, or none
_POSITIVE = Number(0, open_low=True)
_WEIGHT = Number(0)
_SHARE = Number(0, 1)
_BELOW_ONE = Number(0, 1, open_high=True)
_DEVICES = Number(1, whole=True, also=-1)
_SIZE = Several(_COUNT, 2)
_BY_NAME = Entries((Text(pattern=True), _WEIGHT), "('regular expression', factor)")
_STATISTICS = Several(Number(0, 255), 3)

_EVERY_TASK: dict[str, Rule] = {
  "seed": Number(0, 2**32 - 1, whole=True),
  "init_from": Text(),
  "on_nonfinite": Word(("stop", "skip")),
  "mesh.data": _DEVICES,
  "mesh.fsdp": _DEVICES,
  "mesh.model": _DEVICES,
  "mesh.rules": Entries((Text(pattern=True), Placement()), "('regular expression', placement)"),
  "checkpoint.every": _NATURAL,
  "checkpoint.keep": _COUNT,
  "log.every": _NATURAL,
  "watch.stall_seconds": _WEIGHT,
  "watch.heartbeat": _WEIGHT,
  "model.name": Text(),
  "model.dtype": Word(
    ("float32", "bfloat16"), "float16 would need loss scaling, which there is none of"
  ),
  "model.remat": Switch(),
  "model.image_size": Sides(),
  "model.dropout": _BELOW_ONE,
  "model.drop_path": _BELOW_ONE,
  "task.name": Text(),
  "task.mean": _STATISTICS,
  "task.std": Several(Number(0, 255, open_low=True), 3),
  "data.name": Text(),
  "data.root": Text(),
  "data.train_split": Text(),
  "data.num_threads": _COUNT,
  "data.num_workers": _NATURAL,
  "data.on_error": Word(("raise", "skip")),
  "data.check": Word(("on", "off")),
  "data.mixture": Entries((Text(), Text(), Text(), _POSITIVE), "('name', 'root', 'split', weight)"),
  "data.augment.flip": _SHARE,
  "data.augment.photometric": Switch(),
  "train.batch_size": _COUNT,
  "train.num_steps": _COUNT,
  "train.accumulate": _COUNT,
  "train.average_decay": _BELOW_ONE,
  "optimizer.name": Word(tuple(CHOICES["optimizer"])),
  "optimizer.learning_rate": _WEIGHT,
  "optimizer.weight_decay": _WEIGHT,
  "optimizer.clip_norm": _WEIGHT,
  "optimizer.lr_rules": _BY_NAME,
  "optimizer.decay_rules": _BY_NAME,
  "optimizer.layer_decay": Number(0, 1, open_low=True),
  "optimizer.freeze": Several(Text(pattern=True)),
  "optimizer.b1": _BELOW_ONE,
  "optimizer.b2": _BELOW_ONE,
  "optimizer.eps": _POSITIVE,
  "optimizer.momentum": _BELOW_ONE,
  "schedule.name": Word(tuple(CHOICES["schedule"])),
  "schedule.power": _POSITIVE,
  "schedule.end": _WEIGHT,
  # Steps, or below 1 shares of the training.
  "schedule.milestones": Several(_POSITIVE, least=1, ascending=True),
  "schedule.factor": _POSITIVE,
  "schedule.delay": _NATURAL,
  "schedule.ramp": _COUNT,
  "schedule.groups": Entries((Text(pattern=True), Changes()), "('regular expression', {...})"),
  "schedule.warmup_steps": _NATURAL,
  "schedule.warmup_ratio": _SHARE,
  "eval.split": Text(),
  "eval.batch_size": _COUNT,
  "eval.every": _NATURAL,
  "eval.best_by": Text(),
  "eval.pictures": _NATURAL,
}

_OF_TASK: dict[str, dict[str, Rule]] = {
  "semantic": {
    "task.normalize_by": Word(("all", "valid")),
    "task.class_weights": Several(_WEIGHT),
    "task.aux_weight": _WEIGHT,
    "data.augment.scale": _SIZE,
    "data.augment.ratio": Several(_POSITIVE, 2, ascending=True),
    "data.augment.crop": _SIZE,
    "data.augment.max_class_share": Number(0, 1, open_low=True),
    "data.augment.mix": Word(("", "classmix", "cutmix")),
    "data.augment.mix_probability": _SHARE,
    "eval.scale": Several(_NATURAL, 2),
    "eval.multiple": _COUNT,
    "eval.mode": Word(("whole", "slide")),
    "eval.crop": _SIZE,
    "eval.stride": _SIZE,
    "eval.scales": Several(_POSITIVE, least=1),
    "eval.flip": Switch(),
    "eval.interpolation": Word(("bilinear", "bicubic")),
  },
  "classification": {
    "task.label_smoothing": _BELOW_ONE,
    "task.mixup": _WEIGHT,
    "task.cutmix": _WEIGHT,
    "data.augment.size": _COUNT,
    "data.augment.area": Several(Number(0, 1, open_low=True), 2, ascending=True),
    "data.augment.randaugment": Several(_WEIGHT, 2),
    "data.augment.erasing": _SHARE,
    "eval.resize": _COUNT,
    "eval.crop": _COUNT,
  },
  "universal": {
    "model.norm": Word(("frozen_bn", "bn")),
    "model.num_queries": _COUNT,
    "model.features": _COUNT,
    "model.heads": _COUNT,
    "model.depth": _COUNT,
    "model.window": _COUNT,
    "model.backbone_features": _COUNT,
    "model.backbone_depths": Several(_COUNT),
    "model.backbone_heads": Several(_COUNT),
    "model.encoder_layers": _NATURAL,
    "model.encoder_mlp_features": _COUNT,
    "model.decoder_layers": _NATURAL,
    "model.decoder_mlp_features": _COUNT,
    "model.proscale_layers": Several(_NATURAL, 3),
    "task.class_weight": _WEIGHT,
    "task.mask_weight": _WEIGHT,
    "task.dice_weight": _WEIGHT,
    "task.no_object_weight": _WEIGHT,
    "task.num_points": _COUNT,
    "task.oversample_ratio": Number(1),
    "task.importance_ratio": _SHARE,
    "task.black_padding": Switch(),
    "task.mask_blocks": _NATURAL,
    "task.annealing_steps": _NATURAL,
    "data.augment.kind": Word(("lsj", "shortest_edge", "eomt")),
    "data.augment.crop": _SIZE,
    "data.augment.scale": Several(_POSITIVE, 2, ascending=True),
    "data.augment.short_side": _COUNT,
    "data.augment.max_segments": Number(1, 255, whole=True),
    "data.augment.layers": _COUNT,
    "data.augment.keep_empty": Switch(),
    "data.augment.pad_as_picture": Switch(),
    "eval.fit": Several(_NATURAL, 2),
    "eval.window_side": _NATURAL,
    "eval.short_side": _NATURAL,
    "eval.max_size": _COUNT,
    "eval.multiple": _COUNT,
    "eval.panoptic": Switch(),
    "eval.instance": Switch(),
    "eval.semantic": Switch(),
    "eval.score_threshold": _SHARE,
    "eval.overlap_threshold": _SHARE,
    "eval.detections": _COUNT,
  },
  "audio_visual": {
    "task.mask_loss": Word(("dice", "bce", "bce_dice")),
    "task.mix_weight": _WEIGHT,
    "data.augment.size": _SIZE,
    "data.augment.frames": _NATURAL,
    "data.augment.fit": Word(("stretch", "centre", "random")),
    "data.augment.ratio": Several(_POSITIVE, 2, ascending=True),
    "data.augment.gain": _WEIGHT,
    "data.augment.pitch": _NATURAL,
    "data.augment.stripes": Several(_NATURAL, 2),
    "eval.size": _SIZE,
    "eval.mask_size": _SIZE,
    "eval.clips_per_batch": _COUNT,
  },
}

_OF_TASK["semantic_ssa"] = {
  **_OF_TASK["semantic"],
  "task.distill": _WEIGHT,
  "task.boundary_width": Number(2, whole=True),
  "task.as_printed": Switch(),
}

_OF_TASK["class_masks"] = {
  field: rule for field, rule in _OF_TASK["semantic"].items() if not field.startswith("task.")
}

# Fields that have a default where they are read; all others of a task are required.
_OPTIONAL = (
  *("model.", "task.", "data.augment.", "data.options.", "data.mixture", "eval.pictures"),
  *("eval.interpolation", "data.check", "eval.fit", "eval.window_side"),
  *("optimizer.layer_decay", "schedule.groups"),
)


def fields(task: str) -> Mapping[str, Rule]:
  """The rules of a task's configurations, by field.

  Args:
    task: `semantic`, `classification`, `universal` or `audio_visual`.
  """
  return {**_EVERY_TASK, **_OF_TASK.get(task, {})}


def required(task: str) -> list[str]:
  """The fields that every configuration of a task has, independent of its choices."""
  chosen = {
    f"{section}.{field}"
    for section, choices in CHOICES.items()
    for own in choices.values()
    for field in own
  }
  needed = [field for field in fields(task) if field not in chosen]
  return ["model.name", *(field for field in needed if not field.startswith(_OPTIONAL))]
