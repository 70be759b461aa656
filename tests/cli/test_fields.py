"""Experiments by name, and their fields on the command line."""

from __future__ import annotations

import pytest

from effseg_jax import cli, configs
from effseg_jax.cli import train
from effseg_jax.configs.defaults import CHOICES
from effseg_jax.errors import UserError


def parsed(*words):
  """The configuration that `effseg train` gets from these words."""
  return cli.parse(train, words)[0].config


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("optimizer.name=sgd", {"momentum": 0.9}),
    ("optimizer.name=adamw", {"b1": 0.9, "b2": 0.999, "eps": 1e-8}),
    ("schedule.name=cosine", {"end": 0.0}),
    ("schedule.name=step", {"milestones": (0.8889, 0.963), "factor": 0.1}),
    ("schedule.name=constant", {}),
    ("schedule.name=poly", {"power": 1.0, "end": 0.0}),
  ],
)
def test_a_choice_brings_its_own_fields_and_no_others(name, fields):
  section, _, choice = name.partition(".name=")
  before = configs.load("afformer/ade20k")[section].to_dict()
  chosen = {field for own in CHOICES[section].values() for field in own}
  common = {field: value for field, value in before.items() if field not in chosen}
  config = parsed("--config=afformer/ade20k", f"--config.{name}")
  assert config[section].to_dict() == {**common, "name": choice, **fields}


def test_the_fields_of_a_choice_can_be_set():
  config = parsed(
    "--config=proscale/coco_panoptic",
    "--config.optimizer.momentum=0.5",
    "--config.optimizer.name=sgd",
    "--config.schedule.milestones=(3,5)",
  )
  assert config.optimizer.momentum == 0.5
  assert config.schedule.milestones == (3, 5)
  with pytest.raises(UserError, match=r"optimizer has no field 'b1'; its fields: .*momentum"):
    parsed("--config=afformer/synthetic", "--config.optimizer.name=sgd", "--config.optimizer.b1=1")


def test_the_last_of_a_field_counts():
  config = parsed(
    "--config=afformer/camvid",
    "--config=afformer/synthetic:small",
    "--config.eval.scales=(0.5,1.0)",
    "--config.eval.scales",
    "(1.0,1.25)",
    "--config.optimizer.freeze=a,b",
    "--config.optimizer.freeze=norm,head",
    "--config.train.batch_size=4",
    "--config.train.batch_size=2",
  )
  assert config.model.name == "afformer_small"
  assert config.eval.scales == (1.0, 1.25)
  assert config.optimizer.freeze == ("norm", "head")
  assert config.train.batch_size == 2


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("--config.train.batchsize=4", "train has no field 'batchsize'.*Did you mean 'batch_size'"),
    ("--config.trian.batch_size=4", "the configuration has no field 'trian'.*mean 'train'"),
    ("--config.seed.x=4", "seed has no field 'x'"),
    ("--config.train.num_steps=many", "num_steps=many"),
  ],
)
def test_a_wrong_field_ends_in_one_line(word, message):
  with pytest.raises(UserError, match=message) as caught:
    parsed("--config=afformer/synthetic", word)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["{}", "configs/{}.py", "./configs/{}.py"])
@pytest.mark.parametrize("name", ["proscale/coco_panoptic", "afformer/camvid"])
def test_every_way_of_naming_an_experiment(form, name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  expected = configs.load(name).to_json()
  assert configs.load(form.format(name)).to_json() == expected
  assert configs.label(form.format(name)) == name
  variant = "r50,111" if name.startswith("proscale") else "base"
  assert configs.load(f"{form.format(name)}:{variant}").model.name.endswith(
    variant.split(",", maxsplit=1)[0]
  )
  with pytest.raises(UserError, match="Did you mean '"):
    configs.find(form.format(name[:-1]))


@pytest.mark.parametrize("name", configs.names())
def test_every_experiment_says_what_it_is(name):
  about = configs.about(name)
  assert f"--config={name}" in about or f"--config=configs/{name}.py" in about
  assert "Measured" in about or "measured" in about or name == "afformer/folder"
  assert "Variants: " in about
  assert configs.load(name).model.name


def test_help_describes_an_experiment(capsys):
  with pytest.raises(SystemExit):
    cli.execute("train", ["--config=proscale/coco_panoptic", "--help"])
  said = capsys.readouterr().out
  assert "R50 51.44 PQ" in said
  assert "Variants: `r50` or `swin_tiny`" in said
  assert "--config.train.batch_size=16" in said
  with pytest.raises(SystemExit):
    cli.execute("train", ["--help"])
  assert "proscale/coco_panoptic" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--config.eval.best_by=miou"], "eval.best_by is 'miou'; expected one of 'mIoU'"),
    (["--config.train.accumulate=3"], "train.accumulate is 3; expected a divisor"),
    (["--config.train.accumulate=0"], "train.accumulate is 0; expected a whole number"),
    (["--config.log.every=-1"], "log.every is -1; expected a whole number of 0 or more"),
    (["--config.optimizer.name=adam"], "Did you mean 'adamw'"),
    (["--config.schedule.name=cosin"], "Did you mean 'cosine'"),
    (["--config.schedule.name=step", "--config.schedule.milestones=(5,3)"], "ascending"),
    (["--config.task.normalize_by=vaild"], "Did you mean 'valid'"),
    (["--config.task.class_weights=(1.0,2.0)"], "has 2 numbers; expected 8"),
    (["--config.on_nonfinite=ignore"], "expected 'stop' or 'skip'"),
    (["--config.model.dtype=float16"], "expected 'float32' or 'bfloat16'"),
    (["--config.data.on_error=ignore"], "expected 'raise' or 'skip'"),
  ],
)
def test_a_wrong_value_ends_in_one_line_and_makes_no_folder(words, message, tmp_path, capsys):
  workdir = tmp_path / "run"
  with pytest.raises(SystemExit) as end:
    cli.execute("train", ["--config=afformer/synthetic", f"--workdir={workdir}", *words])
  assert end.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not workdir.exists()
