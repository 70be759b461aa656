"""Times exported models in ONNX Runtime and OpenVINO: `python -m benchmarks.exported`.

  python -m benchmarks.exported --models=afformer_tiny,afformer_base --size=512
  python -m benchmarks.exported --files=float32.onnx,int8.onnx --size=960x704

Every model is exported with random weights, by this library and, where a PyTorch original is among
the peers, by `torch.onnx.export` from that with the same weights. All sessions run in this process,
in turns, so that whatever disturbs the machine disturbs all of them; what counts is the ratio of
the medians. A session's threads do not spin while another one runs.
"""

from __future__ import annotations

import collections
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

import effseg_jax
from effseg_jax.errors import UserError, friendly_exit
from effseg_jax.export.forms import Form, make_exportable
from effseg_jax.export.onnx_file import write
from effseg_jax.export.writing import to_onnx
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD
from effseg_jax.weights.bundle import Bundle
from effseg_jax.weights.loading import export_weights

flags.DEFINE_list("models", ["afformer_tiny"], "Models of the catalogue.")
flags.DEFINE_list("files", [], "ONNX files to race instead.")
flags.DEFINE_string("size", "512", "Rows and columns, or WIDTHxHEIGHT.")
flags.DEFINE_integer("rounds", 15, "Turns; each contender runs once in a turn.")
flags.DEFINE_integer("threads", 2, "Of each session.")
flags.DEFINE_bool("peers", True, "Whether PyTorch's exports race too.")
flags.DEFINE_string("folder", None, "Where the files are kept; None: nowhere.")


def random_bundle(name: str) -> Bundle:
  """A model of the catalogue with random weights of a plausible magnitude, and a card."""
  model = effseg_jax.create_model(name)
  rng = np.random.default_rng(0)
  inputs = [(1, 64, 64, 3)]
  task = "universal" if name.startswith(("proscale", "mask2former", "eco")) else "semantic"
  if name.startswith("avesformer"):
    task, inputs = "audio_visual", [(1, 1, 64, 64, 3), (1, 1, 96, 64)]

  def draw(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
    if path[-1].key in ("var", "scale"):
      return np.ones(x.shape, np.float32)
    fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 2500.0
    return (rng.standard_normal(x.shape) / np.sqrt(fan_in)).astype(np.float32)

  def shapes() -> Any:
    arrays = [jax.numpy.zeros(shape) for shape in inputs]
    return model.init(jax.random.key(0), *arrays, train=False)

  variables = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(shapes))
  classes = [str(i) for i in range(getattr(model, "num_classes", 1))]
  about = {"name": task, "classes": classes, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
  return Bundle(model, variables, {"model": {"name": name, "fields": {}}, "task": about})


def export_ours(bundle: Bundle, size: tuple[int, int], path: Path) -> None:
  """Writes a file that takes what PyTorch's takes: normalised, channels first."""
  form = Form(size, input="normalised", frames=1)
  write(to_onnx(make_exportable(bundle, form)), path)


def export_peer(bundle: Bundle, size: tuple[int, int], path: Path) -> bool:
  """Writes PyTorch's export of the same function; returns whether there is an original."""
  name = bundle.card["model"]["name"]
  if not name.startswith("afformer_"):
    return False
  import torch

  from benchmarks.peers.afformer_torch import AFFormerTorch

  network = AFFormerTorch(name).eval()
  names = export_weights(bundle.model, bundle.variables)
  network.load_state_dict(
    {key: torch.from_numpy(np.array(x)) for key, x in names.items()}, strict=False
  )
  image = torch.zeros(1, 3, *size)
  with torch.no_grad():
    torch.onnx.export(
      network,
      (image,),
      str(path),
      dynamo=True,
      opset_version=20,
      external_data=False,
      verbose=False,
    )
  return True


def nodes_of(path: Path) -> int:
  """Operators of a graph."""
  import onnx

  return len(onnx.load(str(path), load_external_data=False).graph.node)


def in_onnx_runtime(path: Path, feeds: Sequence[np.ndarray], threads: int) -> Callable[[], Any]:
  """A function that runs a file once."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.add_session_config_entry("session.intra_op.allow_spinning", "0")
  session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
  named = dict(zip((x.name for x in session.get_inputs()), feeds, strict=True))
  return lambda: session.run(None, named)


def in_openvino(path: Path, feeds: Sequence[np.ndarray], threads: int) -> Callable[[], Any]:
  """A function that runs a file once."""
  import openvino

  core = openvino.Core()
  model = core.read_model(str(path))
  model.reshape({x.any_name: feed.shape for x, feed in zip(model.inputs, feeds, strict=True)})
  options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
  options["INFERENCE_PRECISION_HINT"] = "f32"
  request = core.compile_model(model, "CPU", options).create_infer_request()
  return lambda: request.infer(list(feeds))


RUNTIMES = {"ONNX Runtime": in_onnx_runtime, "OpenVINO": in_openvino}


def race(
  paths: dict[str, Path], feeds: Sequence[np.ndarray], rounds: int, threads: int
) -> dict[tuple[str, str], list[float]]:
  """Seconds of every turn, by runtime and contender."""
  runs = {
    (runtime, name): make(path, feeds, threads)
    for runtime, make in RUNTIMES.items()
    for name, path in paths.items()
  }
  seconds = collections.defaultdict(list)
  for run in runs.values():
    run()
  for turn in range(rounds):
    order = list(runs.items())
    for key, run in order if turn % 2 else order[::-1]:
      begin = time.perf_counter()
      run()
      seconds[key].append(time.perf_counter() - begin)
  return seconds


def parse_size(text: str) -> tuple[int, int]:
  """Rows and columns of `512` or `WIDTHxHEIGHT`.

  Raises:
    UserError: if it is neither.
  """
  parts = text.split("x")
  if not all(part.isdigit() for part in parts) or len(parts) > 2:
    raise UserError(f"--size={text}: expected a number or WIDTHxHEIGHT.")
  return int(parts[-1]), int(parts[0])


def report(title: str, paths: dict[str, Path], seconds: dict[tuple[str, str], list[float]]) -> str:
  """Medians, and ratios to the last contender: above 1 is faster."""
  lines = [title]
  last = list(paths)[-1]
  for runtime in RUNTIMES:
    base = statistics.median(seconds[runtime, last])
    for name, path in paths.items():
      median = statistics.median(seconds[runtime, name])
      lines.append(
        f"  {runtime:<13} {name:<12} {1000 * median:9.1f} ms  {base / median:5.2f} x"
        f"  {nodes_of(path)} nodes"
      )
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  """Exports and races."""
  del argv
  values = flags.FLAGS
  with friendly_exit(), tempfile.TemporaryDirectory() as temporary:
    folder = Path(values.folder or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    size, rng = parse_size(values.size), np.random.default_rng(0)
    if values.files:
      paths = {Path(name).stem: Path(name) for name in values.files}
      feeds = [rng.integers(0, 256, (1, *size, 3), np.uint8)]
      seconds = race(paths, feeds, values.rounds, values.threads)
      print(report(values.size, paths, seconds))
      return
    for name in values.models:
      bundle = random_bundle(name)
      paths = {"effseg_jax": folder / f"{name}.onnx"}
      export_ours(bundle, size, paths["effseg_jax"])
      peer = folder / f"{name}_torch.onnx"
      if values.peers and export_peer(bundle, size, peer):
        paths["torch.onnx"] = peer
      feeds = [rng.standard_normal((1, 3, *size)).astype(np.float32)]
      if name.startswith("avesformer"):
        feeds = [feeds[0][:, None], rng.standard_normal((1, 1, 96, 64)).astype(np.float32)]
      seconds = race(paths, feeds, values.rounds, values.threads)
      print(report(f"{name} {values.size}", paths, seconds), flush=True)


if __name__ == "__main__":
  app.run(main)
