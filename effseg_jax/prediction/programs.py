"""Compiled programs by the shapes that they are for; a limited number of them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any

import jax


class Programs:
  """Compiles a function for a shape once, and keeps the programs that were used last.

  Attributes:
    compiled: how many were compiled so far.
  """

  def __init__(self, limit: int = 48):
    """Keeps at most `limit` programs: a folder of many sizes must not fill the memory."""
    self._kept: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()
    self._limit = limit
    self.compiled = 0

  def get(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """The compiled function.

    Args:
      key: says which function and which shapes.
      function: pure; compiled ahead of its first call, so that what is timed is running it.
      *arguments: of the shapes that it will be called with.
    """
    if key not in self._kept:
      self._kept[key] = jax.jit(function).lower(*arguments).compile()
      self.compiled += 1
      if len(self._kept) > self._limit:
        self._kept.popitem(last=False)
    self._kept.move_to_end(key)
    return self._kept[key]
