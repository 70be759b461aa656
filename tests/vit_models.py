"""What tests of the models on a plain ViT share: weights made from names, as the goldens' were."""

from __future__ import annotations

import functools
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effseg_jax import create_model, load_weights

GOLDEN = Path(__file__).resolve().parent / "golden"

# Tolerances of the reference outputs, relative to an array's largest value.
FEATURES, LOGITS, GRADIENTS = 2e-5, 5e-5, 2e-4

_HALF = ("pos_embed", "cls_token", "reg_token", "register_tokens", "position_embeddings.weight")
_WHOLE = ("decode_head.q.weight", "decode_head.atm.q.weight", "network.q.weight", "query.weight")


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The tensor that belongs to a full official name."""
  generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
  z = generator.standard_normal(shape).astype(np.float32)
  half, tenth, one = np.float32(0.5), np.float32(0.1), np.float32(1)
  if name.endswith("num_batches_tracked"):
    return np.zeros(shape, np.int64)
  if name.endswith("running_var"):
    return np.abs(tenth * z) + one
  if name.endswith("running_mean"):
    return tenth * z
  if name.endswith(("gamma", "lambda1")):
    return half + tenth * z
  if name.endswith(_HALF):
    return half * z
  if name in _WHOLE:
    return z
  if len(shape) >= 2:
    return z * np.float32(1 / math.sqrt(math.prod(shape[1:])))
  return one + tenth * z if name.endswith("weight") else tenth * z


def tensors(rows: list[list[Any]]) -> dict[str, np.ndarray]:
  """Official name -> tensor, of rows [name, shape]; longer rows are constants, and left out."""
  return {row[0]: tensor(row[0], tuple(row[1])) for row in rows if len(row) == 2}


def images(seed: int, batch: int, rows: int, cols: int) -> np.ndarray:
  """The input that belongs to a seed, (B, H, W, 3)."""
  x = np.random.Generator(np.random.PCG64(seed)).standard_normal((batch, 3, rows, cols))
  return np.ascontiguousarray(x.astype(np.float32).transpose(0, 2, 3, 1))


@functools.cache
def golden(name: str) -> Mapping[str, Any]:
  """A file of reference outputs; what is JSON in it, parsed, without `_json` in its name."""
  with np.load(GOLDEN / f"{name}.npz") as file:
    return {
      key.removesuffix("_json"): json.loads(str(file[key])) if key.endswith("_json") else file[key]
      for key in file.files
    }


@functools.cache
def official(file: str) -> dict[str, np.ndarray]:
  """The official tensors of a file of reference outputs."""
  return tensors(golden(file)["state_dict"])


@functools.cache
def loaded(name: str, file: str):
  """The model of a file of reference outputs and its variables."""
  model = create_model(name, **golden(file)["fields"])
  return model, load_weights(model, official(file))


def scaled(file: str, factors: Mapping[str, float]) -> dict[str, np.ndarray]:
  """Official tensors, those that match an expression times its factor: epsilons then matter."""
  found = {}
  for name, tensor in official(file).items():
    factor = math.prod(f for pattern, f in factors.items() if re.search(pattern, name))
    found[name] = tensor if factor == 1 else tensor * np.float32(factor)
  return found


def channels_first(x: Any) -> np.ndarray:
  """(B, H, W, C) -> (B, C, H, W)."""
  return np.asarray(x).transpose(0, 3, 1, 2)


def assert_close(found: Any, expected: np.ndarray, tolerance: float = LOGITS) -> None:
  """Within a share of the largest value."""
  found = np.asarray(found)
  assert found.shape == expected.shape
  worst = np.abs(found - expected).max() / np.abs(expected).max()
  assert worst <= tolerance, worst
