"""The documents' commands can be parsed, their links lead somewhere, their images exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from effseg_jax import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
  path.relative_to(ROOT).as_posix()
  for folder in (ROOT, ROOT / "docs", ROOT / "docs" / "guides")
  for path in folder.glob("*.md")
)


def commands(text: str) -> list[list[str]]:
  """The words of each `effseg` command in a document's code blocks, without placeholders."""
  found = []
  for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
      match = re.match(r"(?:!|srun )?(effseg \w.*)", line)
      if match and "..." not in match[1]:
        words = shlex.split(match[1].partition(" | ")[0].removesuffix("&"), comments=True)
        found.append(words[1:])
  return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_understood(document, monkeypatch):
  monkeypatch.chdir(ROOT)
  for name, *words in commands((ROOT / document).read_text()):
    place = "import_" if name == "import" else name  # a keyword cannot name a module
    module = importlib.import_module(f"effseg_jax.cli.{place}")
    if "--help" not in words:
      cli.parse(module, words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
  path = ROOT / document
  for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
    if not target.startswith(("http://", "https://")):
      assert (path.parent / target).exists(), target


def test_there_is_one_address_of_the_repository():
  files = [*DOCUMENTS, "pyproject.toml", "CITATION.cff", "mkdocs.yml"]
  files += [path.relative_to(ROOT).as_posix() for path in ROOT.glob("colabs/*.ipynb")]
  found = set()
  for name in files:
    pattern = r"https://github\.com/[\w-]+/effseg_jax"
    found |= set(re.findall(pattern, (ROOT / name).read_text()))
  assert len(found) == 1
