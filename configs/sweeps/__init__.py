"""Sweeps: one experiment, many changes of it. `effseg sweep` runs them.

A sweep file has `get_sweep() -> Sweep`. A trial is a dictionary from fields of the configuration to
values; the functions here make lists of them, and lists add up with `+`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from effseg_jax.errors import UserError

Trial = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What is run.

  Attributes:
    config: the experiment, as on the command line: `configs/afformer/synthetic.py:tiny`.
    trials: what each run changes in it, by field: `{"optimizer.learning_rate": 1e-3}`.
  """

  config: str
  trials: Sequence[Trial]


def product(values: Mapping[str, Sequence[Any]]) -> list[Trial]:
  """All combinations: the last field varies fastest."""
  return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def together(values: Mapping[str, Sequence[Any]]) -> list[Trial]:
  """The first values of all fields, then the second ones, and so on.

  Raises:
    UserError: if there are not as many of each.
  """
  lengths = {field: len(chosen) for field, chosen in values.items()}
  if len(set(lengths.values())) > 1:
    raise UserError(f"sweeps.together: {lengths} values; expected as many of each field.")
  return [dict(zip(values, chosen, strict=True)) for chosen in zip(*values.values(), strict=True)]


def combined(*lists: Iterable[Trial]) -> list[Trial]:
  """Every trial of one list with every trial of the others."""
  return [
    {field: value for trial in chosen for field, value in trial.items()}
    for chosen in itertools.product(*lists)
  ]


Draw = Callable[[np.random.Generator], Any]


def drawn(count: int, draws: Mapping[str, Draw], seed: int = 0) -> list[Trial]:
  """Random trials; more of them begin with the same ones.

  Args:
    count: of trials.
    draws: `uniform`, `log_uniform` or `one_of`, by field.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)
  return [{field: draw(rng) for field, draw in draws.items()} for _ in range(count)]


def uniform(low: float, high: float) -> Draw:
  """A number between two, three digits long."""
  return lambda rng: _three_digits(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Draw:
  """A number between two whose logarithm is uniform, three digits long."""
  return lambda rng: _three_digits(math.exp(rng.uniform(math.log(low), math.log(high))))


def one_of(values: Sequence[Any]) -> Draw:
  """One of some values."""
  return lambda rng: values[int(rng.integers(len(values)))]


def _three_digits(value: float) -> float:
  return float(f"{value:.3g}")
