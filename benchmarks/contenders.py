"""The worker of the races: builds one contender, then times it on request.

Started as `python -m benchmarks.contenders SPEC` with a `Spec` as JSON; the lines that are
exchanged are described in `benchmarks/race.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effseg_jax import platform

PEERS = ("torch", "torch_channels_last", "torch_compile", "segformer_b0", "mask2former")
IGNORE_LABEL = 255
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
SECOND = 16_000  # samples, of which a frame's log-mel patch is made


@dataclasses.dataclass(frozen=True)
class Spec:
  """The configuration of a worker.

  Attributes:
    contender: "ours" or one of `PEERS`.
    model: name in `effseg_jax.list_models()`; peers are the original of that model, or another on
      the same backbone.
    rows: of an image.
    cols: of an image.
    batch: images per call; of an audio-visual model frames, each with its second of sound.
    num_classes: of the model.
    train: a whole training step instead of a forward pass.
    dtype: of the computation; the peers compute in bfloat16 by autocast.
    device: "auto": the accelerator if there is one; "cpu": never.
  """

  contender: str
  model: str
  rows: int
  cols: int
  batch: int
  num_classes: int
  train: bool = False
  dtype: str = "float32"
  device: str = "auto"


@dataclasses.dataclass(frozen=True)
class Contender:
  """Something that can be timed.

  Attributes:
    run: one call, which ends when its result is there.
    facts: `compile_seconds`, `temp_bytes` (None where there is no compiler) and `device`.
    device_bytes: the largest memory in use on the accelerator so far, None on the CPU.
  """

  run: Callable[[], Any]
  facts: dict[str, Any]
  device_bytes: Callable[[], int | None]


def build(spec: Spec) -> Contender:
  """Builds a contender and calls it once."""
  contender = _ours(spec) if spec.contender == "ours" else _peer(spec)
  contender.run()
  return contender


def example(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
  """The same input for everybody: images uint8 (B, H, W, 3), labels uint8 (B, H, W)."""
  rng = np.random.default_rng(0)
  shape = (spec.batch, spec.rows, spec.cols)
  images = rng.integers(0, 256, (*shape, 3), np.uint8)
  # Regions of 32 pixels, so that the labels resemble real ones; some are ignored.
  coarse = (spec.batch, -(-spec.rows // 32), -(-spec.cols // 32))
  regions = rng.integers(0, spec.num_classes, coarse)
  labels = regions.repeat(32, 1).repeat(32, 2)[:, : spec.rows, : spec.cols].astype(np.uint8)
  labels[:, :4] = IGNORE_LABEL
  return images, labels


def _ours(spec: Spec) -> Contender:
  import jax

  # A program from the cache would not measure the time that compiling it takes.
  jax.config.update("jax_enable_compilation_cache", False)
  call, compile_seconds, compiled = (_our_step if spec.train else _our_forward)(spec)
  device = jax.devices()[0]
  analysis = compiled.memory_analysis()
  facts = {
    "compile_seconds": compile_seconds,
    "temp_bytes": getattr(analysis, "temp_size_in_bytes", None),
    "device": f"{device.platform}: {device.device_kind}",
  }

  def device_bytes() -> int | None:
    stats = None if device.platform == "cpu" else device.memory_stats()
    return stats["peak_bytes_in_use"] if stats else None

  return Contender(lambda: jax.block_until_ready(call()), facts, device_bytes)


def _our_forward(spec: Spec) -> tuple[Callable[[], Any], float, Any]:
  """Normalised images, or frames and the sound of their seconds -> logits, those of the last layer.

  Parameters are arguments. Sound is a waveform: its log-mel patch is made in the same program.
  """
  import jax
  import jax.numpy as jnp

  import effseg_jax
  from effseg_jax.ops.log_mel import log_mel
  from effseg_jax.training.state import model_shapes

  model = effseg_jax.create_model(spec.model, num_classes=spec.num_classes, dtype=spec.dtype)
  inputs = [jnp.asarray(example(spec)[0], jnp.float32) / 128.0 - 1.0]
  shapes = [(1, 64, 64, 3)]
  if spec.model.startswith("avesformer"):
    noise = np.random.default_rng(1).standard_normal((spec.batch, SECOND))
    inputs = [inputs[0][:, None], jnp.asarray(0.1 * noise, jnp.float32)]
    shapes = [(1, 1, 64, 64, 3), (1, 1, 96, 64)]
  shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  variables = _made_up(model_shapes(model, shapes))

  @jax.jit
  def forward(variables: Any, images: jax.Array, *waveform: jax.Array) -> Any:
    outputs = model.apply(variables, images, *map(log_mel, waveform), train=False)
    if isinstance(outputs, dict):  # universal; "aux" is for training
      outputs = {name: outputs[name] for name in ("class_logits", "mask_logits")}
    return outputs

  start = time.perf_counter()
  compiled = forward.lower(variables, *inputs).compile()
  return lambda: compiled(variables, *inputs), time.perf_counter() - start, compiled


def _made_up(shapes: Any) -> Any:
  """Variables of these shapes: small random kernels, ones elsewhere.

  Compiling the model's own initialisation would take as long as compiling the model.
  """
  import jax
  import jax.numpy as jnp

  rng = np.random.default_rng(0)

  def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if len(leaf.shape) < 2:
      return jnp.ones(leaf.shape, leaf.dtype)
    return jnp.asarray(0.05 * rng.standard_normal(leaf.shape), leaf.dtype)

  return jax.tree.map(fill, shapes)


class _OneBatch:
  """The images and labels of a spec as a data set."""

  name = "the benchmark's images"
  ignore_label = IGNORE_LABEL

  def __init__(self, spec: Spec):
    self.num_classes = spec.num_classes
    self.classes = tuple(str(index) for index in range(spec.num_classes))
    self.palette = np.zeros((spec.num_classes, 3), np.uint8)
    self._images, self._labels = example(spec)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    label = self._labels[index]
    size = np.array(label.shape, np.int32)
    return {"image": self._images[index], "label": label, "valid_size": size, "name": str(index)}


def _our_step(spec: Spec) -> tuple[Callable[[], Any], float, Any]:
  """The step that training runs, on uint8 images: normalisation, report and checks included."""
  from effseg_jax import configs, experiment

  config = configs.load("afformer/synthetic")
  config.model.update({"name": spec.model, "dtype": spec.dtype})
  size = (spec.rows, spec.cols)
  config.data.augment.update(
    {"scale": size, "ratio": (1.0, 1.0), "crop": size, "flip": 0.0, "photometric": False}
  )
  config.train.update({"batch_size": spec.batch, "average_decay": 0.0})
  config.optimizer.update({"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY})
  config.schedule.update({"name": "constant", "warmup_steps": 0})
  # One device, like the peers.
  parts = experiment.build(config, dataset=_OneBatch(spec), mesh=experiment.one_device())
  feed = parts.batches.iterate()
  batch = next(feed)
  feed.close()
  start = time.perf_counter()
  compiled = parts.step.lower(parts.abstract_state, batch).compile()
  seconds = time.perf_counter() - start
  holder = [parts.state]

  def call() -> Any:
    holder[0], report = compiled(holder[0], batch)  # the state passed in is donated
    return holder[0], report

  return call, seconds, compiled


def _peer(spec: Spec) -> Contender:
  import torch

  use_cuda = spec.device != "cpu" and torch.cuda.is_available()
  device = torch.device("cuda" if use_cuda else "cpu")
  if use_cuda:
    torch.set_float32_matmul_precision("high")  # TF32, as XLA computes float32 there
  torch.manual_seed(0)
  model = _peer_model(spec).to(device)
  images, labels = example(spec)
  x = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, torch.float32) / 128.0 - 1.0
  x = x.contiguous()
  y = torch.from_numpy(labels).to(device, torch.int64)
  if spec.contender == "torch_channels_last":
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
  if spec.contender == "torch_compile":
    model = torch.compile(model)
  run = _torch_step(spec, model, x, y) if spec.train else _torch_forward(spec, model, x)

  def synchronised() -> None:
    run()
    if use_cuda:
      torch.cuda.synchronize()

  start = time.perf_counter()
  synchronised()
  compiled = spec.contender == "torch_compile"
  facts = {
    "compile_seconds": time.perf_counter() - start if compiled else None,
    "temp_bytes": None,
    "device": f"gpu: {torch.cuda.get_device_name()}" if use_cuda else "cpu: cpu",
  }
  memory = torch.cuda.max_memory_allocated if use_cuda else lambda: None
  return Contender(synchronised, facts, memory)


def _peer_model(spec: Spec) -> Any:
  """A torch module from images to logits, random weights."""
  if spec.contender == "segformer_b0":
    return _segformer("segformer_b0", spec.num_classes)
  if spec.contender == "mask2former":
    return _mask2former(spec)
  if spec.model.startswith("segformer"):
    return _segformer(spec.model, spec.num_classes)
  if spec.model.startswith("efficientvit"):
    from benchmarks.peers import efficientvit_torch

    return efficientvit_torch.EfficientViTTorch(spec.model, spec.num_classes)
  from benchmarks.peers import afformer_torch

  return afformer_torch.AFFormerTorch(original_of(spec.model), spec.num_classes)


def _segformer(name: str, num_classes: int) -> Any:
  """Hugging Face's SegFormer of the same size as ours, from images to their output object."""
  from transformers import SegformerConfig, SegformerForSemanticSegmentation

  import effseg_jax

  ours = effseg_jax.create_model(name)
  config = SegformerConfig(
    depths=list(ours.depths),
    hidden_sizes=list(ours.widths),
    num_attention_heads=list(ours.heads),
    sr_ratios=list(ours.reductions),
    decoder_hidden_size=ours.decoder_features,
    num_labels=num_classes,
  )
  return SegformerForSemanticSegmentation(config)


def _mask2former(spec: Spec) -> Any:
  """Hugging Face's Mask2Former on the backbone of our model."""
  from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    SwinConfig,
  )

  stages = [f"stage{number}" for number in range(1, 5)]
  if spec.model.endswith("_r50"):
    backbone = ResNetConfig(
      depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048], out_features=stages
    )
  else:
    backbone = SwinConfig(
      embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=stages
    )
  config = Mask2FormerConfig(backbone_config=backbone, num_labels=spec.num_classes)
  return Mask2FormerForUniversalSegmentation(config)


def original_of(model: str) -> str:
  """The model of the paper that one of ours is compared with: spectral ones have no other."""
  return model.removesuffix("_fft")


def _torch_forward(spec: Spec, model: Any, x: Any) -> Callable[[], None]:
  import torch

  model.eval()

  def run() -> None:
    with torch.inference_mode(), _autocast(spec, x):
      model(x)

  return run


def _torch_step(spec: Spec, model: Any, x: Any, y: Any) -> Callable[[], None]:
  import torch
  import torch.nn.functional as F

  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

  def run() -> None:
    optimizer.zero_grad(set_to_none=True)
    with _autocast(spec, x):
      outputs = model(x)
      logits = getattr(outputs, "logits", outputs).float()
      full = F.interpolate(logits, size=y.shape[1:], mode="bilinear", align_corners=False)
      loss = F.cross_entropy(full, y, ignore_index=IGNORE_LABEL)
    loss.backward()
    optimizer.step()
    loss.item()

  return run


def _autocast(spec: Spec, x: Any) -> contextlib.AbstractContextManager[Any]:
  import torch

  if spec.dtype == "float32":
    return contextlib.nullcontext()
  return torch.autocast(x.device.type, getattr(torch, spec.dtype))


def _peak_bytes() -> int | None:
  """Largest resident memory of this process so far."""
  try:
    import resource
  except ImportError:  # Windows
    return None
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def main(argv: Sequence[str]) -> None:
  """Builds the contender of `argv[0]`, then answers until its input is closed."""
  # Libraries may print anything; the parent reads only the messages for it.
  replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)

  def reply(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=replies, flush=True)

  platform.tune_host_malloc()
  try:
    contender = build(Spec(**json.loads(argv[0])))
  except Exception as error:
    reply({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
    return
  reply({"ready": contender.facts})
  for line in sys.stdin:
    calls = int(line.split()[1])
    contender.run()  # not timed: the caches were another contender's
    seconds = []
    for _ in range(calls):
      start = time.perf_counter()
      contender.run()
      seconds.append(time.perf_counter() - start)
    reply(
      {
        "seconds": seconds,
        "peak_bytes": _peak_bytes(),
        "device_bytes": contender.device_bytes(),
      }
    )


if __name__ == "__main__":
  main(sys.argv[1:])
