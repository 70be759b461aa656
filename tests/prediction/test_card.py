"""Cards with missing or wrong fields end in one line."""

import copy

import pytest

from effseg_jax.errors import UserError
from effseg_jax.json_fields import fits
from effseg_jax.prediction import make_segmenter
from effseg_jax.prediction.source import find
from effseg_jax.weights.bundle import Bundle, load_bundle, read_bundle, save_bundle

SEMANTIC = {
  "model": {"name": "x", "fields": {}},
  "task": {"name": "semantic", "classes": ["a", "b"], "palette": [[0, 0, 0], [1, 1, 1]]},
  "inference": {"scale": [64, 64], "multiple": 32},
}
UNIVERSAL = {
  "model": {"name": "x", "fields": {}},
  "task": {**SEMANTIC["task"], "name": "universal", "is_thing": [True, False]},
  "inference": {"short_side": 64, "max_size": 96},
}
HEARING = {
  "model": {"name": "x", "fields": {}},
  "task": {"name": "audio_visual", "classes": ["a"], "palette": [[0, 0, 0]]},
  "inference": {"size": [64, 64]},
}


def changed(card, path, value=None):
  card = copy.deepcopy(card)
  *folders, name = path.split(".")
  place = card
  for folder in folders:
    place = place[folder]
  if value is None:
    del place[name]
  else:
    place[name] = value
  return card


@pytest.mark.parametrize(
  "card, path, value, message",
  [
    (SEMANTIC, "task", None, "the card has no task with a name"),
    (SEMANTIC, "task", "semantic", "the card has no task with a name"),
    (SEMANTIC, "task.name", None, "the card has no task with a name"),
    (SEMANTIC, "task.name", "semantics", "'semantics'.*Did you mean 'semantic'"),
    (SEMANTIC, "task.classes", None, "task has no classes; expected a list, each entry text"),
    (SEMANTIC, "task.classes", "ab", "task.classes is 'ab'; expected a list, each entry text"),
    (SEMANTIC, "task.classes", [], "classes is empty"),
    (SEMANTIC, "task.palette", None, "task has no palette"),
    (SEMANTIC, "task.palette", [[0, 0]], r"task.palette is \[\[0, 0\]\]; expected a list"),
    (SEMANTIC, "task.palette", [[0, 0, 0]], "palette has 1 colours for 2 classes"),
    (SEMANTIC, "task.mean", [1, 2], "task.mean is .* expected a list of 3, each a number"),
    (SEMANTIC, "task.ignore_label", "255", "task.ignore_label is '255'; expected a whole number"),
    (SEMANTIC, "inference", [1], r"inference is \[1\]; expected an object"),
    (SEMANTIC, "inference.scale", 64, "inference.scale is 64; expected a list of 2"),
    (SEMANTIC, "inference.multiple", "32", "multiple is '32'; expected a whole number"),
    (SEMANTIC, "inference.multiple", 0, "multiple is 0; expected 1 or more"),
    (SEMANTIC, "inference.mode", "windows", "mode is 'windows'; expected 'whole' or 'slide'"),
    (SEMANTIC, "inference.flip", 1, "flip is 1; expected true or false"),
    (SEMANTIC, "inference.scales", [], "scales is .*; expected factors above 0"),
    (SEMANTIC, "inference.stride", [0, 4], "expected 1 or more"),
    (UNIVERSAL, "task.is_thing", None, "task has no is_thing"),
    (UNIVERSAL, "task.is_thing", [True], "is_thing has 1 entries for 2 classes"),
    (UNIVERSAL, "task.is_thing", [1, 0], "is_thing is .* each entry true or false"),
    (UNIVERSAL, "inference.short_side", -1, "expected lengths in pixels"),
    (UNIVERSAL, "inference.detections", 0, "detections is 0; expected 1 or more"),
    (UNIVERSAL, "inference.score_threshold", "high", "score_threshold is 'high'; expected a num"),
    (HEARING, "task.palette", None, "task has no palette"),
    (HEARING, "task.mask_loss", "x", "mask_loss is 'x'; expected one of"),
    (HEARING, "inference.size", [64], "inference.size is .* expected a list of 2"),
  ],
)
def test_wrong_fields_end_in_one_line(card, path, value, message):
  with pytest.raises(UserError, match=message) as error:
    make_segmenter(Bundle(None, {}, changed(card, path, value)))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("card", [SEMANTIC, UNIVERSAL])
def test_a_card_may_lack_inference(card):
  make_segmenter(Bundle(None, {}, changed(card, "inference")))


def test_classification_predicts_nothing():
  card = {"task": {"name": "classification", "classes": ["a"]}}
  with pytest.raises(UserError, match="was trained for classification; prediction needs one for"):
    make_segmenter(Bundle(None, {}, card))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"widths": "abcd"}, "model.fields.widths is 'abcd'"),
    ({"widths": 5}, "model.fields.widths is 5"),
    ({"num_classes": "11"}, "model.fields.num_classes is '11'; expected a whole number"),
    ({"colour": 1}, "has no field 'colour'"),
  ],
)
def test_wrong_fields_of_the_model(tmp_path, fields, message):
  arrays, card = read_bundle(find("afformer_tiny_camvid"))
  card["model"]["fields"] |= fields
  save_bundle(tmp_path / "x.safetensors", arrays, card, half=True)
  with pytest.raises(UserError, match=message) as error:
    load_bundle(tmp_path / "x.safetensors")
  assert "\n" not in str(error.value)


def test_types():
  assert fits(1, float) and fits(None, tuple[int, int] | None) and fits((), tuple[float, ...])
  assert not fits(True, int) and not fits(1, bool) and not fits((1, 2, 3), tuple[int, int])
