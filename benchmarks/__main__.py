r"""Times our models against their PyTorch originals, and the parts that determine our speed.

  python -m benchmarks                                   # forward pass, tiny, 512x512
  python -m benchmarks --model=afformer_base --against=afformer_base_fft
  python -m benchmarks --model=proscale_swin_tiny --against=mask2former_swin_tiny \
    --size=800x1088 --num_classes=133                         # against Hugging Face's Mask2Former
  python -m benchmarks --model=avesformer_lite --against=avesformer_r50 --size=224x224 \
    --num_classes=1                                           # a frame with its second of sound
  python -m benchmarks --model=segformer_b0              # beside transformers' SegFormer
  python -m benchmarks --train                           # training step, tiny, 4x256x256
  python -m benchmarks --filters                         # Fourier transforms or shifts?
  python -m benchmarks --ops                             # single operations
  python -m benchmarks --data --root=data/camvid         # the input pipeline

Contenders are processes of their own that are timed in turns, A B C A B C; a ratio is the
reference's median time over the contender's: above 1 is faster. How to read the tables, and what
was measured on which machine: docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import effseg_jax
from benchmarks import report
from benchmarks.race import Result, race
from effseg_jax import configs, platform
from effseg_jax.errors import UserError, friendly_exit, require_one_of

# The peers as the tables call them, and the packages that each of them needs.
PEERS = {
  "torch": ("PyTorch eager", ("torch",)),
  "torch_channels_last": ("PyTorch channels_last", ("torch",)),
  "torch_compile": ("PyTorch torch.compile", ("torch",)),
  "segformer_b0": ("SegFormer-B0 (transformers)", ("torch", "transformers")),
  "mask2former": ("Mask2Former (transformers)", ("torch", "transformers")),
}
# The original itself, as it is or as PyTorch can run it faster.
_OF_PYTORCH = ("torch", "torch_channels_last", "torch_compile")
# Beginning of a model's name -> the peers that do something comparable.
_PEERS_OF = {
  "afformer": (*_OF_PYTORCH, "segformer_b0"),
  "segformer": _OF_PYTORCH,
  "efficientvit": _OF_PYTORCH,
  "mask2former": ("mask2former",),
  "proscale": ("mask2former",),
  "eco_m2f": ("mask2former",),
  "avesformer": (),
}
# Families whose original is transformers' own.
_IN_TRANSFORMERS = ("segformer",)
# Families with a training step that is timed.
_TRAINED = ("afformer", "segformer", "efficientvit")
DTYPES = ("float32", "bfloat16")
MODES = ("train", "filters", "ops", "data")


class _Parser(argparse.ArgumentParser):
  """Ends a wrong flag in one line, like every other mistake."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists the flags.")


def specs(args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[str]]:
  """The contenders of a race.

  Args:
    args: the flags.

  Returns:
    Name -> fields of `benchmark_contenders.Spec`, ours first; and a line for each peer that is
    left out because a package is missing.

  Raises:
    UserError: for an unknown model, peer or dtype.
  """
  rows, cols = parse_size(args.size or ("256x256" if args.train else "512x512"))
  common = {
    "rows": rows,
    "cols": cols,
    "batch": args.batch or (4 if args.train else 1),
    "num_classes": args.num_classes,
    "train": args.train,
    "device": args.device,
  }
  chosen: dict[str, dict[str, Any]] = {}
  for text in (args.model, *_words(args.against)):
    model, _, dtype = text.partition(":")
    require_one_of("model", model, effseg_jax.list_models())
    require_one_of("dtype", dtype or args.dtype, DTYPES)
    chosen[text] = {"contender": "ours", "model": model, "dtype": dtype or args.dtype, **common}
  missing = []
  for peer in _peers(args):
    title, packages = PEERS[peer]
    if args.model.startswith(_IN_TRANSFORMERS):
      packages = (*packages, "transformers")
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if absent:
      missing.append(f"left out: {title}: {' and '.join(absent)} not installed")
      continue
    model = args.model.partition(":")[0]
    chosen[peer] = {"contender": peer, "model": model, "dtype": args.torch_dtype, **common}
  return chosen, missing


def _peers(args: argparse.Namespace) -> list[str]:
  """The names of the requested peers, or those that suit the model.

  Raises:
    UserError: if a peer is unknown, or one for models of another kind.
  """
  family = next((name for name in _PEERS_OF if args.model.startswith(name)), None)
  timed = _TRAINED if args.train else tuple(_PEERS_OF)
  if family not in timed:
    kinds = ", ".join(f"{name}_*" for name in timed)
    raise UserError(f"--model={args.model} is not timed here; expected one of {kinds}.")
  known = _PEERS_OF[family]
  if args.peers == "auto":
    return [peer for peer in known if peer != "torch_compile" or args.compile]
  peers = [*_words(args.peers), *(["torch_compile"] if args.compile else [])]
  for peer in peers:
    require_one_of("peer", peer, known)
  return peers


def run_race(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
  """Times models or training steps; returns the text to print and all numbers."""
  chosen, notes = specs(args)
  peers = [name for name in chosen if name in PEERS]
  reference = args.reference or next(iter(peers), args.model)
  require_one_of("--reference", reference, chosen)
  worker = [sys.executable, "-m", "benchmarks.contenders"]
  environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # contenders share an accelerator
  if args.device == "cpu":
    environment["JAX_PLATFORMS"] = "cpu"
  results, left_out = race(
    {name: [*worker, json.dumps(spec)] for name, spec in chosen.items()},
    rounds=args.rounds,
    calls=args.calls,
    environment=environment,
  )
  notes += [f"left out: {_title(name, chosen)}: {why}" for name, why in left_out.items()]
  if reference not in results:
    raise UserError(f"{notes[-1]}. It is the reference; choose another with --reference.")
  numbers = [
    _numbers(name, chosen[name], result, results[reference]) for name, result in results.items()
  ]
  spec = chosen[args.model]
  size = f"{spec['batch']}x{spec['rows']}x{spec['cols']}, {spec['num_classes']} classes"
  title = f"{'training step' if args.train else 'forward pass'}, {size}, {args.rounds} rounds"
  lines = [
    title,
    race_table(numbers),
    f"ratio: median of {_title(reference, chosen)} / median; quartiles over the rounds",
    *notes,
  ]
  return "\n".join(lines), numbers


def _numbers(
  name: str, spec: Mapping[str, Any], result: Result, reference: Result
) -> dict[str, Any]:
  """All that is known of a contender, for table and JSON."""
  return {
    "name": name,
    "title": _title(name, {name: spec}),
    "spec": dict(spec),
    **result.facts,
    "seconds": result.seconds,
    "ratio": report.ratio(reference.seconds, result.seconds),
    "ratio_quartiles": report.ratio_range(reference.seconds, result.seconds),
    "peak_bytes": result.peak_bytes,
    "device_bytes": result.device_bytes,
  }


def race_table(numbers: Sequence[Mapping[str, Any]]) -> str:
  """One line per contender."""
  header = ["contender", "device", "median ms", "min ms", "ratio", "quartiles", "compile s"]
  header += ["peak MB", "temp MB"]
  accelerator = any(entry["device_bytes"] is not None for entry in numbers)
  header += ["device MB"] if accelerator else []
  rows = []
  for entry in numbers:
    low, high = entry["ratio_quartiles"]
    seconds = entry["compile_seconds"]
    row = [
      entry["title"],
      entry["device"].partition(": ")[2],
      *report.milliseconds(entry["seconds"]),
      f"{entry['ratio']:.2f}",
      f"{low:.2f}-{high:.2f}",
      "-" if seconds is None else f"{seconds:.1f}",
      report.megabytes(entry["peak_bytes"]),
      report.megabytes(entry["temp_bytes"]),
    ]
    rows.append(row + ([report.megabytes(entry["device_bytes"])] if accelerator else []))
  return report.table(header, rows, text_columns=2)


def run_filters(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
  """Measures what `ops.conv.preferred_formulation` decides."""
  kernels, grids = (
    parse_numbers(flag, text) for flag, text in (("kernels", args.kernels), ("grids", args.grids))
  )
  even = [size for size in kernels if size % 2 == 0]
  if even:
    raise UserError(f"--kernels: {even[0]} is even; kernels with a centre have odd sizes.")
  title, ops = _on_device(args)
  batch = args.batch or 1
  rows = ops.filters(kernels, grids, channels=args.channels, batch=batch, rounds=args.rounds)
  return f"{title}, {batch} x {args.channels} channels\n{ops.filters_table(rows)}", rows


def run_operations(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
  """Measures single operations."""
  title, ops = _on_device(args)
  rows = ops.operations(args.rounds)
  return f"{title}\n{ops.operations_table(rows)}", rows


def run_data(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
  """Measures the input pipeline."""
  from benchmarks import data as benchmark_data

  platform.tune_host_malloc()  # as training does
  threads = parse_numbers("threads", args.threads)
  config = configs.load(args.config)
  if args.root:
    config.data.root = args.root
  results = benchmark_data.measure(config, threads, images=args.images, rounds=args.rounds)
  return benchmark_data.data_table(results), results


def parse_size(text: str) -> tuple[int, int]:
  """`"512x1024"` -> (512, 1024), rows first.

  Raises:
    UserError: if it is written otherwise, or the models take no image of that size.
  """
  parts = text.lower().split("x")
  if len(parts) != 2 or not all(part.isdigit() and int(part) >= 32 for part in parts):
    raise UserError(
      f"--size={text}: expected rows and columns of at least 32, for example 512x1024."
    )
  return int(parts[0]), int(parts[1])


def parse_numbers(flag: str, text: str) -> list[int]:
  """`"3,5,7"` -> [3, 5, 7].

  Raises:
    UserError: if one of them is no positive integer.
  """
  words = _words(text)
  if not words or not all(word.isdigit() and int(word) > 0 for word in words):
    raise UserError(f"--{flag}={text}: expected positive numbers with commas between them.")
  return [int(word) for word in words]


def _on_device(args: argparse.Namespace) -> tuple[str, Any]:
  """Names the device that jax uses, after the flag and the allocator settings took effect."""
  import jax

  if args.device == "cpu":
    jax.config.update("jax_platforms", "cpu")
  platform.tune_host_malloc()
  from benchmarks import ops as benchmark_ops

  device = jax.devices()[0]
  return f"on {device.platform} ({device.device_kind})", benchmark_ops


def _words(text: str) -> list[str]:
  return [word.strip() for word in text.split(",") if word.strip()]


def _title(name: str, chosen: Mapping[str, Mapping[str, Any]]) -> str:
  spec = chosen[name]
  title = PEERS[name][0] if name in PEERS else spec["model"]
  return title if spec["dtype"] == "float32" else f"{title} {spec['dtype']}"


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
  )
  modes = parser.add_mutually_exclusive_group()
  modes.add_argument("--train", action="store_true", help="time training steps")
  modes.add_argument("--filters", action="store_true", help="time formulations of the filters")
  modes.add_argument("--ops", action="store_true", help="time single operations")
  modes.add_argument("--data", action="store_true", help="time the input pipeline")
  parser.add_argument("--rounds", type=int, default=10, help="turns of each contender")
  parser.add_argument("--device", default="auto", help="auto (an accelerator, if any) or cpu")
  parser.add_argument("--json", default="", help="write all numbers to this file")

  models = parser.add_argument_group("models: forward passes, and --train")
  models.add_argument("--model", default="afformer_tiny", help="ours")
  models.add_argument("--against", default="", help="more of ours: name[:dtype],...")
  models.add_argument("--peers", default="auto", help="of PyTorch, with commas; empty: none")
  models.add_argument("--compile", action="store_true", help="torch.compile is a peer, too")
  models.add_argument("--reference", default="", help="of the ratios: a peer or one of ours")
  models.add_argument("--size", default="", help="rows x columns: 512x512, with --train 256x256")
  models.add_argument("--batch", type=int, default=0, help="images: 1, with --train 4")
  models.add_argument("--num_classes", type=int, default=150, help="of all models")
  models.add_argument("--dtype", default="float32", help="ours compute in this, or in bfloat16")
  models.add_argument("--torch_dtype", default="float32", help="bfloat16: by autocast")
  models.add_argument("--calls", type=int, default=3, help="timed calls in a turn")

  filters = parser.add_argument_group("--filters (and --batch)")
  filters.add_argument("--kernels", default="3,5,7,9,11,13,15", help="sizes")
  filters.add_argument("--grids", default="16,32,64,128", help="cells a side")
  filters.add_argument("--channels", type=int, default=64, help="of the grid")

  data = parser.add_argument_group("--data")
  data.add_argument("--config", default="configs/afformer/camvid.py", help="file[:variant]")
  data.add_argument("--root", default="", help="of the data set, instead of the experiment's")
  data.add_argument("--threads", default="1,2,4", help="numbers of threads")
  data.add_argument("--images", type=int, default=256, help="per turn")
  return parser


def _check(args: argparse.Namespace) -> None:
  for flag in ("rounds", "calls", "channels", "images"):
    if getattr(args, flag) < 1:
      raise UserError(f"--{flag}={getattr(args, flag)}: expected 1 or more.")
  if args.batch < 0:
    raise UserError(f"--batch={args.batch}: expected 1 or more.")
  if not 1 <= args.num_classes <= 254:
    raise UserError(f"--num_classes={args.num_classes}: expected 1 to 254, labels are bytes.")
  require_one_of("--device", args.device, ("auto", "cpu"))
  require_one_of("--torch_dtype", args.torch_dtype, DTYPES)


def main(argv: Sequence[str] | None = None) -> None:
  """Checks the flags, measures, prints."""
  with friendly_exit():
    args = _parser().parse_args(argv)
    _check(args)
    facts = {"machine": report.machine(), "versions": report.versions()}
    mode = next((mode for mode in MODES if getattr(args, mode)), "inference")
    run = {"filters": run_filters, "ops": run_operations, "data": run_data}.get(mode, run_race)
    text, results = run(args)
    print(report.heading(facts["machine"], facts["versions"]), text, sep="\n\n")
    if args.json:
      report.write_json(args.json, mode, results, facts)


if __name__ == "__main__":
  main()
