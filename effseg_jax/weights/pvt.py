"""PVT v2's official names and ours, in the official order."""

from __future__ import annotations

from collections.abc import Iterator

from effseg_jax.models.backbones.pvt import PVTv2
from effseg_jax.weights import table
from effseg_jax.weights.table import Row

# How names begin in a file that holds a PVT alone, its classifier (`head.`) aside.
BEGINNINGS = tuple(
  f"{module}{stage}." for module in ("patch_embed", "block", "norm") for stage in (1, 2, 3, 4)
)


def rows(backbone: PVTv2, name: str = "backbone", path: str = "params/backbone") -> Iterator[Row]:
  """The official tensors of a PVT v2.

  Args:
    backbone: gives the depths and which stages have a reduction.
    name: prefix of the official names.
    path: of the backbone among our variables.
  """
  for stage, depth in enumerate(backbone.depths):
    embed = f"{name}.patch_embed{stage + 1}"
    yield from table.conv(f"{embed}.proj", f"{path}/embed_{stage}", bias=True)
    yield from table.norm(f"{embed}.norm", f"{path}/embed_norm_{stage}")
    for index in range(depth):
      theirs, ours = f"{name}.block{stage + 1}.{index}", f"{path}/stage_{stage}_block_{index}"
      attention = f"{ours}/attention"
      yield from table.norm(f"{theirs}.norm1", f"{ours}/norm1")
      yield from table.linear(f"{theirs}.attn.q", f"{attention}/query")
      yield from table.linear(f"{theirs}.attn.kv", f"{attention}/key_value")
      yield from table.linear(f"{theirs}.attn.proj", f"{attention}/proj")
      if backbone.reductions[stage] > 1:
        yield from table.conv(f"{theirs}.attn.sr", f"{attention}/reduce", bias=True)
        yield from table.norm(f"{theirs}.attn.norm", f"{attention}/norm")
      yield from table.norm(f"{theirs}.norm2", f"{ours}/norm2")
      yield from table.linear(f"{theirs}.mlp.fc1", f"{ours}/fc1")
      yield from table.conv(f"{theirs}.mlp.dwconv.dwconv", f"{ours}/depthwise", bias=True)
      yield from table.linear(f"{theirs}.mlp.fc2", f"{ours}/fc2")
    yield from table.norm(f"{name}.norm{stage + 1}", f"{path}/norm_{stage}")
