"""What every experiment shares unless it says otherwise: how to run, not what to learn.

A configuration is a plain `ml_collections.ConfigDict`; a config file calls `defaults.run()` and
sets everything else itself. Types are fixed: a misspelt field or a wrong type ends in one line.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def run() -> ConfigDict:
  """Seed, devices, checkpoints and log."""
  config = ConfigDict()
  config.seed = 0  # of the parameters, the data order and everything random
  # Start from these weights: a bundle, an official file, another workdir; several with commas.
  config.init_from = ""
  config.on_nonfinite = "stop"  # or "skip": the step changes nothing, and is counted

  # Devices along each axis of the mesh; -1: all that are left. Rules place parameters by name:
  # "fsdp" cuts the largest divisible dimension over the fsdp axis (see training/sharding.py).
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "model": 1, "rules": ((".*", "fsdp"),)})

  # Steps between resumable checkpoints, and how many of the latest stay (the best always does).
  config.checkpoint = ConfigDict({"every": 1000, "keep": 2})
  config.log = ConfigDict({"every": 50})

  # A run that shows no sign of life for this long is reported, with the host; and how often each
  # process writes WORKDIR/heartbeat_<process>.json, both in seconds; 0: not.
  config.watch = ConfigDict({"stall_seconds": 300.0, "heartbeat": 0.0})
  return config


def loading() -> dict[str, object]:
  """How input is read: threads and worker processes a host, and what a broken file does.

  `mixture` trains on several data sets of the same classes instead of `data.name`:
  ((name, root, split, weight), ...).
  """
  return {"num_threads": 4, "num_workers": 0, "on_error": "raise", "mixture": ()}


def adamw(learning_rate: float, weight_decay: float) -> ConfigDict:
  """AdamW with PyTorch's defaults; rules are `(regular expression, factor)` over names."""
  return ConfigDict(
    {
      "name": "adamw",
      "learning_rate": learning_rate,
      "weight_decay": weight_decay,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "clip_norm": 0.0,  # 0: gradients are not clipped
      "lr_rules": (),
      "decay_rules": (),
      "freeze": (),
    }
  )


def poly(warmup_steps: int, power: float = 1.0) -> ConfigDict:
  """The polynomial schedule of MMSegmentation's recipes, with its linear warm-up."""
  return ConfigDict(
    {"name": "poly", "power": power, "warmup_steps": warmup_steps, "warmup_ratio": 1e-6}
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
