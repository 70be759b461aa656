"""Formulations of single operations against each other, in one process, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.report import milliseconds, ratio, table
from effseg_jax.ops.conv import (
  conv,
  depthwise_conv,
  depthwise_conv_grouped,
  depthwise_conv_shifts,
  preferred_formulation,
)
from effseg_jax.ops.cross_entropy import reference_cross_entropy, upsampled_cross_entropy
from effseg_jax.ops.pool import max_pool, max_pool_reduction
from effseg_jax.ops.resize import bilinear_matrix, resize_bilinear

KERNELS = (3, 5, 7, 9, 11, 13, 15)
GRIDS = (16, 32, 64, 128)
# The gradients together are no sum: spectra of the cotangent serve both.
PASSES = ("forward", "input_gradient", "kernel_gradient", "gradients")
FORMULATIONS = ("spatial", "fft")

# A choice that is slower by less than this is no disagreement: it may be the other way next time.
TOLERANCE = 1.1

# A turn lasts at least this long, so that the clock and the loop around the calls do not matter.
_TURN_SECONDS = 5e-3


def filters(
  kernels: Sequence[int], grids: Sequence[int], *, channels: int, batch: int, rounds: int
) -> list[dict[str, Any]]:
  """Times both formulations of a depthwise convolution: forward, each gradient, both together.

  Args:
    kernels: sizes, odd.
    grids: cells a side.
    channels: of the grid.
    batch: grids per call.
    rounds: turns of each formulation.

  Returns:
    One dictionary per pass, kernel and grid: `seconds` per formulation, `ratio` (spatial / fft:
    above 1 the transforms are faster), what is `chosen` by `preferred_formulation`, and whether
    this `disagrees` with the fastest. Where the chosen formulations of the two gradients differ,
    `seconds` has "spatial+fft" or "fft+spatial", too: input, then kernel.
  """
  rows = []
  for purpose in PASSES:
    for size in kernels:
      for grid in grids:
        chosen = _chosen(purpose, size)
        shape = (batch, grid, grid, channels)
        seconds = turns(_filter_programs(purpose, size, shape, chosen), rounds)
        fastest = max(seconds, key=lambda form: ratio(seconds[chosen], seconds[form]))
        rows.append(
          {
            "pass": purpose,
            "kernel": size,
            "grid": grid,
            "seconds": seconds,
            "ratio": ratio(seconds["spatial"], seconds["fft"]),
            "chosen": chosen,
            "disagrees": ratio(seconds[chosen], seconds[fastest]) > TOLERANCE,
          }
        )
  return rows


def filters_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table of `filters`, compared with the choices of `preferred_formulation`."""
  header = ("pass", "kernel", "grid", "spatial ms", "fft ms", "spatial / fft", "chosen")
  header += ("chosen ms", "")
  lines = [
    (
      row["pass"],
      str(row["kernel"]),
      str(row["grid"]),
      milliseconds(row["seconds"]["spatial"])[0],
      milliseconds(row["seconds"]["fft"])[0],
      f"{row['ratio']:.2f}",
      row["chosen"],
      milliseconds(row["seconds"][row["chosen"]])[0],
      "slower" if row["disagrees"] else "",
    )
    for row in rows
  ]
  wrong = sum(row["disagrees"] for row in rows)
  verdict = (
    f"{wrong} of {len(rows)} choices of preferred_formulation are slower here by more than"
    f" {round(100 * (TOLERANCE - 1))} %"
  )
  return f"{table(header, lines)}\n{verdict}"


def _chosen(purpose: str, size: int) -> str:
  """The formulation that `depthwise_conv` chooses."""
  if purpose != "gradients":
    return preferred_formulation(purpose, size)
  first, second = (preferred_formulation(f"{of}_gradient", size) for of in ("input", "kernel"))
  return first if first == second else f"{first}+{second}"


def _filter_programs(
  purpose: str, size: int, shape: tuple[int, ...], chosen: str
) -> dict[str, Callable[[], Any]]:
  """Per formulation, a compiled program that computes one pass and nothing else."""
  keys = jax.random.split(jax.random.key(0), 3)
  x, cotangent = (jax.random.normal(key, shape) for key in keys[:2])
  kernel = jax.random.normal(keys[2], (size, size, 1, shape[-1])) / size

  def one_pass(form: str) -> Callable[[], Any]:
    formulation = form if form in FORMULATIONS else "auto"

    def program(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> Any:
      convolve = lambda x, kernel: depthwise_conv(x, kernel, 1, formulation)  # noqa: E731
      if purpose == "forward":
        return convolve(x, kernel)
      # The compiler removes the gradient that is not returned.
      of_input, of_kernel = jax.vjp(convolve, x, kernel)[1](cotangent)
      if purpose == "gradients":
        return of_input, of_kernel
      return of_input if purpose == "input_gradient" else of_kernel

    return compiled(program, x, kernel, cotangent)[0]

  return {form: one_pass(form) for form in dict.fromkeys((*FORMULATIONS, chosen))}


def operations(rounds: int) -> list[dict[str, Any]]:
  """Times the library's formulation against the plain one, value and gradient.

  Args:
    rounds: turns of each form.

  Returns:
    One dictionary per operation and form: `seconds`, `ratio` (plain / form: above 1 it is faster)
    and `temp_bytes` of the compiled program.
  """
  rows = []
  for name, (plain, forms) in _operation_programs().items():
    seconds = turns({form: program for form, (program, _) in forms.items()}, rounds)
    for form in forms:
      rows.append(
        {
          "operation": name,
          "form": form,
          "seconds": seconds[form],
          "ratio": ratio(seconds[plain], seconds[form]),
          "temp_bytes": forms[form][1],
        }
      )
  return rows


def operations_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table of `operations`."""
  header = ("operation", "form", "median ms", "min ms", "ratio", "temp MB")
  lines = []
  for row in rows:
    temp = row["temp_bytes"]
    median, least = milliseconds(row["seconds"])
    memory = "-" if temp is None else f"{temp / 1e6:.1f}"
    lines.append((row["operation"], row["form"], median, least, f"{row['ratio']:.2f}", memory))
  return table(header, lines, text_columns=2)


Forms = dict[str, tuple[Callable[[], Any], int | None]]


def _operation_programs() -> dict[str, tuple[str, Forms]]:
  """Operation -> the form that the ratios refer to, and all forms, compiled.

  Sizes are those of a training step of the tiny model, 4 images of 256x256 and 150 classes, and
  those of a universal model's map at stride 4 of an image of 800x1088.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  logits = jax.random.normal(keys[0], (4, 32, 32, 150))
  labels = jax.random.randint(keys[1], (4, 256, 256), 0, 150)
  x = jax.random.normal(keys[2], (4, 64, 64, 64))
  kernel = jax.random.normal(keys[3], (3, 3, 1, 64))

  def compile_all(functions: Mapping[str, Callable[..., Any]], *arguments: Any) -> Forms:
    return {name: compiled(function, *arguments) for name, function in functions.items()}

  losses = {"fused": upsampled_cross_entropy, "reference": reference_cross_entropy}
  convolutions = {
    "depthwise_conv": depthwise_conv,
    "shifts, XLA's gradient": depthwise_conv_shifts,
    "grouped convolution": depthwise_conv_grouped,
  }
  resizes = {
    "resize_bilinear": lambda x: resize_bilinear(x, (128, 128)),
    "matrices": lambda x: _resize_by_matrices(x, (128, 128)),
    "jax.image.resize": lambda x: jax.image.resize(
      x, (x.shape[0], 128, 128, x.shape[-1]), "bilinear", antialias=False
    ),
  }
  wide = jax.random.normal(keys[2], (1, 200, 272, 256))
  square = jax.random.normal(keys[3], (1, 1, 256, 256)) / 16
  products = {
    "conv": conv,
    "XLA's convolution": lambda x, kernel: jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
  }
  pools = {"max_pool": max_pool, "XLA's window reduction": max_pool_reduction}
  return {
    "cross-entropy 32 -> 256, 150 classes, value + gradient": (
      "reference",
      compile_all({name: _loss_gradient(loss) for name, loss in losses.items()}, logits, labels),
    ),
    "depthwise 3x3, 4x64x64x64, value": (
      "grouped convolution",
      compile_all(convolutions, x, kernel),
    ),
    "depthwise 3x3, 4x64x64x64, value + gradients": (
      "grouped convolution",
      compile_all({name: _with_gradients(f) for name, f in convolutions.items()}, x, kernel),
    ),
    "bilinear 64 -> 128, 4x64x64x64, value": ("jax.image.resize", compile_all(resizes, x)),
    "bilinear 64 -> 128, 4x64x64x64, value + gradient": (
      "jax.image.resize",
      compile_all({name: _with_gradients(f) for name, f in resizes.items()}, x),
    ),
    "convolution 1x1, 1x200x272x256, value + gradients": (
      "XLA's convolution",
      compile_all({name: _with_gradients(f) for name, f in products.items()}, wide, square),
    ),
    "max pooling 3x3, 1x200x272x256, value + gradient": (
      "XLA's window reduction",
      compile_all({name: _with_gradients(f) for name, f in pools.items()}, wide),
    ),
  }


def _loss_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
  def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(loss(logits, labels)[0]) / labels.size

  return jax.value_and_grad(mean_loss)


def _with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
  """Value and gradients of a function of arrays, for a cotangent that is no constant."""

  def both(*arguments: jax.Array) -> Any:
    value, pullback = jax.vjp(function, *arguments)
    return value, pullback(value)

  return both


def _resize_by_matrices(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  rows, cols = (
    jnp.asarray(bilinear_matrix(n, m), x.dtype) for n, m in zip(size, x.shape[1:3], strict=True)
  )
  return jnp.einsum("rh,cw,bhwk->brck", rows, cols, x)


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Any], int | None]:
  """Compiles a function for its arguments.

  Returns:
    A call that waits for the result, and the bytes of the program's temporaries.
  """
  program = jax.jit(function).lower(*arguments).compile()
  temp_bytes = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
  return lambda: jax.block_until_ready(program(*arguments)), temp_bytes


def turns(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Times programs in turns; returns seconds per call, one number per round.

  Args:
    programs: name -> call that returns when its result is there.
    rounds: turns of each.
  """
  calls = {}
  for name, program in programs.items():
    program()  # the first call allocates
    once = statistics.median(_timed(program, 1) for _ in range(3))
    calls[name] = max(1, min(1000, round(_TURN_SECONDS / once)))
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(rounds):
    for name, program in programs.items():
      program()  # the caches are another's
      seconds[name].append(_timed(program, calls[name]))
  return seconds


def _timed(program: Callable[[], Any], calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    program()
  return (time.perf_counter() - start) / calls
