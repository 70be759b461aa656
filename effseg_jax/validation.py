"""Checks a finished configuration before anything slow happens.

`effseg_jax.configs.schema` defines the valid values of each field on its own. Here is what fields
must be together, with a model, and with a data set.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import effseg_jax
from effseg_jax import evaluators, task_table
from effseg_jax.configs import schema
from effseg_jax.configs.defaults import CHOICES
from effseg_jax.errors import UserError, suggestion
from effseg_jax.input_pipeline import datasets


def validate(config: ConfigDict, dataset: Any = None) -> None:
  """Raises an error for the first field whose value makes no sense.

  Args:
    config: a complete experiment.
    dataset: the open training data, if what belongs to them is checked, too.

  Raises:
    UserError: naming the field, what was found and what is allowed.
  """
  values = flatten_dict(config.to_dict(), sep=".")
  task = values.get("task.name")
  if not isinstance(task, str) or task not in task_table.TASKS:
    raise _wrong("task.name", task, schema.Word(tuple(task_table.TASKS)))
  rules = schema.fields(task)
  for field in schema.required(task):
    if field not in values:
      raise UserError(f"{field} is missing; expected {rules[field].expected}.")
  for field, value in values.items():
    if field in rules and not rules[field].allows(value):
      raise _wrong(field, value, rules[field])
  _check_choices(values)
  _check_parts(values)
  _check_functions(config)
  _check_model(config)
  if dataset is not None:
    _check_data(config, dataset)
  _check_best_by(config, dataset)


def _wrong(field: str, value: Any, rule: schema.Rule) -> UserError:
  guess = ""
  if isinstance(rule, schema.Word) and isinstance(value, str):
    guess = suggestion(value, rule.choices)
  return UserError(f"{field} is {value!r}; expected {rule.expected}.{guess}")


def _check_choices(values: Mapping[str, Any]) -> None:
  """The fields of the chosen optimizer and schedule are there."""
  for section, choices in CHOICES.items():
    name = values[f"{section}.name"]
    for field in choices[name]:
      if f"{section}.{field}" not in values:
        raise UserError(
          f"{section}.{field} is missing, which {section}.name={name} needs;"
          " configs.defaults.complete(config) fills it in."
        )


def _check_parts(values: Mapping[str, Any]) -> None:
  """What belongs together among numbers."""
  batch_size, parts = values["train.batch_size"], values["train.accumulate"]
  if batch_size % parts:
    raise UserError(
      f"train.accumulate is {parts}; expected a divisor of train.batch_size, which is {batch_size}."
    )
  if values.get("eval.mode") == "slide":
    crop, stride = values["eval.crop"], values["eval.stride"]
    if any(step > size for step, size in zip(stride, crop, strict=True)):
      raise UserError(
        f"eval.stride is {stride}; expected at most eval.crop, {crop}: pixels between two windows"
        " would have no class."
      )
  if values["task.name"] == "universal":
    kinds = ("eval.panoptic", "eval.instance", "eval.semantic")
    if not any(values[kind] for kind in kinds):
      raise UserError(f"{', '.join(kinds)} are all False; expected one that is True.")
  if values["task.name"] == "classification" and values["eval.crop"] > values["eval.resize"]:
    raise UserError(
      f"eval.crop is {values['eval.crop']}; expected at most eval.resize, {values['eval.resize']}."
    )


def _check_functions(config: ConfigDict) -> None:
  """Options of the data set and of the augmentation are those of the functions that read them."""
  augment = task_table.find(config.task.name, "transforms")
  _check_arguments(config.data.augment, "data.augment", inspect.signature(augment).parameters)
  if config.data.name in datasets.DATASETS:
    module, _, function = datasets.DATASETS[config.data.name].partition(":")
    opener = getattr(importlib.import_module(module), function or "open_split")
    known = dict(list(inspect.signature(opener).parameters.items())[2:])  # root and split go first
    _check_arguments(config.data.options, "data.options", known)


def _check_arguments(
  section: ConfigDict, path: str, parameters: Mapping[str, inspect.Parameter]
) -> None:
  for name, value in section.items():
    if name not in parameters:
      raise UserError(
        f"{path}.{name} has no meaning here; expected one of {', '.join(parameters) or 'none'}."
        f"{suggestion(name, parameters)}"
      )
    default, kind = parameters[name].default, str(parameters[name].annotation)
    if default is None and kind.startswith("str"):  # `str | None`
      default = ""
    if default is not inspect.Parameter.empty:
      _check_like(f"{path}.{name}", value, default)
  for name, parameter in parameters.items():
    if parameter.default is inspect.Parameter.empty and name not in section:
      raise UserError(f"{path}.{name} is missing.")


def _check_like(field: str, value: Any, default: Any) -> None:
  """Raises `UserError` for a value of another kind than the default."""
  rule = _like(default)
  if rule is not None and not rule.allows(value):
    raise _wrong(field, value, rule)


def _like(default: Any) -> schema.Rule | None:
  """Values of the kind of a default; None where it does not tell."""
  if isinstance(default, bool):
    return schema.Switch()
  if isinstance(default, int):
    return schema.Number(0 if default >= 0 else -float("inf"), whole=True)
  if isinstance(default, float):
    return schema.Number()
  if isinstance(default, str):
    return schema.Text()
  if isinstance(default, tuple | list) and default:
    kinds = {type(item) for item in default}
    item = _like(0.0 if kinds == {int, float} else default[0])
    return None if item is None else schema.Several(item)
  return None


def _check_model(config: ConfigDict) -> None:
  """The model has these fields, of these kinds."""
  fields = {key: value for key, value in config.model.items() if key != "name"}
  fields.setdefault("num_classes", 2)
  default = effseg_jax.create_model(config.model.name, num_classes=2)
  rules = schema.fields(config.task.name)
  for name, value in fields.items():
    if f"model.{name}" not in rules:  # which has been checked by its own rule
      _check_like(f"model.{name}", value, getattr(default, name, None))
  try:
    effseg_jax.create_model(config.model.name, **fields)
  except UserError as error:
    raise UserError(f"model: {error}") from None
  except (TypeError, ValueError, AttributeError) as error:
    raise UserError(f"model: {' '.join(str(error).split())}") from None


def _check_data(config: ConfigDict, dataset: Any) -> None:
  """Class weights are as many as classes."""
  weights = config.task.get("class_weights", ())
  if weights and len(weights) != dataset.num_classes:
    raise UserError(
      f"task.class_weights has {len(weights)} numbers; expected {dataset.num_classes}, one for each"
      f" class of {dataset.name}, or () for 1 each."
    )


def _check_best_by(config: ConfigDict, dataset: Any) -> None:
  """The evaluation gives the metric by which the best checkpoint is chosen."""
  num_classes = None if dataset is None else dataset.num_classes
  known = evaluators.metric_names(config.task.name, config.eval.to_dict(), num_classes)
  if config.eval.best_by not in known:
    raise _wrong("eval.best_by", config.eval.best_by, schema.Word(known))
