"""The experiments, by name: `afformer/camvid:tiny` is `get_config("tiny")` of `afformer/camvid.py`.

A configuration is a plain `ml_collections.ConfigDict`. The part after the colon selects a variant;
`about(name)` lists them. Experiments that differ in a recipe and a model alone are rows
of a table in their folder (see `tables`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from effseg_jax.errors import UserError, suggestion

if TYPE_CHECKING:
  from effseg_jax.configs.tables import Row

_FOLDER = Path(__file__).resolve().parent
_NO_EXPERIMENTS = ("sweeps",)


def names() -> list[str]:
  """The experiments that come with the package, sorted: `afformer/ade20k`, ..."""
  files = (path.relative_to(_FOLDER).with_suffix("") for path in _FOLDER.glob("*/*.py"))
  found = {path.as_posix() for path in files if path.name != "__init__"}
  return sorted(
    name for name in (*found, *_rows()) if name.partition("/")[0] not in _NO_EXPERIMENTS
  )


def find(flag: str) -> str:
  """Which experiment a word means: `FILE[:variant]`, or `NAME[:variant]` of a row in a table.

  Args:
    flag: a file of the user's, or the name of a packaged experiment (`afformer/camvid:tiny`), also
      written as its path in a checkout (`afformer/camvid:tiny`), from any folder.

  Raises:
    UserError: if there is neither, with the closest name.
  """
  path, colon, variant = flag.partition(":")
  if Path(path).is_file():
    return flag
  name = path.removeprefix("./").removeprefix("configs/").removesuffix(".py")
  if name in _rows():
    return f"{name}{colon}{variant}"
  if name in names():
    return f"{_FOLDER / name}.py{colon}{variant}"
  raise UserError(
    f"--config={flag}: {path} does not exist and is no experiment of the package, such as"
    f" afformer/camvid:tiny.{suggestion(name, names())}"
  )


def label(flag: str) -> str:
  """The short name of an experiment: `afformer/camvid:tiny`, or the path of a user's own file."""
  path, colon, variant = find(flag).partition(":")
  if Path(path).is_file() and Path(path).resolve().is_relative_to(_FOLDER):
    path = Path(path).resolve().relative_to(_FOLDER).with_suffix("").as_posix()
  return f"{path}{colon}{variant}"


def load(flag: str) -> ConfigDict:
  """Reads an experiment.

  Args:
    flag: as for `find`.

  Raises:
    UserError: if there is no such experiment, or the file has no `get_config`.
  """
  path, _, variant = find(flag).partition(":")
  if path in _rows():
    return _rows()[path].get_config(variant)
  get_config = runpy.run_path(path).get("get_config")
  if get_config is None:
    raise UserError(f"--config={flag}: {path} has no get_config; expected an experiment's file.")
  if variant and not inspect.signature(get_config).parameters:
    raise UserError(f"--config={flag}: {path} has no variants; expected --config={path}.")
  return get_config(variant) if variant else get_config()


def about(flag: str) -> str:
  """The description of an experiment: paper, results, hardware, time, command and variants.

  Args:
    flag: as for `find`.

  Raises:
    UserError: if there is no such experiment.
  """
  path = find(flag).partition(":")[0]
  if path in _rows():
    row = _rows()[path]
    return f"{row.about.strip()}\n\nVariants: {row.variants}; default {row.variant}."
  tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
  text = ast.get_docstring(tree) or f"{path} has no docstring."
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name == "get_config" and node.args.args:
      words = " ".join((ast.get_docstring(node) or "").partition("variant:")[2].split())
      default = f"; default {ast.literal_eval(node.args.defaults[0])}" if node.args.defaults else ""
      text += f"\n\nVariants: {words.rstrip('.')}{default}." if words else ""
  return text


@functools.cache
def _rows() -> Mapping[str, Row]:
  """The rows of all tables, by the experiment's name."""
  found = {}
  for path in sorted(_FOLDER.glob("*/__init__.py")):
    folder = path.parent.name
    table = getattr(importlib.import_module(f"{__name__}.{folder}"), "EXPERIMENTS", {})
    found |= {f"{folder}/{name}": row for name, row in table.items()}
  return found
