"""Measures the exits of an ECO-M2F and trains its gate: steps B and C of the paper.

  python tools/train_gate.py --config=configs/eco_m2f/coco_panoptic.py:swin_tiny --beta=0.02 \
    --config.data.root=data/coco --checkpoint=runs/eco --output=eco.safetensors

Step B: every training image is segmented once through every exit; its panoptic quality after each,
and the gate's inputs go into `eco.exits.npz` beside the output. An interrupted call resumes
on, and a call with another `--beta` and the same `--output` reads the file and measures nothing.

Step C: the gate, a linear layer, learns by cross-entropy to choose the exit of the largest
quality - beta * layers. Nothing else of the model changes, so it sees stored features: seconds, not
days. Printed are the quality of each exit, how often it is chosen, and what the gate makes of them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from effseg_jax import experiment, platform
from effseg_jax.cli import Flags, define_config, execute_module, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.evaluators.universal import mask_inference_options
from effseg_jax.inference.segments import panoptic_result, segment_on_host
from effseg_jax.input_pipeline import pipelines
from effseg_jax.metrics.panoptic import PanopticQuality
from effseg_jax.models.eco import FIRST_EXIT, EcoPixelDecoder, best_exits, gate_loss
from effseg_jax.run.saved_model import load_for_inference
from effseg_jax.tasks.universal import UniversalTask
from effseg_jax.training import trees
from effseg_jax.weights.bundle import Bundle, save_bundle

_SAVE_EVERY = 200  # batches


@dataclasses.dataclass(frozen=True)
class Exits:
  """Measurements of the exits on N images.

  Attributes:
    index: int32 (N,), of the image in its split.
    inputs: float32 (N, C), of the gate.
    quality: float32 (N, K), panoptic quality of the image after each exit, 0 to 1.
    weights: fingerprint of the model's.
  """

  index: np.ndarray
  inputs: np.ndarray
  quality: np.ndarray
  weights: str

  def save(self, path: Path) -> None:
    """Writes the file whole or not at all."""
    new = path.with_suffix(".part")
    with new.open("wb") as file:
      np.savez(file, **dataclasses.asdict(self))
    os.replace(new, path)


def read_exits(path: Path, weights: str) -> Exits | None:
  """Reads earlier measurements, if there are any.

  Raises:
    UserError: if the file cannot be read or is of another model.
  """
  if not path.is_file():
    return None
  try:
    with np.load(path, allow_pickle=False) as file:
      found = Exits(file["index"], file["inputs"], file["quality"], str(file["weights"]))
  except (OSError, ValueError, KeyError, EOFError) as error:
    raise UserError(f"{path} cannot be read ({error}); delete it to measure anew.") from None
  if found.weights != weights:
    raise UserError(
      f"{path} was measured with other weights than those of --checkpoint; delete it to measure"
      " anew, or choose another --output."
    )
  return found


def measure_exits(config: ConfigDict, bundle: Bundle, split: str, path: Path) -> Exits:
  """Step B: the quality of every image of a split after each exit.

  Args:
    config: says which data, and how images are seen and masks are read.
    bundle: a trained ECO-M2F.
    split: of the data.
    path: file of the measurements; those in it are not repeated.

  Returns:
    All images of the split, in their order.

  Raises:
    UserError: if the data have no panoptic truth, or a file is broken.
  """
  dataset = experiment.open_dataset(config, split)
  task = experiment.make_task(config.task, dataset)
  options = {**config.eval.to_dict(), "panoptic": True, "instance": False, "semantic": False}
  inference = mask_inference_options(options, task)
  batches = pipelines.eval_batches(
    config.task.name,
    dataset,
    options,
    batch_size=config.eval.batch_size,
    num_threads=config.data.num_threads,
    on_error=config.data.on_error,
  )
  depths = exit_depths(bundle.model)
  variables = jax.device_put(bundle.variables)
  programs = [_program(bundle.model, task, depth) for depth in depths]
  weights = trees.fingerprint(bundle.variables)
  rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
  if known := read_exits(path, weights):
    rows |= zip(known.index.tolist(), zip(known.inputs, known.quality, strict=True), strict=True)

  def collected() -> Exits:
    order = sorted(rows)
    inputs, quality = (np.asarray([rows[i][k] for i in order], np.float32) for k in (0, 1))
    return Exits(np.asarray(order, np.int32), inputs, quality, weights)

  for number, batch in enumerate(tqdm(batches, desc=split, unit=" batches", disable=None), 1):
    images = np.flatnonzero(batch["weight"] > 0)
    if all(int(batch["index"][i]) in rows for i in images):
      continue
    largest = batch["label_size"][images].max(axis=0)
    sizes = np.where(batch["weight"][:, None] > 0, batch["label_size"], largest)
    truths = {i: dataset.ground_truth(int(batch["index"][i])) for i in images}
    quality = np.zeros((len(batch["weight"]), len(depths)), np.float32)
    for column, program in enumerate(programs):
      outputs, inputs = program(variables, batch)
      found = segment_on_host(outputs, sizes, batch["valid_size"], inference)
      for i in images:
        result = panoptic_result(found, i, sizes[i], task.is_thing)
        quality[i, column] = image_quality(result, truths[i], task)
    for i in images:
      rows[int(batch["index"][i])] = np.asarray(inputs)[i], quality[i]
    if number % _SAVE_EVERY == 0:
      collected().save(path)
  exits = collected()
  exits.save(path)
  return exits


def exit_depths(model: nn.Module) -> range:
  """The layers after which an image may leave.

  Raises:
    UserError: if the model is no ECO-M2F.
  """
  decoder = getattr(model, "pixel_decoder", None)
  if not isinstance(decoder, EcoPixelDecoder):
    raise UserError("this model has no exits; expected an eco_m2f_* that was trained with them.")
  return range(FIRST_EXIT, decoder.layers + 1)


def _program(model: nn.Module, task: UniversalTask, depth: int) -> Any:
  """(variables, batch) -> outputs after a number of layers, and the gate's inputs (B, C)."""
  fixed = model.clone(pixel_decoder=model.pixel_decoder.clone(fixed_exit=depth))

  @jax.jit
  def run(variables: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, jax.Array]:
    outputs, state = fixed.apply(
      variables, *task.model_inputs(batch), train=False, mutable=["intermediates"]
    )
    outputs = {name: outputs[name] for name in ("class_logits", "mask_logits")}
    return outputs, state["intermediates"]["pixel_decoder"]["gate_inputs"][0]

  return run


def image_quality(result: Mapping[str, Any], truth: Any, task: UniversalTask) -> float:
  """PQ of one image, the mean over the classes that occur in it; 0 where nothing does."""
  (truth_map,) = truth.segments
  quality = PanopticQuality(task.is_thing)
  labels = [segment["label_id"] for segment in result["segments_info"]]
  prediction = result["segmentation"] - 1
  quality.update(prediction, labels, truth_map, truth.labels, crowd=truth.crowd, areas=truth.areas)
  return float(np.nan_to_num(quality.summary()["PQ"]))


def train_gate(
  exits: Exits, gate: Mapping[str, Any], *, beta: float, learning_rate: float, steps: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Step C: cross-entropy with the best exits, all images in each step.

  Args:
    exits: see `measure_exits`.
    gate: `kernel` (C, K) and `bias` (K,) to start from.
    beta: cost of a layer in units of quality.
    learning_rate: of Adam.
    steps: to train.

  Returns:
    The trained gate, and the losses float32 (steps,).
  """
  inputs, quality = jnp.asarray(exits.inputs), jnp.asarray(exits.quality)
  optimizer = optax.adam(learning_rate)
  gate = {name: jnp.asarray(gate[name], jnp.float32) for name in ("kernel", "bias")}

  def loss(gate: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.mean(gate_loss(inputs @ gate["kernel"] + gate["bias"], quality, beta))

  def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
    gate, state = carry
    value, slopes = jax.value_and_grad(loss)(gate)
    updates, state = optimizer.update(slopes, state)
    return (optax.apply_updates(gate, updates), state), value

  run = jax.jit(lambda gate: jax.lax.scan(step, (gate, optimizer.init(gate)), length=steps))
  (gate, _), losses = run(gate)
  return jax.device_get(gate), np.asarray(losses)


def report(exits: Exits, gate: Mapping[str, np.ndarray], beta: float) -> str:
  """A line per exit, then the results of the gate and of the best choice."""
  count, choices = exits.quality.shape
  best = np.asarray(best_exits(exits.quality, beta))
  chosen = np.argmax(exits.inputs @ gate["kernel"] + gate["bias"], axis=-1)
  share = functools.partial(np.bincount, minlength=choices)
  lines = ["layers      PQ   best  chosen"]
  for k, (mean, wanted, taken) in enumerate(
    zip(exits.quality.mean(0), share(best), share(chosen), strict=True)
  ):
    lines.append(
      f"{FIRST_EXIT + k:6d}  {100 * mean:6.2f}  {wanted / count:4.0%}    {taken / count:4.0%}"
    )
  for name, which in (("gate", chosen), ("best", best)):
    quality = exits.quality[np.arange(count), which].mean()
    lines.append(f"{name}: PQ {100 * quality:.2f} after {FIRST_EXIT + which.mean():.2f} layers")
  lines.append(
    "PQ is the mean of the PQ of single images here; effseg eval accumulates over all of them"
  )
  return "\n".join(lines)


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  number = functools.partial(flags.DEFINE_float, lower_bound=0.0, flag_values=values)
  define_config(values)
  string("checkpoint", None, "The model with trained exits: a run or a bundle.")
  string("output", None, "The bundle to write (.safetensors).")
  string("split", None, "Images to learn from; default: those of training.")
  number("beta", 0.02, "Cost of a layer in units of PQ (0 to 1).")
  number("learning_rate", 1e-2, "Of the gate.")
  flags.DEFINE_integer("steps", 2000, "Of the gate's training.", lower_bound=1, flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags, measures and trains."""
  platform.tune_host_malloc()
  platform.use_compilation_cache()
  no_arguments(arguments)
  if values.config is None or not values.checkpoint or not values.output:
    raise UserError(
      "--config, --checkpoint and --output are needed; see python tools/train_gate.py --help."
    )
  output = Path(values.output)
  if output.suffix != ".safetensors":
    raise UserError(f"--output={output}: a bundle's name ends in .safetensors.")
  bundle = load_for_inference(values.checkpoint)
  exit_depths(bundle.model)
  output.parent.mkdir(parents=True, exist_ok=True)
  split = values.split or values.config.data.train_split
  exits = measure_exits(values.config, bundle, split, output.with_suffix(".exits.npz"))
  params = dict(bundle.variables["params"])
  decoder = dict(params["pixel_decoder"])
  decoder["gate"], losses = train_gate(
    exits,
    decoder["gate"],
    beta=values.beta,
    learning_rate=values.learning_rate,
    steps=values.steps,
  )
  params["pixel_decoder"] = decoder
  note = f"gate trained with beta {values.beta} on {len(exits.index)} images of {split}"
  save_bundle(output, {**bundle.variables, "params": params}, {**bundle.card, "note": note})
  print(report(exits, decoder["gate"], values.beta))
  print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; written to {output}")


if __name__ == "__main__":
  execute_module(sys.modules[__name__], "python tools/train_gate.py")
