"""Defaults of every experiment: how to run, not what to learn.

A configuration is a plain `ml_collections.ConfigDict`; a config file calls `defaults.run()` and
sets everything else itself. Types are fixed: a misspelt field or a wrong type ends in one line.
`schema` defines the valid values of a field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Fields that go with one choice of `optimizer.name` or `schedule.name`, and their defaults. All
# other fields of these sections go with every choice.
CHOICES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
  "optimizer": {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "sgd": {"momentum": 0.9},
  },
  "schedule": {
    "poly": {"power": 1.0, "end": 0.0},
    # `ramp` steps up after `delay` steps of nothing; see `training.schedules.delayed_poly`.
    "delayed_poly": {"power": 1.0, "end": 0.0, "delay": 0, "ramp": 500},
    "cosine": {"end": 0.0},
    # A tenth of the rate after 8/9 and 26/27 of the steps, as Mask2Former's recipe has it.
    "step": {"milestones": (0.8889, 0.963), "factor": 0.1},
    "constant": {},
  },
}


def run() -> ConfigDict:
  """Seed, devices, checkpoints and log."""
  config = ConfigDict()
  config.seed = 0  # of the parameters, the data order and everything random
  # Start from these weights: a bundle, an official file, another workdir; several with commas.
  config.init_from = ""
  config.on_nonfinite = "stop"  # or "skip": the step changes nothing, and is counted in the log

  # Devices along each axis of the mesh; -1: all that are left. Rules place parameters by name:
  # "fsdp" shards the largest divisible dimension over the fsdp axis (see training/sharding.py).
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "model": 1, "rules": ((".*", "fsdp"),)})

  # Steps between resumable checkpoints, and how many of the latest stay (the best always does).
  # Steps between two of them; 0 means never, here and everywhere.
  config.checkpoint = ConfigDict({"every": 1000, "keep": 2})
  config.log = ConfigDict({"every": 50})

  # A run that shows no sign of life for this long is reported, with the host; and how often each
  # process writes WORKDIR/heartbeat_<process>.json, both in seconds; 0: not.
  config.watch = ConfigDict({"stall_seconds": 300.0, "heartbeat": 0.0})
  return config


def complete(config: ConfigDict) -> ConfigDict:
  """Adds the fields that belong to a configuration's choices, and removes those of others.

  `config.optimizer.name = "sgd"` alone is enough: `momentum` gets its default, and `b1` leaves.

  Args:
    config: changed in place; a section without a known choice stays as it is.

  Returns:
    The same configuration.
  """
  with config.unlocked():
    for section, choices in CHOICES.items():
      found = config.get(section)
      if found is None or found.get("name") not in choices:
        continue
      own = choices[found.name]
      for field in {field for fields in choices.values() for field in fields} - set(own):
        if field in found:
          del found[field]
      for field, value in own.items():
        if field not in found:
          found[field] = value
  return config


def loading() -> dict[str, object]:
  """How input is read: threads and worker processes per host, and the reaction to a broken file.

  `mixture` trains on several data sets of the same classes instead of `data.name`:
  ((name, root, split, weight), ...).
  """
  return {
    "num_threads": 4,
    "num_workers": 0,
    "on_error": "raise",
    "check": "on",  # a look at the data, of seconds, before the first step
    "mixture": (),
  }


def adamw(learning_rate: float, weight_decay: float) -> ConfigDict:
  """AdamW with PyTorch's defaults; rules are `(regular expression, factor)` over names."""
  return ConfigDict(
    {
      "name": "adamw",
      "learning_rate": learning_rate,
      "weight_decay": weight_decay,
      **CHOICES["optimizer"]["adamw"],
      "clip_norm": 0.0,  # 0: gradients are not clipped
      "lr_rules": (),
      "decay_rules": (),
      "freeze": (),
    }
  )


def poly(warmup_steps: int, power: float = 1.0) -> ConfigDict:
  """The polynomial schedule of MMSegmentation's recipes, with its linear warm-up."""
  return ConfigDict(
    {
      "name": "poly",
      "power": power,
      "end": 0.0,
      "warmup_steps": warmup_steps,
      "warmup_ratio": 1e-6,
    }
  )


def whole_image(scale: tuple[int, int], multiple: int) -> dict[str, object]:
  """Evaluation of whole images, as MMSegmentation's `mode="whole"` does it.

  Args:
    scale: (long, short) side that images are resized to, keeping their ratio; (0, 0): as they are.
    multiple: then both sides are stretched up to a multiple of this; 1: not.
  """
  return {
    "scale": scale,
    "multiple": multiple,
    "mode": "whole",  # or "slide"
    "crop": (512, 512),  # of the sliding window
    "stride": (341, 341),  # between sliding windows
    "scales": (1.0,),  # more than one: class probabilities are averaged over the scales
    "flip": False,  # and over the mirrored image
    "best_by": "mIoU",
    "pictures": 3,
  }
