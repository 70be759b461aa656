"""Multi-scale deformable attention in plain PyTorch, from its formula (arXiv 2010.04159, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def deformable_attention(
  value: torch.Tensor,
  level_sizes: Sequence[tuple[int, int]],
  locations: torch.Tensor,
  weights: torch.Tensor,
) -> torch.Tensor:
  """One `grid_sample` per level, then the weighted sum.

  Args:
    value: (B, S, M, D), tokens of all levels, each row by row.
    level_sizes: (rows, columns) of each level.
    locations: (B, Q, M, L, P, 2), (x, y) from 0 to 1.
    weights: (B, Q, M, L, P).

  Returns:
    (B, Q, M, D).
  """
  batch, _, heads, channels = value.shape
  queries = locations.shape[1]
  samples = []
  tokens = value.split([rows * cols for rows, cols in level_sizes], dim=1)
  for level, (rows, cols) in enumerate(level_sizes):
    maps = tokens[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, rows, cols)
    grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
    samples.append(F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False))
  shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
  total = (torch.cat(samples, dim=-1) * shares).sum(-1)
  return total.reshape(batch, heads, channels, queries).permute(0, 3, 1, 2)
