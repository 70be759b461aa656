"""The configurations of universal segmentation: they build and fit their models."""

import jax
import numpy as np
import pytest

from effseg_jax import configs, create_model, experiment
from effseg_jax.errors import UserError
from effseg_jax.evaluators.universal import mask_inference_options
from effseg_jax.input_pipeline import pipelines
from effseg_jax.input_pipeline.datasets import DATASETS
from effseg_jax.tasks import make_task
from effseg_jax.training import optimizer as optimizer_lib
from effseg_jax.training import state as state_lib
from effseg_jax.training import trees

CONFIGS = [
  name
  for name in configs.names()
  if name.partition("/")[0] in ("mask2former", "proscale", "eco_m2f")
]


class _Dataset:
  classes = ("ground", "sky", "tree", "car")
  palette = np.arange(12, dtype=np.uint8).reshape(4, 3)
  thing_mask = np.array([False, False, True, True])
  num_classes = 4


def _config(name, backbone="r50", layers="111"):
  variant = f"{backbone},{layers}" if name.startswith("proscale/") else backbone
  return configs.load(f"{name}:{variant}")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_accepts_its_settings(name):
  for backbone in ("r50", "swin_tiny"):
    config = _config(name, backbone)
    task = make_task(config.task.to_dict(), _Dataset())
    fields = experiment.model_fields(config.model, 4)
    assert create_model(config.model.name, **fields).num_classes == 4
    if "proscale" in name:
      assert config.model.proscale_layers == (1, 1, 1)
    steps = pipelines.train_transforms(config.task.name, **config.data.augment.to_dict())
    assert len(steps) >= 4 and config.data.name in DATASETS
    inference = mask_inference_options(config.eval.to_dict(), task)
    results = {"PQ": inference.panoptic, "AP": inference.instance, "mIoU": inference.semantic}
    assert results[config.eval.best_by]


@pytest.mark.parametrize("family, backbone", [("mask2former", "r50"), ("proscale", "swin_tiny")])
def test_learning_rates_and_decay_by_name(family, backbone):
  config = _config(f"{family}/coco_panoptic", backbone)
  model = create_model(config.model.name, **experiment.model_fields(config.model, 133))
  inputs = [jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)]
  params = state_lib.model_shapes(model, inputs)["params"]
  names = trees.leaf_names(params)
  rules = config.optimizer.to_dict()
  optimizer_lib.make_optimizer(rules, lambda step: 1e-4, params)  # every rule finds a parameter
  undecayed = [n for n in names if trees.first_match(rules["decay_rules"], n, 1.0) == 0.0]
  plain = [n for n in names if n not in undecayed]
  assert "decoder/query_features" in undecayed and "decoder/level_embed" in undecayed
  assert "pixel_decoder/inputs/level_embed" in plain
  assert "decoder/layer_0/cross_attention/in_bias" in plain
  assert not [n for n in plain if n.endswith("scale") or "relative_position_bias" in n]
  assert not [n for n in undecayed if n.endswith("kernel")]
  slow = [n for n in names if trees.first_match(rules["lr_rules"], n, 1.0) == 0.1]
  assert slow == [n for n in names if n.startswith("backbone/")]
  assert rules["clip_norm"] == 0.01


def test_the_schedules_of_the_recipes():
  def rate(name, step):
    config = _config(f"proscale/{name}")
    options = config.schedule.to_dict()
    return float(
      experiment.schedules.make_schedule(options, config.optimizer.learning_rate, 160_000)(step)
    )

  assert rate("coco_panoptic", 0) == pytest.approx(1e-4)
  assert rate("coco_panoptic", 327_777) == pytest.approx(1e-4)
  assert rate("coco_panoptic", 327_778) == pytest.approx(1e-5)
  assert rate("coco_panoptic", 355_092) == pytest.approx(1e-6)
  assert rate("ade20k_semantic", 80_000) == pytest.approx(1e-4 * 0.5**0.9)


def test_unknown_variants_are_named():
  with pytest.raises(UserError, match=r"no backbone 'swin_tin'.*Did you mean 'swin_tiny'"):
    configs.load("mask2former/coco_panoptic:swin_tin")
  with pytest.raises(UserError, match="a digit for each of three stages"):
    configs.load("proscale/coco_panoptic:r50,33")
