"""Writes exported models, after having compared what they compute with the model itself."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effseg_jax.errors import UserError, extra, suggestion
from effseg_jax.export import lowering, onnx_file, steps
from effseg_jax.export.forms import Exportable
from effseg_jax.ops import backend
from effseg_jax.weights import exported as reading

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "stablehlo": ".stablehlo"}
PRECISIONS = ("float32", "float16", "int8")
PLATFORMS = ("cpu", "cuda", "tpu")

# The largest difference that is written. Of class maps and masks: the share of other pixels.
TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "int8": float("inf")}
_PIXEL_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "int8": 0.1}


@dataclasses.dataclass(frozen=True)
class Report:
  """What an export came to.

  Attributes:
    path: of the file.
    bytes: of it and of what lies beside it.
    nodes: operators of an ONNX graph, or None.
    differences: per output, the largest difference from the model's own, and the largest value.
    changed: share of pixels that are given another class, if there are classes of pixels.
  """

  path: Path
  bytes: int
  nodes: int | None
  differences: dict[str, tuple[float, float]]
  changed: float | None


def export_model(
  exportable: Exportable,
  path: str | Path,
  samples: Sequence[np.ndarray],
  *,
  format: str = "onnx",
  precision: str = "float32",
  opset: int = 20,
  platforms: Sequence[str] = PLATFORMS,
  calibration: Sequence[Sequence[np.ndarray]] = (),
  tolerance: float | None = None,
) -> Report:
  """Exports a model, compares it with itself, and only then puts the file where it belongs.

  Args:
    exportable: what to export.
    path: of the file.
    samples: the inputs on which it is compared.
    format: one of `FORMATS`.
    precision: one of `PRECISIONS`; other than float32 for ONNX and OpenVINO.
    opset: of ONNX.
    platforms: of StableHLO.
    calibration: inputs, one example each, from which int8 takes the ranges of values.
    tolerance: of differences, or of the share of pixels with another class; None: by precision.

  Raises:
    UserError: if something is not installed, not supported, or differs too much.
  """
  path = Path(path)
  if format not in FORMATS:
    raise UserError(
      f"--format={format}: expected one of {', '.join(FORMATS)}.{suggestion(format, FORMATS)}"
    )
  if path.suffix != FORMATS[format]:
    raise UserError(
      f"--output={path}: the name of an export as {format} ends in {FORMATS[format]}."
    )
  if precision not in PRECISIONS:
    raise UserError(f"--precision={precision}: expected one of {', '.join(PRECISIONS)}.")
  if precision != "float32" and format == "stablehlo":
    raise UserError(f"--precision={precision} is for onnx and openvino; stablehlo is float32.")
  if precision == "int8" and not calibration:
    raise UserError("--precision=int8 needs pictures: --calibration=FOLDER.")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".export_")
  except OSError as error:
    raise UserError(f"--output={path} cannot be written ({error.strerror}).") from None
  with folder as name:
    draft, nodes = Path(name) / path.name, None
    if format == "stablehlo":
      _write_stablehlo(exportable, draft, platforms)
    else:
      onnx_path = draft.with_suffix(".onnx")
      # OpenVINO halves the weights itself when it saves them.
      inside = "float32" if (format, precision) == ("openvino", "float16") else precision
      nodes = _write_onnx(exportable, onnx_path, opset, inside, calibration)
      if format == "openvino":
        _write_openvino(exportable, onnx_path, draft, precision)
        for left in Path(name).glob("*.onnx*"):
          left.unlink()
    differences, changed = compare(exportable, reading.open_exported(draft), samples)
    _refuse(path, precision, differences, changed, tolerance)
    size = sum(file.stat().st_size for file in Path(name).iterdir())
    for file in Path(name).iterdir():
      os.replace(file, path.parent / file.name)
  return Report(path, size, nodes, differences, changed)


def compare(
  exportable: Exportable, exported: reading.Exported, samples: Sequence[np.ndarray]
) -> tuple[dict[str, tuple[float, float]], float | None]:
  """Runs a model and its export on the same inputs; see `Report` for what is returned."""
  ours = jax.jit(exportable.function)(exportable.variables, *samples)
  theirs = exported.run(*samples)
  differences, changed = {}, None
  for (name, _, _), own, other in zip(exportable.outputs, ours, theirs, strict=True):
    own, other = np.asarray(own), np.asarray(other)  # noqa: PLW2901
    if own.shape != other.shape:
      raise UserError(f"the export gives {name} of shape {other.shape}; expected {own.shape}.")
    if own.dtype.kind == "f":
      far = np.abs(own.astype(np.float64) - other)
      differences[name] = float(far.max()), float(np.abs(own).max())
      if not np.isfinite(other).all() or not np.isfinite(own).all():
        raise UserError(f"{name} holds values that are not finite; nothing was written.")
    elif name != "labels":
      changed = max(changed or 0.0, float(np.mean(own != other)))
  if changed is None and len(theirs) == 1 and exportable.card["task"]["name"] == "semantic":
    axis = -1 if exportable.card["export"]["input"] == "uint8" else 1
    own, other = np.asarray(ours[0]).argmax(axis), np.asarray(theirs[0]).argmax(axis)
    changed = float(np.mean(own != other))
  return differences, changed


def _refuse(path, precision, differences, changed, tolerance) -> None:
  """Raises `UserError` if an export differs too much from its model."""
  limit = TOLERANCES[precision] if tolerance is None else tolerance
  for name, (far, largest) in differences.items():
    if far > limit * max(1.0, largest):
      raise UserError(
        f"{path} was not written: its {name} differ by {far:.2g} (values up to {largest:.2g}),"
        f" more than --tolerance={limit:g} allows."
      )
  limit = _PIXEL_TOLERANCES[precision] if tolerance is None else tolerance
  if changed is not None and changed > limit:
    raise UserError(
      f"{path} was not written: {100 * changed:.2g} % of the pixels change, more than"
      f" --tolerance={limit:g} allows."
    )


# --- Formats --------------------------------------------------------------------------------------


def _write_onnx(
  exportable: Exportable, path: Path, opset: int, precision: str, calibration: Sequence
) -> int:
  """Writes an ONNX file; returns its number of nodes."""
  model = to_onnx(exportable, opset, precision)
  if precision == "int8":
    from effseg_jax.export.quantisation import quantise

    model = quantise(model, [name for name, _, _ in exportable.inputs], calibration)
  onnx_file.write(model, path)
  return len(model.graph.node)


def to_onnx(exportable: Exportable, opset: int = 20, precision: str = "float32") -> Any:
  """Converts to an `onnx.ModelProto`, in float32, or in float16 with float32 at both ends.

  Raises:
    UserError: if onnx is not installed, or the model has what ONNX cannot say.
  """
  onnx_file.require_onnx()
  variables = exportable.variables
  program = steps.trace(
    lambda *inputs: exportable.function(variables, *inputs),
    [(shape, np.dtype(dtype)) for _, shape, dtype in exportable.inputs],
  )
  names = [[name for name, _, _ in arrays] for arrays in (exportable.inputs, exportable.outputs)]
  graph = lowering.lower(program, *names)
  task = exportable.card["task"]
  metadata = {
    "card": json.dumps(exportable.card),
    "classes": list(task["classes"]),
    "palette": task.get("palette", []),
    "mean": task["mean"],
    "std": task["std"],
    "size": exportable.card["export"]["size"],
  }
  model = onnx_file.to_model(graph, opset, metadata)
  return onnx_file.in_half(model) if precision == "float16" else model


def _write_openvino(exportable: Exportable, onnx_path: Path, path: Path, precision: str) -> None:
  with extra("openvino"):
    import openvino
  model = openvino.Core().read_model(str(onnx_path))  # convert_model would send statistics
  model.set_rt_info(json.dumps(exportable.card), ["effseg_jax", "card"])
  openvino.save_model(model, str(path), compress_to_fp16=precision == "float16")


def _write_stablehlo(exportable: Exportable, path: Path, platforms: Sequence[str]) -> None:
  with extra("export"):
    import flatbuffers  # noqa: F401 (jax.export writes with it)
  from jax import export

  for platform in platforms:
    if platform not in PLATFORMS:
      raise UserError(f"--platforms: {platform!r} is none of {', '.join(PLATFORMS)}.")
  variables = jax.tree.map(np.asarray, exportable.variables)
  forms = {platform: _traced_for(platform, exportable.function) for platform in platforms}

  def program(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    held = jax.tree.map(jnp.asarray, variables)
    if len(forms) == 1:
      return forms[platforms[0]](held, *inputs)
    return jax.lax.platform_dependent(held, *inputs, **forms)

  (batch,) = export.symbolic_shape("batch")
  shapes = [
    jax.ShapeDtypeStruct((batch, *shape[1:]), dtype) for _, shape, dtype in exportable.inputs
  ]
  written = export.export(jax.jit(program), platforms=list(platforms))(*shapes)
  about = {**exportable.card["export"], "jax": jax.__version__, "platforms": list(platforms)}
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(reading.CARD, json.dumps({**exportable.card, "export": about}, indent=1))
    archive.writestr(reading.PROGRAM, bytes(written.serialize()))


def _traced_for(platform: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """A function in the formulation of one platform, whatever platform it is traced on."""

  def run(*arguments: Any) -> Any:
    with backend.target_platform({"cuda": "gpu"}.get(platform, platform)):
      return function(*arguments)

  return run
