"""What is installed: a wheel, alone in a folder, used from another folder; and the dependencies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

from command import ENVIRONMENT
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Uses an installation as a person does, from the folder that it was started in. What belongs to the
# extras cannot be imported until training begins.
USE = """
import os
import sys

EXTRAS = ("array_record", "av", "clu", "grain", "matplotlib", "pycocotools", "soundfile", "soxr",
          "tensorboardX", "tensorflow_datasets", "tqdm")
for name in EXTRAS:
  sys.modules[name] = None

import effseg_jax
from effseg_jax import cli

site, checkpoints, config = sys.argv[1:]
assert effseg_jax.__file__.startswith(site), effseg_jax.__file__


def effseg(command, *words):
  try:
    cli.execute(command, words)
  except SystemExit as end:
    return end.code


camvid = f"--checkpoint={checkpoints}/afformer_tiny_camvid.safetensors"
assert not effseg("predict", camvid, "--input=street.png", "--output=out")
assert not effseg("models", "--pattern=afformer_tiny", "--size=64x64")
assert not effseg(
  "convert", f"--input={checkpoints}/afformer_tiny_camvid.safetensors",
  "--to_torch=official.safetensors",
)
clip = f"--checkpoint={checkpoints}/avesformer_synthetic.safetensors"
assert effseg("predict", clip, "--input=.", "--output=out") == 2

for name in EXTRAS:
  del sys.modules[name]
# A network of three layers trains, so that this takes seconds.
sys.path.append(os.path.dirname(config))
import tiny_run

tiny_run.use_net()
words = ("--config.train.num_steps=2", "--config.log.every=1", "--config.eval.every=2")
assert not effseg("train", f"--config={config}", "--workdir=run", *words)
"""


def install(folder: Path) -> tuple[Path, Path]:
  """Builds a source archive, a wheel from it, and installs that alone.

  Args:
    folder: an empty one; the checkout is copied, so that nothing is built in it.

  Returns:
    The archive, and a folder like site-packages.
  """
  checkout = folder / "checkout"
  skipped = shutil.ignore_patterns("__pycache__")
  for name in ("effseg_jax", "configs", "input_pipeline", "checkpoints"):
    shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=skipped)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, checkout)
  build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
  python([sys.executable, "-c", build, folder], cwd=checkout)
  (archive,) = folder.glob("*.tar.gz")
  pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
  offline = ("--no-deps", "--no-index", "--no-build-isolation")
  python([*pip, "wheel", *offline, archive], cwd=folder)
  (wheel,) = folder.glob("*.whl")
  python([*pip, "install", "--no-deps", f"--target={folder / 'site'}", wheel], cwd=folder)
  return archive, folder / "site"


def python(words, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
  """Runs a command that must succeed."""
  done = subprocess.run(
    [str(word) for word in words],
    cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
  return done


def files_below(folder: Path) -> set[Path]:
  """The Python files of a folder, relative to it."""
  return {path.relative_to(folder) for path in folder.rglob("*.py")}


def test_an_installation_is_the_package_alone_and_is_used_from_another_folder(tmp_path):
  archive, site = install(tmp_path)
  with tarfile.open(archive) as file:
    members = {member.name.partition("/")[2]: member for member in file.getmembers()}
  for name in ("effseg_jax/configs/afformer/camvid.py", "effseg_jax/input_pipeline/codecs.py"):
    assert members[name].isfile()  # and no link
  assert {path.name.split("-")[0] for path in site.iterdir()} == {"effseg_jax", "bin"}
  package = site / "effseg_jax"
  for name in ("configs", "input_pipeline"):
    assert files_below(package / name) == files_below(ROOT / name)
    assert not (package / name).is_symlink()
  assert (package / "py.typed").is_file()

  Image.new("RGB", (96, 64)).save(tmp_path / "street.png")
  words = (sys.executable, "-c", USE, site, ROOT / "checkpoints", ROOT / "tests/small_config.py")
  done = python(words, cwd=tmp_path, PYTHONPATH=str(site))
  assert "pip install 'effseg_jax[audio]'" in done.stderr
  assert (tmp_path / "out" / "street_classes.png").is_file()
  assert (tmp_path / "official.safetensors").is_file()
  assert "step 2/2" in done.stdout


def names_and_bounds(lines) -> dict[str, str]:
  """`["jax>=0.10  # why"]` -> `{"jax": "0.10"}`."""
  form = r"([\w\[\]-]+)(?:[>=]=([\d.]+))?"
  rows = (re.fullmatch(form, line.split("#")[0].strip()) for line in lines)
  return {row[1]: row[2] for row in rows if row}


def test_requirements_are_the_dependencies_with_the_extras():
  extras = PROJECT["optional-dependencies"]
  groups = [PROJECT["dependencies"], *(extras[n] for n in ("train", "audio", "coco", "sweep"))]
  needed = names_and_bounds(line for group in groups for line in group)
  assert None not in needed.values()
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  assert names_and_bounds(lines) == needed
  oldest = (ROOT / "requirements" / "oldest.txt").read_text().splitlines()
  assert names_and_bounds(oldest) == needed
