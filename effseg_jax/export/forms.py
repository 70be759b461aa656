"""What is exported: a function of pictures, with normalisation before and reading behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError, suggestion
from effseg_jax.ops.resize import resize_bilinear
from effseg_jax.weights.bundle import Bundle

INPUTS = ("uint8", "normalised")
OUTPUTS = {
  "semantic": ("logits", "class_map"),
  "universal": ("logits", "masks"),
  "audio_visual": ("logits",),
}


@dataclasses.dataclass(frozen=True)
class Form:
  """How a model meets its user.

  Attributes:
    size: rows and columns that it takes.
    input: "uint8": pictures (B, H, W, 3) as they are decoded; "normalised": float32 (B, 3, H, W)
      from which the mean has been subtracted, and which was divided by the standard deviation.
    outputs: "logits"; "class_map" of a semantic model: uint8 (B, H, W); "masks" of a universal one:
      `masks` uint8 (B, Q, H, W), `labels` int32 (B, Q) and `scores` float32 (B, Q).
    frames: seconds of a clip, for audio-visual models.
  """

  size: tuple[int, int]
  input: str = "uint8"
  outputs: str = "logits"
  frames: int = 5


@dataclasses.dataclass(frozen=True)
class Exportable:
  """A function to export.

  Attributes:
    function: of the variables and the inputs, to a tuple of outputs.
    variables: of the model, on the host.
    inputs: name, shape (None: the batch) and dtype of each.
    outputs: the same of each output.
    card: of the model, with an entry `export` about all of this.
  """

  function: Callable[..., tuple[jax.Array, ...]]
  variables: Any
  inputs: tuple[tuple[str, tuple[int | None, ...], str], ...]
  outputs: tuple[tuple[str, tuple[int | None, ...], str], ...]
  card: Mapping[str, Any]


def make_exportable(bundle: Bundle, form: Form) -> Exportable:
  """Puts normalisation before a model and the reading of its outputs behind it.

  Args:
    bundle: model, variables and card.
    form: what goes in and comes out.

  Raises:
    UserError: if the task has no such output, or an unknown input is asked for.
  """
  task = bundle.card["task"]
  name = task["name"]
  if name not in OUTPUTS:
    raise UserError(f"models for {name} cannot be exported; expected {', '.join(OUTPUTS)}.")
  for flag, value, known in (
    ("input", form.input, INPUTS),
    ("outputs", form.outputs, OUTPUTS[name]),
  ):
    if value not in known:
      raise UserError(
        f"--{flag}={value}: expected one of {', '.join(known)} for {name}."
        f"{suggestion(value, known)}"
      )
  model = bundle.model
  if getattr(model, "dtype", jnp.float32) != jnp.float32:
    model = model.clone(dtype=jnp.float32)
  mean = np.asarray(task["mean"], np.float32)
  factor = 1.0 / np.asarray(task["std"], np.float32)
  read = {"logits": _logits, "class_map": _class_map, "masks": _masks}[form.outputs]
  names = {
    "logits": ("logits",),
    "class_map": ("class_map",),
    "masks": ("masks", "labels", "scores"),
  }
  output_names = names[form.outputs]
  if name == "universal" and form.outputs == "logits":
    output_names = ("class_logits", "mask_logits")

  def function(variables: Any, images: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    if form.input == "uint8":
      images = (images.astype(jnp.float32) - mean) * factor
    else:
      images = jnp.moveaxis(images, -3, -1)
    outputs = model.apply(variables, images, *others, train=False)
    found = read(outputs, form.size)
    if form.input == "normalised" and form.outputs == "logits" and name == "semantic":
      found = tuple(jnp.moveaxis(x, -1, -3) for x in found)
    return found

  clip = (form.frames,) if name == "audio_visual" else ()
  pixels = (*form.size, 3) if form.input == "uint8" else (3, *form.size)
  first = "frames" if clip else "images"
  inputs = [(first, (None, *clip, *pixels), "uint8" if form.input == "uint8" else "float32")]
  if clip:
    inputs.append(("log_mel", (None, *clip, 96, 64), "float32"))
  shapes = [jax.ShapeDtypeStruct((1, *shape[1:]), dtype) for _, shape, dtype in inputs]
  found = jax.eval_shape(function, bundle.variables, *shapes)
  outputs = tuple(
    (label, (None, *x.shape[1:]), x.dtype.name)
    for label, x in zip(output_names, found, strict=True)
  )
  export = {"size": form.size, "input": form.input, "outputs": form.outputs}
  export |= {"input_arrays": inputs, "output_arrays": outputs}
  card = {**bundle.card, "export": export}
  return Exportable(function, bundle.variables, tuple(inputs), outputs, card)


def _logits(outputs: Any, size: tuple[int, int]) -> tuple[jax.Array, ...]:
  del size
  if isinstance(outputs, Mapping):
    return outputs["class_logits"], outputs["mask_logits"]
  return (outputs,)


def _class_map(logits: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, ...]:
  found = jnp.argmax(resize_bilinear(logits, size), axis=-1)
  return (found.astype(jnp.uint8 if logits.shape[-1] <= 256 else jnp.int32),)


def _masks(outputs: Mapping[str, Any], size: tuple[int, int]) -> tuple[jax.Array, ...]:
  """Per query its mask, its class, and class probability times mean probability of the mask."""
  probabilities = jax.nn.softmax(outputs["class_logits"], axis=-1)[..., :-1]
  logits = outputs["mask_logits"]
  inside = (logits > 0).astype(jnp.float32)
  certainty = jnp.sum(jax.nn.sigmoid(logits) * inside, axis=(2, 3))
  certainty = certainty / (jnp.sum(inside, axis=(2, 3)) + 1e-6)
  labels = jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
  scores = jnp.max(probabilities, axis=-1) * certainty
  # As an image whose channels are the queries, which runtimes resize as one.
  masks = resize_bilinear(jnp.moveaxis(logits, 1, -1), size)
  return (jnp.moveaxis(masks, -1, 1) > 0).astype(jnp.uint8), labels, scores
