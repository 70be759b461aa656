"""The functions of `clu`, whose last release was in 2024; the only module that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from effseg_jax.errors import extra

with extra("train"):
  from clu import metrics, parameter_overview


def mean(values: Sequence[float] | np.ndarray) -> float:
  """The mean of a window's values of one scalar, computed in float32."""
  return float(metrics.Average.from_model_output(np.array(values)).compute())


def parameter_table(variables: Any) -> str:
  """A table of all parameters: name, shape, dtype, size, mean and standard deviation."""
  return parameter_overview.get_parameter_overview(variables)
