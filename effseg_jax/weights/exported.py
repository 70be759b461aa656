"""Exported models as models: `.onnx`, OpenVINO's `.xml` and `.stablehlo` files of `effseg export`.

An exported file holds its card. Opened here, it stands in for the Flax module of a bundle, so that
whatever predicts or evaluates with a bundle does so with the file, in the file's own runtime.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError, extra
from effseg_jax.ops.resize import resize_bilinear
from effseg_jax.weights.bundle import Bundle

SUFFIXES = (".onnx", ".xml", ".stablehlo")

# What an export of StableHLO is packed of.
PROGRAM, CARD = "program.bin", "card.json"


@dataclasses.dataclass(frozen=True)
class Exported:
  """An opened file.

  Attributes:
    card: of the model; `card["export"]` says what goes in and comes out.
    run: arrays in the order of the inputs -> arrays in the order of the outputs.
    traceable: the same for JAX arrays inside a traced function, if the format allows that.
  """

  card: Mapping[str, Any]
  run: Callable[..., Sequence[np.ndarray]]
  traceable: Callable[..., Sequence[jax.Array]] | None = None


def is_exported(path: str | Path) -> bool:
  """Whether a file's name is that of an exported model."""
  return Path(path).suffix.lower() in SUFFIXES


def open_exported(path: str | Path) -> Exported:
  """Opens an exported model in its runtime.

  Raises:
    UserError: if it is missing, damaged, was not written by `effseg export`, or its runtime is not
      installed.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path} is missing; expected a file of effseg export.")
  opened = {".onnx": _open_onnx, ".xml": _open_openvino, ".stablehlo": _open_stablehlo}
  return opened[path.suffix.lower()](path)


def load_exported(path: str | Path) -> Bundle:
  """Opens an exported model as a bundle without variables.

  Raises:
    UserError: see `open_exported`; or if the file gives masks and not logits.
  """
  exported = open_exported(path)
  if exported.card["export"]["outputs"] == "masks":
    raise UserError(
      f"{path} gives masks, labels and scores; to predict or evaluate with it, export it with"
      " --outputs=logits."
    )
  return Bundle(ExportedModel(exported), {}, exported.card)  # type: ignore[arg-type]


class ExportedModel:
  """What a Flax module is to its users: `apply` of variables, here none, and inputs."""

  def __init__(self, exported: Exported):
    """Wraps an opened file."""
    self.exported = exported
    card = exported.card
    self._export = card["export"]
    self._mean = np.asarray(card["task"]["mean"], np.float32)
    self._std = np.asarray(card["task"]["std"], np.float32)

  def apply(
    self, variables: Any, images: jax.Array, *others: jax.Array, train: bool = False
  ) -> Any:
    """The model's outputs.

    Args:
      variables: not used.
      images: float32 (B, H, W, 3) or (B, T, H, W, 3), normalised; of another size than the file's
        they are resized to it.
      *others: further inputs.
      train: must be false.

    Raises:
      UserError: for training.
    """
    del variables
    if train:
      raise UserError("an exported model cannot be trained; take the checkpoint it came from.")
    size, own = images.shape[-3:-1], tuple(self._export["size"])
    if size != own and images.ndim == 4:
      images = resize_bilinear(images, own)
    elif size != own:
      raise UserError(f"frames are {size[1]}x{size[0]}; the exported file takes {own[1]}x{own[0]}.")
    if self._export["input"] == "uint8":
      pixels = jnp.clip(jnp.round(images * self._std + self._mean), 0, 255)
      images = pixels.astype(jnp.uint8)
    else:
      images = jnp.moveaxis(images, -1, -3)
    outputs = self._call(images, *others)
    if len(outputs) == 1:
      return self._as_logits(outputs[0])
    class_logits, mask_logits = outputs
    if size != own:
      grid = tuple(-(-n // 4) for n in size)
      mask_logits = jnp.moveaxis(resize_bilinear(jnp.moveaxis(mask_logits, 1, -1), grid), -1, 1)
    return {"class_logits": class_logits, "mask_logits": mask_logits, "aux": []}

  def _call(self, *inputs: jax.Array) -> Sequence[jax.Array]:
    if self.exported.traceable is not None:
      return self.exported.traceable(*inputs)
    batch = inputs[0].shape[0]
    shapes = [
      jax.ShapeDtypeStruct((batch, *shape[1:]), dtype)
      for _, shape, dtype in self._export["output_arrays"]
    ]

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
      found = self.exported.run(*map(np.asarray, arrays))
      return tuple(np.asarray(x, s.dtype) for x, s in zip(found, shapes, strict=True))

    return jax.pure_callback(run, tuple(shapes), *inputs)

  def _as_logits(self, output: jax.Array) -> jax.Array:
    if self._export["outputs"] == "class_map":
      return jax.nn.one_hot(output, len(self.exported.card["task"]["classes"]))
    if self._export["input"] == "normalised" and output.ndim == 4:
      return jnp.moveaxis(output, -3, -1)
    return output


def _open_onnx(path: Path) -> Exported:
  with extra("export"):
    import onnxruntime
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  try:
    session = onnxruntime.InferenceSession(
      str(path), options, providers=onnxruntime.get_available_providers()
    )
  except Exception as error:
    raise UserError(f"{path} cannot be opened by ONNX Runtime ({_first_line(error)}).") from None
  card = _card(session.get_modelmeta().custom_metadata_map.get("card"), path)
  names = [x.name for x in session.get_inputs()]
  return Exported(card, lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True))))


def _open_openvino(path: Path) -> Exported:
  with extra("openvino"):
    import openvino
  core = openvino.Core()
  try:
    model = core.read_model(str(path))
    # Otherwise matrix products are rounded to bfloat16 on processors that have it.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
  except RuntimeError as error:
    raise UserError(f"{path} cannot be opened by OpenVINO ({_first_line(error)}).") from None
  text = model.get_rt_info(["effseg_jax", "card"]).astype(str) if _has_card(model) else None
  card, request = _card(text, path), compiled.create_infer_request()

  def run(*arrays: np.ndarray) -> list[np.ndarray]:
    found = request.infer(list(arrays))
    return [np.array(found[i]) for i in range(len(compiled.outputs))]

  return Exported(card, run)


def _has_card(model: Any) -> bool:
  return model.has_rt_info(["effseg_jax", "card"])


def _open_stablehlo(path: Path) -> Exported:
  with extra("export"):
    import flatbuffers  # noqa: F401 (jax.export reads with it)
  from jax import export

  try:
    with zipfile.ZipFile(path) as archive:
      text, program = archive.read(CARD).decode(), archive.read(PROGRAM)
  except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
    raise UserError(f"{path} is damaged or no file of effseg export ({error}).") from None
  card = _card(text, path)
  try:
    exported = export.deserialize(bytearray(program))
  except Exception as error:
    raise UserError(
      f"{path} cannot be read by jax {jax.__version__} ({_first_line(error)}); it was written by"
      f" jax {card['export'].get('jax', 'of another version')}."
    ) from None
  here = jax.default_backend()
  if here not in exported.platforms and {"gpu": "cuda"}.get(here) not in exported.platforms:
    raise UserError(f"{path} was exported for {', '.join(exported.platforms)} and not for {here}.")
  return Exported(card, jax.jit(exported.call), exported.call)


def _card(text: str | None, path: Path) -> dict[str, Any]:
  """Reads a card; raises `UserError` unless it says what goes in and comes out."""
  try:
    card = json.loads(text or "")
    complete = {"size", "input", "outputs", "output_arrays"} <= set(card["export"])
    complete = complete and {"name", "classes", "mean", "std"} <= set(card["task"])
  except (ValueError, KeyError, TypeError):
    complete = False
  if not complete:
    raise UserError(f"{path} holds no card; expected a file written by effseg export.")
  return card


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__
