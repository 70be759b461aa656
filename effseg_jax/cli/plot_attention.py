r"""Draws the decoder's cross-attention to the sound, without and with prompt queries.

  effseg plot_attention --output=docs/images/attention.png
  effseg plot_attention --prompts=runs/hearing --audio=runs/without_prompts

The first row of the picture uses only the token of the sound, the second the prompt query
generator. Each shows the weights of every position of the map, the number of tokens that a position
attends to (the exponential of the weights' entropy), and the distance of its output from the mean
output. With one token a softmax is 1 everywhere, and all positions get the same output ("attention
dissipation"). Without runs the models are untrained: the difference exists from the start.

Clips are those of the embedded data set. Needs matplotlib: `pip install 'effseg_jax[train]'`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import effseg_jax
from effseg_jax.cli import Flags
from effseg_jax.errors import UserError, extra
from effseg_jax.input_pipeline import datasets
from effseg_jax.models.avesformer import AVESFormer
from effseg_jax.ops.normalize import IMAGENET_MEAN, IMAGENET_STD
from effseg_jax.run.saved_model import load_for_inference

_INK = "#333333"
_NAMES = {"audio": "the sound's token alone", "prompts": "prompt query generator"}


@dataclasses.dataclass(frozen=True)
class Listening:
  """One cross-attention for one frame.

  Attributes:
    weights: float32 (positions, tokens), the mean over the heads; rows sum to 1.
    tokens: float32 (rows, cols): how many tokens a position listens to, 1 to their number.
    deviation: float32 (rows, cols): distance of a position's output from the mean over positions,
      divided by the mean's length.
  """

  weights: np.ndarray
  tokens: np.ndarray
  deviation: np.ndarray


def listen(
  model: AVESFormer, variables: Mapping[str, Any], frame: np.ndarray, log_mel: np.ndarray
) -> Listening:
  """Runs a model and looks into the last cross-attention of its finest stage that attends.

  Args:
    model: with at least one stage of type "attn".
    variables: of the model.
    frame: uint8 (H, W, 3).
    log_mel: float32 (96, 64).

  Raises:
    UserError: if no stage attends.
  """
  if "attn" not in model.stage_types:
    raise UserError("no stage of this model attends: model.stage_types has no 'attn'.")
  stage = model.stage_types.index("attn")
  block = f"stage_{stage}_block_{model.depths[stage] - 1}"

  @jax.jit
  def run(variables: Any, frame: jax.Array, log_mel: jax.Array) -> tuple[jax.Array, jax.Array]:
    image = (frame.astype(jnp.float32) - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)
    _, state = model.apply(
      variables,
      image[None, None],
      log_mel[None, None],
      mutable=["intermediates"],
      capture_intermediates=lambda module, _: module.name == "cross_attention",
    )
    inside = state["intermediates"]["decoder"][block]["cross_attention"]
    return inside["weights"][0][0], inside["__call__"][0][0]

  weights, heard = (np.asarray(x, np.float32) for x in run(variables, frame, log_mel))
  stride = 4 * 2**stage
  shape = (-(-frame.shape[0] // stride), -(-frame.shape[1] // stride))
  entropy = -np.sum(weights * np.log(np.maximum(weights, 1e-30)), axis=-1).mean(axis=0)
  mean = heard.mean(axis=0)
  deviation = np.linalg.norm(heard - mean, axis=-1) / np.linalg.norm(mean)
  return Listening(weights.mean(axis=0), np.exp(entropy).reshape(shape), deviation.reshape(shape))


def plot(frame: np.ndarray, listenings: Mapping[str, Listening], output: str | Path) -> Path:
  """Draws a line of panels for each way to listen.

  Args:
    frame: uint8 (H, W, 3), beside them.
    listenings: "audio" and "prompts".
    output: the picture; its folder is made if it is missing.

  Returns:
    The path written.

  Raises:
    UserError: if matplotlib is not installed or does not know the file's ending.
  """
  with extra("train"):
    import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot

  count = len(listenings)
  figure, axes = pyplot.subplots(
    count, 4, figsize=(12, 3.1 * count), constrained_layout=True, squeeze=False
  )
  farthest = max(float(x.deviation.max()) for x in listenings.values())
  for line, (name, found) in zip(axes, listenings.items(), strict=True):
    positions, tokens = found.weights.shape
    line[0].imshow(frame)
    panels = (
      ("weight of each token", found.weights, float(found.weights.max())),
      ("tokens listened to", found.tokens, tokens),
      ("deviation from the mean", found.deviation, farthest),
    )
    line[0].set_title(_NAMES[name], loc="left", fontsize=10, color=_INK)
    for panel, (title, values, highest) in zip(line[1:], panels, strict=True):
      image = panel.imshow(values, cmap="cividis", vmin=0, vmax=highest, aspect="auto")
      panel.set_title(title, loc="left", fontsize=10, color=_INK)
      bar = figure.colorbar(image, ax=panel)
      bar.ax.tick_params(colors=_INK, labelsize=8)
      bar.outline.set_visible(False)
    line[1].set_xlabel(f"{tokens} token{'s' * (tokens > 1)}", fontsize=9, color=_INK)
    line[1].set_ylabel(f"{positions} positions", fontsize=9, color=_INK)
  for panel in axes.flat:
    panel.set_xticks([])
    panel.set_yticks([])
    for side in panel.spines.values():
      side.set_visible(False)
  path = Path(output)
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    figure.savefig(path, dpi=80, facecolor="white")
  except ValueError as error:
    raise UserError(f"--output={output}: {error}.") from None
  finally:
    pyplot.close(figure)
  return path


def untrained(queries: str, size: Sequence[int]) -> tuple[AVESFormer, Mapping[str, Any]]:
  """An untrained `avesformer_lite`."""
  model = effseg_jax.create_model("avesformer_lite", queries=queries)
  inputs = (jnp.zeros((1, 1, *size, 3)), jnp.zeros((1, 1, 96, 64)))
  return model, jax.jit(model.init)(jax.random.key(0), *inputs)


def trained(run: str, queries: str) -> tuple[AVESFormer, Mapping[str, Any]]:
  """The model of a run or of a bundle.

  Raises:
    UserError: if it is not of the requested kind.
  """
  bundle = load_for_inference(run)
  if getattr(bundle.model, "queries", None) != queries:
    raise UserError(f"{run} is no AVESFormer with model.queries={queries}.")
  return bundle.model, bundle.variables


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  flags.DEFINE_string(
    "prompts", "", "A run with model.queries=prompts; untrained without.", flag_values=values
  )
  flags.DEFINE_string(
    "audio", "", "A run with model.queries=audio; untrained without.", flag_values=values
  )
  flags.DEFINE_integer(
    "clip", 0, "Which clip of the embedded data set's validation split.", flag_values=values
  )
  flags.DEFINE_integer("size", 224, "Rows and columns of the frame.", flag_values=values)
  flags.DEFINE_string(
    "output", "attention.png", "The picture to write (PNG, SVG or PDF).", flag_values=values
  )


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Draws both."""
  size = (values.size, values.size)
  dataset = datasets.open_dataset("synthetic_av", split="val", size=size)
  if not 0 <= values.clip < len(dataset):
    raise UserError(f"--clip={values.clip}: there are {len(dataset)} clips.")
  example = dataset[values.clip]
  frame, log_mel = example["frames"][0], example["log_mel"][0]
  listenings = {}
  for queries, run in (("audio", values.audio), ("prompts", values.prompts)):
    model, variables = trained(run, queries) if run else untrained(queries, size)
    listenings[queries] = listen(model, variables, frame, log_mel)
  print(plot(frame, listenings, values.output))
