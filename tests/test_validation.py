"""A finished configuration is checked field by field, and each wrong value ends in one line."""

from __future__ import annotations

import math

import pytest
from flax.traverse_util import flatten_dict

from effseg_jax import configs, evaluators, task_table
from effseg_jax.configs import defaults, schema
from effseg_jax.errors import UserError
from effseg_jax.evaluators.semantic import SemanticEvaluator
from effseg_jax.tasks.audio_visual import MASK_LOSSES
from effseg_jax.tasks.semantic import NORMALIZE_BY, SemanticTask
from effseg_jax.validation import validate

VARIANTS = {"avesformer/s4": ("r50", "lite"), "proscale/overfit": ("r50,111", "swin_tiny,333")}
NAMES = [
  f"{name}{variant and ':'}{variant}"
  for name in configs.names()
  for variant in VARIANTS.get(name, ("",))
]
# None of them is right for every field.
CANDIDATES = (
  "nonsense",
  "(",
  -7,
  0,
  0.5,
  10**12,
  math.nan,
  None,
  (),
  (1,),
  (-1, -1),
  (2.0, 1.0),
  ("(", "x"),
  (("x", "y", "z"),),
)


class Dataset:
  """Stands for an open one."""

  name = "camvid"

  def __init__(self, num_classes):
    self.num_classes = num_classes


def changed(name, **changes):
  """A configuration with other values, of whatever type; `train__batch_size` is a field."""
  config = configs.load(name).copy_and_resolve_references()
  with config.ignore_type(), config.unlocked():
    for field, value in changes.items():
      *path, last = field.split("__")
      section = config
      for part in path:
        section = section[part]
      with section.ignore_type():
        section[last] = value
  return config


def message(config, dataset=None):
  with pytest.raises(UserError) as caught:
    validate(config, dataset)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def kind_of(value):
  """A value of quite another kind."""
  return (7, "x") if isinstance(value, str) else 7 if isinstance(value, tuple) else "nonsense"


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_every_configuration_is_checked(name):
  config = configs.load(name)
  validate(config)
  rules = schema.fields(config.task.name)
  for field, value in flatten_dict(config.to_dict(), sep=".").items():
    rule = rules.get(field)
    if rule is None:
      assert field.startswith(("model.", "data.options.")), f"{field} needs a row in configs.schema"
      wrong = [kind_of(value)]
    else:
      wrong = [candidate for candidate in CANDIDATES if not rule.allows(candidate)]
      assert len(wrong) >= 4
      wrong = wrong[::3]  # all of them take four times as long
    for candidate in wrong:
      said = message(changed(name, **{field.replace(".", "__"): candidate}))
      assert field in said or said.startswith("model: "), (candidate, said)
      assert "expected" in said or said.startswith("model: ")


@pytest.mark.parametrize(
  ("name", "changes", "expected"),
  [
    ("afformer/synthetic", {"eval__best_by": "miou"}, "'miou'; expected .*Did you mean 'mIoU'"),
    ("proscale/synthetic", {"eval__best_by": "PQ", "eval__panoptic": False}, "'PQ'; expected .*AP"),
    ("avesformer/synthetic", {"eval__best_by": "mIoU"}, "expected one of 'M_J'"),
    ("afformer/synthetic", {"train__accumulate": 3}, "is 3; expected a divisor of .* which is 8"),
    ("afformer/synthetic", {"train__accumulate": 0}, "expected a whole number of 1 or more"),
    ("afformer/synthetic", {"train__accumulate": -1}, "expected a whole number of 1 or more"),
    ("afformer/synthetic", {"log__every": -1}, "expected a whole number of 0 or more"),
    ("afformer/synthetic", {"optimizer__name": "adam"}, "Did you mean 'adamw'"),
    ("afformer/synthetic", {"schedule__name": "cosin"}, "Did you mean 'cosine'"),
    ("afformer/synthetic", {"optimizer__name": "sgd"}, "optimizer.momentum is missing"),
    ("afformer/synthetic", {"task__normalize_by": "vaild"}, "Did you mean 'valid'"),
    ("afformer/synthetic", {"on_nonfinite": "ignore"}, "expected 'stop' or 'skip'"),
    ("afformer/synthetic", {"model__dtype": "float16"}, r"'bfloat16' \(float16 would need loss"),
    ("afformer/synthetic", {"model__name": "afformer_tny"}, "no model 'afformer_tny'.*mean"),
    ("afformer/synthetic", {"model__head": "offical"}, "model: head is 'offical'"),
    ("afformer/synthetic", {"task__name": "semantics"}, "Did you mean 'semantic'"),
    ("afformer/synthetic", {"data__augment__flp": 0.5}, "flp has no meaning.*mean 'flip'"),
    ("afformer/folder", {"data__options__ignored": 0}, "ignored has no meaning.*mean 'ignore'"),
    ("afformer/synthetic", {"eval__mode": "slide", "eval__stride": (600, 9)}, "at most eval.crop"),
    ("afformer/synthetic", {"data__augment__ratio": (2.0, 0.5)}, "ascending"),
    ("afformer/imagenet", {"eval__crop": 300}, "expected at most eval.resize, 256"),
    (
      "proscale/synthetic",
      {"eval__panoptic": False, "eval__instance": False, "eval__semantic": False},
      "are all False",
    ),
    ("afformer/synthetic", {"mesh__rules": ((".*", "fsdb"),)}, "entries .*placement"),
    ("afformer/synthetic", {"mesh__data": 0}, "of 1 or more or -1"),
  ],
)
def test_what_a_mistake_says(name, changes, expected):
  with pytest.raises(UserError, match=expected):
    validate(changed(name, **changes))


def test_numbers_are_no_switches():
  assert not schema.Number(0).allows(True)
  assert not schema.Switch().allows(1)
  assert not schema.Number(0, whole=True).allows(2.0)
  assert not schema.Number(0).allows(math.inf)


def test_a_missing_field_is_named():
  config = configs.load("afformer/synthetic")
  del config.train.num_steps
  assert message(config) == "train.num_steps is missing; expected a whole number of 1 or more."


@pytest.mark.parametrize("name", configs.names())
def test_every_semantic_configuration_has_class_weights_to_set(name):
  config = configs.load(name)
  if config.task.name == "semantic":
    assert isinstance(config.task.class_weights, tuple)


def test_class_weights_are_as_many_as_classes():
  config = configs.load("afformer/camvid")
  validate(config, Dataset(11))
  said = message(config, Dataset(3))
  assert "task.class_weights has 11 numbers; expected 3" in said
  # The class itself is used without a configuration.
  with pytest.raises(UserError, match="class_weights has 2 numbers; expected 3"):
    SemanticTask(("a", "b", "c"), ((0, 0, 0),) * 3, class_weights=(1.0, 2.0))
  with pytest.raises(UserError, match=r"normalize_by is 'vaild'.*Did you mean 'valid'"):
    SemanticTask(("a",), ((0, 0, 0),), normalize_by="vaild")


def test_the_metric_must_be_one_of_this_data_set():
  config = changed("avesformer/synthetic", eval__best_by="M_J_frames")
  validate(config)
  assert "expected one of 'M_J', 'M_F', 'F_dataset', 'J_frames'" in message(config, Dataset(1))
  validate(config, Dataset(71))


@pytest.mark.parametrize("name", sorted(defaults.CHOICES["optimizer"]))
@pytest.mark.parametrize("schedule", sorted(defaults.CHOICES["schedule"]))
def test_every_choice_is_complete(name, schedule):
  config = changed("proscale/coco_panoptic", optimizer__name=name, schedule__name=schedule)
  config.lock()
  validate(defaults.complete(config))
  assert config.is_locked


def test_the_schema_has_the_words_of_the_code():
  for task in task_table.TASKS:
    assert set(schema.required(task)) <= set(schema.fields(task))
  assert schema.fields("semantic")["task.normalize_by"].choices == NORMALIZE_BY
  assert schema.fields("audio_visual")["task.mask_loss"].choices == tuple(MASK_LOSSES)
  options = {"panoptic": False, "instance": True, "semantic": True}
  assert "AP50" in evaluators.metric_names("universal", options)
  assert SemanticEvaluator.metric_names({}, None)[0] == "mIoU"
