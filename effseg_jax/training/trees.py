"""Names for the leaves of a tree, and the regular expressions that choose among them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from effseg_jax.errors import UserError


def leaf_names(tree: Any) -> list[str]:
  """Returns one path per leaf, in `jax.tree.leaves` order: `backbone/stem_0/conv/kernel`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [_name(path) for path, _ in leaves]


def fingerprint(tree: Any) -> str:
  """SHA-256 of names and float32 values: the same for equal weights in any file format."""
  found = hashlib.sha256()
  for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
    found.update(name.encode())
    found.update(np.ascontiguousarray(leaf, np.float32).tobytes())
  return found.hexdigest()


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
  """Maps `function(name, leaf)` over a tree."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: function(_name(path), leaf), tree)


def own_name(name: str, known: Collection[str]) -> str:
  """The parameter's own name inside a longer one: `head/kernel` of `opt_state/0/mu/head/kernel`.

  Args:
    name: of a leaf of the training state.
    known: names of parameters and statistics, without their collection.

  Returns:
    The longest end of `name` that is known, or all of it.
  """
  parts = name.split("/")
  ends = ("/".join(parts[begin:]) for begin in range(len(parts)))
  return next((end for end in ends if end in known), name)


def without_collection(name: str) -> str:
  """`backbone/norm/mean` of `batch_stats/backbone/norm/mean`."""
  return name.partition("/")[2]


def first_match(rules: Sequence[tuple[str, Any]], name: str, default: Any) -> Any:
  """Returns the value of the first `(pattern, value)` whose pattern is found in `name`."""
  for pattern, value in rules:
    if re.search(pattern, name):
      return value
  return default


def check_patterns(patterns: Iterable[str], names: Sequence[str], setting: str) -> None:
  """Raises `UserError` for a pattern that matches no name: it would silently do nothing.

  Args:
    patterns: regular expressions, used with `re.search`.
    names: leaf names of the parameters.
    setting: the configuration field the patterns come from, for the message.
  """
  for pattern in patterns:
    try:
      found = any(re.search(pattern, name) for name in names)
    except re.error as error:
      raise UserError(f"{setting}: {pattern!r} is not a regular expression ({error}).") from None
    if not found:
      examples = ", ".join(names[:: max(1, len(names) // 4)][:4])
      raise UserError(
        f"{setting}: {pattern!r} matches no parameter; names look like {examples}, ..."
      )


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
