"""Names of classes in pictures: a font that has their letters, or numbers in their place."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import ImageFont

from effseg_jax.errors import warn_once

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Where systems keep fonts, and those that are likely to have many scripts, which are tried first.
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/System/Library/Fonts", "/Library/Fonts")
_LIKELY = ("cjk", "unicode", "dejavusans.", "notosans-regular", "wqy", "fallback", "pingfang")
_MOST_FONTS = 200  # that are tried


def readable(names: Sequence[str], size: int) -> tuple[Font, list[str]]:
  """A font for names, and the names as it can write them.

  Args:
    names: of classes.
    size: of the letters in pixels.

  Returns:
    Pillow's own font where it has all letters, otherwise one of the system's that has, otherwise
    Pillow's own with the names' places as numbers, and a warning.
  """
  default = ImageFont.load_default(size)
  letters = frozenset("".join(names))
  if _has(default, letters):
    return default, list(names)
  path = _system_font(letters)
  if path is not None:
    return ImageFont.truetype(path, size), list(names)
  warn_once(
    "no font",
    "no font of this system has the letters of all class names; pictures show their numbers"
    " (install one, on Debian: apt install fonts-noto-cjk).",
  )
  shown = [
    name if _has(default, frozenset(name)) else f"class {place}" for place, name in enumerate(names)
  ]
  return default, shown


@functools.lru_cache(64)
def _system_font(letters: frozenset[str]) -> str | None:
  for number, path in enumerate(_font_files()):
    if number >= _MOST_FONTS:
      break
    try:
      if _has(ImageFont.truetype(path, 16), letters):
        return path
    except OSError:  # a font that FreeType does not read
      continue
  return None


@functools.cache
def _font_files() -> tuple[str, ...]:
  folders = [Path(folder) for folder in _FOLDERS]
  if sys.platform == "win32":
    folders.append(Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"))
  found = [path for folder in folders for path in _fonts_in(folder)]
  likely = lambda path: not any(word in path.name.lower() for word in _LIKELY)  # noqa: E731
  return tuple(str(path) for path in sorted(found, key=lambda path: (likely(path), path.name)))


def _fonts_in(folder: Path) -> Iterator[Path]:
  for root, _, names in os.walk(folder):
    found = (name for name in names if name.lower().endswith((".ttf", ".ttc", ".otf")))
    yield from (Path(root, name) for name in found)


def _has(font: Font, letters: frozenset[str]) -> bool:
  """Whether a font draws every letter otherwise than the box of letters that it lacks."""
  boxes = {bytes(font.getmask(code)) for code in ("\uffff", "\U0010ffff")}
  return all(
    letter.isspace() or letter.isascii() or bytes(font.getmask(letter)) not in boxes
    for letter in letters
  )
