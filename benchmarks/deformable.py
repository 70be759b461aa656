r"""Times deformable attention against PyTorch's formulation, and pixel decoders that use it.

  python -m benchmarks.deformable                            # attention, value and gradients
  python -m benchmarks.deformable --forward --size=256x256
  python -m benchmarks.deformable --what=decoders            # Mask2Former and PRO-SCALE
  python -m benchmarks.deformable --what=exits               # ECO-M2F after 2 to 6 layers

Contenders are separate processes that are timed in turns (see `benchmarks/race.py`); a
ratio is the first contender's median time over the contender's. Sizes are those of an image; the
levels have strides 32, 16 and 8, and the features the channels of a ResNet-50.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.race import Result, race
from effseg_jax import platform
from effseg_jax.errors import UserError, friendly_exit

# Name of a benchmark -> its contenders, the reference of the ratios first.
CONTENDERS = {
  "attention": ("PyTorch grid_sample", "one gather per level", "deformable_attention"),
  "decoders": ("mask2former", "proscale (3, 3, 3)", "proscale (2, 2, 2)", "proscale (1, 1, 1)"),
  "exits": (*(f"exit {number}" for number in (6, 5, 4, 3, 2)), "always 2"),
}
HEADS, POINTS, CHANNELS = 8, 4, 256


def level_sizes(rows: int, cols: int) -> tuple[tuple[int, int], ...]:
  """Rows and columns of the levels of an image, coarse to fine."""
  return tuple((-(-rows // stride), -(-cols // stride)) for stride in (32, 16, 8))


def attention_inputs(
  sizes: Sequence[tuple[int, int]], batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Every token samples points a few pixels around it.

  Returns:
    float32 value (B, S, M, D), locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P), and a
    cotangent (B, Q, M, D).
  """
  from effseg_jax.models.pixel_decoder import reference_points

  rng = np.random.default_rng(0)
  centres = reference_points(tuple(sizes))
  tokens = len(centres)
  shape = (batch, tokens, HEADS, len(sizes), POINTS)
  pixels = np.asarray([(cols, rows) for rows, cols in sizes])
  offsets = 2.5 * rng.standard_normal((*shape, 2)) / pixels[:, None]
  weights = rng.random(shape)
  weights /= weights.sum((-1, -2), keepdims=True)
  value, cotangent = rng.standard_normal((2, batch, tokens, HEADS, CHANNELS // HEADS))
  arrays = value, centres[:, None, :, None] + offsets, weights, cotangent
  return tuple(np.asarray(x, np.float32) for x in arrays)


def _torch_attention(spec: Mapping[str, Any]) -> tuple[Callable[[], Any], None]:
  import torch

  from benchmarks.peers.deformable_torch import deformable_attention

  sizes = level_sizes(*spec["size"])
  *arguments, cotangent = (torch.from_numpy(x) for x in attention_inputs(sizes, spec["batch"]))
  for x in arguments:
    x.requires_grad_(not spec["forward"])

  def run() -> None:
    for x in arguments:
      x.grad = None
    value, locations, weights = arguments
    out = deformable_attention(value, sizes, locations, weights)
    if not spec["forward"]:
      out.backward(cotangent)

  return run, None


def _our_attention(spec: Mapping[str, Any]) -> tuple[Callable[[], Any], float]:
  import jax
  import jax.numpy as jnp

  from effseg_jax.ops import deformable

  plain = spec["name"] == "one gather per level"
  form = deformable.deformable_attention_reference if plain else deformable.deformable_attention
  sizes = level_sizes(*spec["size"])
  value, locations, weights, cotangent = map(jnp.asarray, attention_inputs(sizes, spec["batch"]))
  locations, weights = (jnp.moveaxis(x, 1, -1) for x in (locations, weights))

  def both(value, locations, weights, cotangent):
    apply = lambda v, x, w: form(v, sizes, x, w)  # noqa: E731
    if spec["forward"]:
      return apply(value, locations, weights)
    out, pull = jax.vjp(apply, value, locations, weights)
    return out, pull(cotangent)

  return _compiled(both, value, locations, weights, cotangent)


def _decoder(spec: Mapping[str, Any]) -> tuple[Callable[[], Any], float]:
  import jax
  import jax.numpy as jnp

  from effseg_jax.models.eco import EcoPixelDecoder
  from effseg_jax.models.pixel_decoder import Mask2FormerPixelDecoder
  from effseg_jax.models.proscale import ProScalePixelDecoder

  kind, _, rest = spec["name"].partition(" ")
  if kind == "mask2former":
    decoder = Mask2FormerPixelDecoder()
  elif kind == "proscale":
    decoder = ProScalePixelDecoder(layers=tuple(json.loads(f"[{rest.strip('()')}]")))
  else:
    decoder = EcoPixelDecoder(fixed_exit=int(rest) if kind == "always" else None)
  rng = np.random.default_rng(0)
  grids = [tuple(-(-n // stride) for n in spec["size"]) for stride in (4, 8, 16, 32)]
  features = {
    f"res{index + 2}": jnp.asarray(rng.standard_normal((spec["batch"], *grid, width)), jnp.float32)
    for index, (grid, width) in enumerate(zip(grids, (256, 512, 1024, 2048), strict=True))
  }
  shapes = jax.eval_shape(lambda x: decoder.init(jax.random.key(0), x, False), features)
  fill = lambda x: jnp.asarray(0.05 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
  variables = jax.tree.map(fill, shapes)
  if kind == "exit":  # the gate, the same for all images, chooses it
    gate = variables["params"]["gate"]
    gate["bias"] = 1e3 * jax.nn.one_hot(int(rest) - 2, gate["bias"].size)

  def apply(variables, features):
    if spec["forward"]:
      return decoder.apply(variables, features, False)
    out, pull = jax.vjp(lambda v: decoder.apply(v, features, True), variables)
    return pull(out)

  return _compiled(apply, variables, features)


def _compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Any], float]:
  import jax

  start = time.perf_counter()
  program = jax.jit(function).lower(*arguments).compile()
  seconds = time.perf_counter() - start
  return lambda: jax.block_until_ready(program(*arguments)), seconds


def serve(spec: Mapping[str, Any]) -> None:
  """A worker: builds one contender, then times it on each request."""
  # Libraries may print anything; the parent reads only the messages for it.
  replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  reply = functools.partial(print, file=replies, flush=True)
  platform.tune_host_malloc()
  if spec["name"].startswith("PyTorch"):
    build = _torch_attention
  else:
    build = _our_attention if spec["what"] == "attention" else _decoder
  try:
    run, compile_seconds = build(spec)
    run()
  except Exception as error:
    reply(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}))
    return
  reply(json.dumps({"ready": {"compile_seconds": compile_seconds}}))
  for line in sys.stdin:
    seconds = []
    run()  # not timed: the caches were another contender's
    for _ in range(int(line.split()[1])):
      start = time.perf_counter()
      run()
      seconds.append(time.perf_counter() - start)
    reply(json.dumps({"seconds": seconds, "peak_bytes": None, "device_bytes": None}))


def results_table(results: Mapping[str, Result]) -> str:
  """One line per contender, ratios to the first."""
  reference = next(iter(results.values())).seconds
  rows = []
  for name, result in results.items():
    low, high = report.ratio_range(reference, result.seconds)
    seconds = result.facts["compile_seconds"]
    rows.append(
      (
        name,
        *report.milliseconds(result.seconds),
        f"{report.ratio(reference, result.seconds):.2f}",
        f"{low:.2f}-{high:.2f}",
        "-" if seconds is None else f"{seconds:.1f}",
      )
    )
  header = ("contender", "median ms", "min ms", "ratio", "quartiles", "compile s")
  return report.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
  """Checks the flags, measures, prints."""
  parser = argparse.ArgumentParser(
    description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
  )
  parser.add_argument("--what", default="attention", choices=CONTENDERS, help="is timed")
  parser.add_argument("--forward", action="store_true", help="without gradients")
  parser.add_argument("--size", default="800x1088", help="rows x columns of the image")
  parser.add_argument("--batch", type=int, default=1, help="images per call")
  parser.add_argument("--rounds", type=int, default=10, help="turns of each contender")
  parser.add_argument("--calls", type=int, default=3, help="timed calls in a turn")
  parser.add_argument("--json", default="", help="write all numbers to this file")
  parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.worker:
    serve(json.loads(args.worker))
    return
  with friendly_exit():
    from benchmarks.__main__ import parse_size

    spec = {"what": args.what, "size": parse_size(args.size), "batch": args.batch}
    spec["forward"] = args.forward or args.what == "exits"
    facts = {"machine": report.machine(), "versions": report.versions()}
    worker = [sys.executable, "-m", "benchmarks.deformable", "--worker"]
    results, left_out = race(
      {name: [*worker, json.dumps({**spec, "name": name})] for name in CONTENDERS[args.what]},
      rounds=args.rounds,
      calls=args.calls,
      environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    if not results:
      raise UserError("; ".join(f"{name}: {why}" for name, why in left_out.items()) + ".")
    passes = "value" if spec["forward"] else "value and gradients"
    title = f"{args.what}, {args.batch}x{args.size}, {passes}, {args.rounds} rounds"
    notes = [f"left out: {name}: {why}" for name, why in left_out.items()]
    heading = report.heading(facts["machine"], facts["versions"])
    print(heading, "\n".join([title, results_table(results), *notes]), sep="\n\n")
    if args.json:
      numbers = {name: {**r.facts, "seconds": r.seconds} for name, r in results.items()}
      report.write_json(args.json, f"deformable {args.what}", numbers, facts)


if __name__ == "__main__":
  main()
