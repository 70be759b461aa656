"""Class names in letters that Pillow's own font lacks."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from effseg_jax import errors
from effseg_jax.pictures import semantic, text

CHINESE = ["\u80cc\u666f", "\u53f6\u5b50"]


def test_names_that_the_font_has_stay(monkeypatch):
  monkeypatch.setattr(text, "_system_font", lambda letters: pytest.fail("was searched"))
  _, names = text.readable(["background", "traffic light (2)"], 14)
  assert names == ["background", "traffic light (2)"]


def test_without_a_font_there_are_numbers_and_one_warning(monkeypatch):
  monkeypatch.setattr(errors, "_warned", set())
  monkeypatch.setattr(text, "_system_font", lambda letters: None)
  with pytest.warns(errors.DataWarning, match="no font of this system") as told:
    _, names = text.readable(["road", *CHINESE], 14)
    text.readable(CHINESE, 14)
  assert names == ["road", "class 1", "class 2"] and len(told) == 1
  picture = np.zeros((40, 60, 3), np.uint8)
  class_map = np.repeat([0, 1], 1200).reshape(40, 60)
  palette = np.array([[0, 0, 0], [9, 9, 9]], np.uint8)
  shown = [
    semantic.with_legend(picture, class_map, names, palette)
    for names in (CHINESE, ["class 0", "class 1"])
  ]
  np.testing.assert_array_equal(*shown)


def test_letters_that_a_font_lacks_are_told_from_those_it_has():
  font = ImageFont.load_default(20)
  assert text._has(font, frozenset("road 1")) and not text._has(font, frozenset(CHINESE[0]))
  found = text._system_font(frozenset("\u0434\u0436"))
  assert found is None or text._has(ImageFont.truetype(found, 20), frozenset("\u0434\u0436"))
