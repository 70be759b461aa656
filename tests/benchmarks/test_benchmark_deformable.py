"""The peer computes the same; contenders are built and take turns; times are never tested."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import deformable as benchmark
from benchmarks.race import Result
from effseg_jax.ops.deformable import deformable_attention


def test_levels_of_an_image():
  assert benchmark.level_sizes(800, 1088) == ((25, 34), (50, 68), (100, 136))


def test_the_peer_is_the_same_function():
  torch = pytest.importorskip("torch")
  from benchmarks.peers import deformable_torch

  sizes = benchmark.level_sizes(64, 96)
  value, locations, weights, cotangent = benchmark.attention_inputs(sizes, batch=2)
  theirs = [torch.tensor(x, requires_grad=True) for x in (value, locations, weights)]
  out = deformable_torch.deformable_attention(theirs[0], sizes, *theirs[1:])
  out.backward(torch.tensor(cotangent))

  @jax.jit
  def run(value, locations, weights, cotangent):
    queries_last = lambda x: jnp.moveaxis(x, 1, -1)  # noqa: E731
    ours = lambda v, x, w: deformable_attention(v, sizes, queries_last(x), queries_last(w))  # noqa: E731
    out, pull = jax.vjp(ours, value, locations, weights)
    return out, *pull(cotangent)

  found = run(value, locations, weights, cotangent)
  expected = [out.detach(), *(x.grad for x in theirs)]
  for a, b in zip(found, expected, strict=True):
    b = b.numpy()
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_the_table_compares_with_the_first():
  results = {
    "peer": Result({"compile_seconds": None}, [2.0, 4.0]),
    "ours": Result({"compile_seconds": 1.5}, [1.0, 1.0]),
  }
  lines = benchmark.results_table(results).splitlines()
  assert lines[1].split() == ["peer", "3000.00", "2000.00", "1.00", "1.00-1.00", "-"]
  assert lines[2].split() == ["ours", "1000.00", "1000.00", "3.00", "2.50-3.50", "1.5"]


def test_a_wrong_size_ends_in_one_line(capsys):
  with pytest.raises(SystemExit) as stopped:
    benchmark.main(["--size=wide"])
  assert stopped.value.code == 2
  assert "--size=wide" in capsys.readouterr().err
