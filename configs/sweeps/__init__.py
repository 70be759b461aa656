"""Sweeps: one experiment with many settings. `effseg sweep` runs them.

A sweep file has `get_sweep()`, which returns a `Sweep` (a list of trials, each run to its end) or a
`Search` (a space from which a sampler chooses). A trial is a dictionary from fields of the
configuration to values; `product`, `together`, `combined` and `drawn` make lists of trials, and
lists add up with `+`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from effseg_jax.errors import UserError

Trial = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pruner:
  """When a trial that does badly ends early, judged at each evaluation.

  Attributes:
    name: `none`, `median`, `asha` (successive halving, asynchronous; Li et al., MLSys 2020) or
      `hyperband`.
    first_step: no trial ends before this training step.
    factor: `asha` and `hyperband`: one of so many trials goes from one rung to the next.
    startup_trials: `median`: so many trials run to their end first.
  """

  name: str = "none"
  first_step: int = 1
  factor: int = 3
  startup_trials: int = 5


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A list of trials.

  Attributes:
    config: the experiment, as on the command line: `afformer/synthetic:tiny`.
    trials: what each run changes in it, by field: `{"optimizer.learning_rate": 1e-3}`.
    pruner: ends trials early; by default none.
  """

  config: str
  trials: Sequence[Trial]
  pruner: Pruner = Pruner()


@dataclasses.dataclass(frozen=True)
class Uniform:
  """A number between `low` and `high`; `log`: its logarithm is uniform."""

  low: float
  high: float
  log: bool = False

  def draw(self, rng: np.random.Generator) -> float:
    """A random value, three digits long."""
    if self.log:
      return _three_digits(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
    return _three_digits(rng.uniform(self.low, self.high))

  def suggest(self, trial: Any, name: str) -> float:
    """The value that an Optuna trial's sampler chooses."""
    return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclasses.dataclass(frozen=True)
class Integer:
  """A whole number from `low` to `high`, both included; `log`: its logarithm is uniform."""

  low: int
  high: int
  log: bool = False

  def draw(self, rng: np.random.Generator) -> int:
    """A random value."""
    if self.log:
      low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
      return min(max(round(math.exp(rng.uniform(low, high))), self.low), self.high)
    return int(rng.integers(self.low, self.high + 1))

  def suggest(self, trial: Any, name: str) -> int:
    """The value that an Optuna trial's sampler chooses."""
    return trial.suggest_int(name, self.low, self.high, log=self.log)


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of some values; a value may be a tuple."""

  values: tuple[Any, ...]

  def draw(self, rng: np.random.Generator) -> Any:
    """A random value."""
    return self.values[int(rng.integers(len(self.values)))]

  def suggest(self, trial: Any, name: str) -> Any:
    """The value that an Optuna trial's sampler chooses."""
    texts = [str(value) for value in self.values]  # storages keep plain values alone
    return self.values[texts.index(trial.suggest_categorical(name, texts))]


@dataclasses.dataclass(frozen=True)
class When:
  """A field that exists only while another one has a value.

  Attributes:
    field: the other field, which stands before this one in the space.
    equals: its value.
    values: how this field is chosen then.
  """

  field: str
  equals: Any
  values: Uniform | Integer | Choice


Choices = Uniform | Integer | Choice | When


@dataclasses.dataclass(frozen=True)
class Search:
  """A space and how it is searched.

  Attributes:
    config: the experiment, as on the command line.
    space: field of the configuration -> how its value is chosen.
    trials: how many; `--trials` overrides it.
    sampler: `random`, `tpe`, `gp` (a Gaussian process; needs PyTorch) or `nsga2` (for several
      objectives).
    pruner: ends trials early; by default none. Optuna prunes by a single objective only.
    objectives: what is maximised: `mIoU` (any metric of the evaluation: its best value), or a
      logged number of training, such as `train/images_per_second` (its last value). Empty: the
      experiment's `eval.best_by`.
    seed: of the sampler.
  """

  config: str
  space: Mapping[str, Choices]
  trials: int
  sampler: str = "tpe"
  pruner: Pruner = Pruner()
  objectives: tuple[str, ...] = ()
  seed: int = 0


def product(values: Mapping[str, Sequence[Any]]) -> list[Trial]:
  """All combinations: the last field varies fastest."""
  return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def together(values: Mapping[str, Sequence[Any]]) -> list[Trial]:
  """The first values of all fields, then the second ones, and so on.

  Raises:
    UserError: if the fields have different numbers of values.
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


def drawn(
  count: int, draws: Mapping[str, Uniform | Integer | Choice], seed: int = 0
) -> list[Trial]:
  """Random trials; a larger count begins with the same ones.

  Args:
    count: of trials.
    draws: `uniform`, `log_uniform`, `integer` or `one_of`, by field.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)
  return [{field: draw.draw(rng) for field, draw in draws.items()} for _ in range(count)]


def uniform(low: float, high: float) -> Uniform:
  """A number between two."""
  return Uniform(low, high)


def log_uniform(low: float, high: float) -> Uniform:
  """A number between two whose logarithm is uniform."""
  return Uniform(low, high, log=True)


def integer(low: int, high: int, *, log: bool = False) -> Integer:
  """A whole number from `low` to `high`, both included."""
  return Integer(low, high, log)


def one_of(values: Sequence[Any]) -> Choice:
  """One of some values."""
  return Choice(tuple(values))


def when(field: str, equals: Any, values: Uniform | Integer | Choice) -> When:
  """A field that exists only while another one, named before it, has a value."""
  return When(field, equals, values)


def _three_digits(value: float) -> float:
  return float(f"{value:.3g}")
