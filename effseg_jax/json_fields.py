"""Plain values from JSON, checked against the types of a dataclass: one line for what is wrong."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from effseg_jax.errors import UserError

T = TypeVar("T")


def read_fields(kind: type[T], values: Any, place: str) -> T:
  """Fills a dataclass from JSON; keys that it does not know are left out.

  Args:
    kind: the dataclass.
    values: a JSON object.
    place: where it stands, for messages.

  Raises:
    UserError: for a missing field or a value of another type.
  """
  if not isinstance(values, Mapping):
    raise UserError(f"{place} is {shown(values)}; expected an object with fields.")
  hints, found = typing.get_type_hints(kind), {}
  for field in dataclasses.fields(kind):
    required = field.default is field.default_factory is dataclasses.MISSING
    if field.name not in values:
      if required:
        raise UserError(f"{place} has no {field.name}; expected {described(hints[field.name])}.")
      continue
    value = as_tuples(values[field.name])
    check(value, hints[field.name], f"{place}.{field.name}")
    found[field.name] = value
  return kind(**found)


def check(value: Any, hint: Any, place: str) -> None:
  """Raises `UserError` unless a value, lists as tuples, is of a type."""
  if not fits(value, hint):
    raise UserError(f"{place} is {shown(value)}; expected {described(hint)}.")


def fits(value: Any, hint: Any) -> bool:
  """Whether a value, lists as tuples, is of a type; types that are not plain fit everything."""
  if hint is Any:
    return True
  origin = typing.get_origin(hint)
  if origin in (types.UnionType, typing.Union):
    return any(fits(value, option) for option in typing.get_args(hint))
  if hint is type(None):
    return value is None
  if origin is tuple:
    parts = typing.get_args(hint)
    if not isinstance(value, tuple):
      return False
    if len(parts) == 2 and parts[1] is Ellipsis:
      return all(fits(entry, parts[0]) for entry in value)
    return len(value) == len(parts) and all(map(fits, value, parts))
  if hint is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if hint in (str, bool):
    return isinstance(value, hint)
  return True


def as_tuples(value: Any) -> Any:
  """Lists, at every depth, as tuples."""
  return tuple(map(as_tuples, value)) if isinstance(value, (list, tuple)) else value


def described(hint: Any) -> str:
  """A type in words."""
  names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
  if hint in names:
    return names[hint]
  if typing.get_origin(hint) is tuple:
    parts = typing.get_args(hint)
    if parts[-1] is Ellipsis:
      return f"a list, each entry {described(parts[0])}"
    return f"a list of {len(parts)}, each {described(parts[0])}"
  options = [described(option) for option in typing.get_args(hint) if option is not type(None)]
  return " or ".join(options) or str(hint)


def shown(value: Any) -> str:
  """A value in a message, cut off where it is long."""
  text = repr(_as_lists(value))
  return text if len(text) <= 60 else f"{text[:57]}..."


def _as_lists(value: Any) -> Any:
  return [_as_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value
