"""The experiments, by name: `afformer/camvid:tiny` is `get_config("tiny")` of `afformer/camvid.py`.

A configuration is a plain `ml_collections.ConfigDict`. The part after the colon selects a variant
and means what the experiment's own docstring says.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from effseg_jax.errors import UserError, suggestion

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
  """The experiments that come with the package, sorted: `afformer/ade20k`, ..."""
  found = (path.relative_to(_FOLDER).with_suffix("") for path in _FOLDER.glob("*/*.py"))
  return sorted(
    path.as_posix() for path in found if path.name != "__init__" and path.parts[0] != "sweeps"
  )


def find(flag: str) -> str:
  """Where an experiment is: `FILE[:variant]`.

  Args:
    flag: a file of the user's, or the name of a packaged experiment (`afformer/camvid:tiny`), also
      written as its path in a checkout (`configs/afformer/camvid.py:tiny`), from any folder.

  Raises:
    UserError: if there is neither, with the closest name.
  """
  path, colon, variant = flag.partition(":")
  if Path(path).is_file():
    return flag
  name = path.removeprefix("./").removeprefix("configs/").removesuffix(".py")
  if name in names():
    return f"{_FOLDER / name}.py{colon}{variant}"
  known = names()
  raise UserError(
    f"--config={flag}: {path} does not exist and is no experiment of the package, such as"
    f" afformer/camvid:tiny.{suggestion(name, known)}"
  )


def label(flag: str) -> str:
  """The name of a packaged experiment, from its file: the opposite of `find`."""
  path, colon, variant = flag.partition(":")
  if Path(path).resolve().is_relative_to(_FOLDER):
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
  get_config = runpy.run_path(path).get("get_config")
  if get_config is None:
    raise UserError(f"--config={flag}: {path} has no get_config; expected an experiment's file.")
  return get_config(variant) if variant else get_config()
