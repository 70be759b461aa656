"""Adaptive average pooling with PyTorch's overlapping bins."""

from __future__ import annotations

import numpy as np


def adaptive_average_matrix(size: int, bins: int) -> np.ndarray:
  """Adaptive average pooling along one axis, as a matrix.

  Bin i covers cells `floor(i n / s)` to `ceil((i + 1) n / s) - 1`; bins may overlap, and repeat
  cells where there are more bins than cells.

  Args:
    size: n, number of cells.
    bins: s, number of outputs.

  Returns:
    float64 (bins, size); rows sum to 1.
  """
  matrix = np.zeros((bins, size))
  for i in range(bins):
    begin, end = i * size // bins, -(-(i + 1) * size // bins)
    matrix[i, begin:end] = 1.0 / (end - begin)
  return matrix
