"""Stores the embeddings of a data set's sounds by a frozen VGGish, to train without running it.

  effseg embed_audio --config=avesformer/s4 --weights=vggish.pth \
    --config.data.root=data/AVSBench --output=data/AVSBench/vggish
  effseg train --config=avesformer/s4 --config.data.root=data/AVSBench \
    --config.init_from=resnet50.pth,vggish.pth --config.data.options.embeddings=data/AVSBench/vggish

Writes a file per clip, `<output>/<split>/<clip>.npy`, float32 (T, 128): the numbers that the model
would compute, because VGGish is not trained and its sounds are not augmented. Existing files are
kept, so an interrupted call resumes; `weights.json` identifies the weights, and other weights are
refused. Give `--config.init_from` the same VGGish: the model keeps it for sounds without stored
embeddings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from effseg_jax.cli import Flags, define_config, no_arguments
from effseg_jax.errors import UserError, extra

_FACTS = "weights.json"


def embed_splits(config: ConfigDict, weights: str, output: str | Path, splits: list[str]) -> int:
  """Embeds the sounds of splits of the configured data set.

  Args:
    config: an experiment whose model has a VGGish.
    weights: anything `init_from` takes that holds one.
    output: folder; made if it is missing.
    splits: names.

  Returns:
    How many clips were embedded; those that are there already are not counted.

  Raises:
    UserError: if the model's sound encoder is trained, the data are no clips of files, the weights
      hold no VGGish, or the folder has embeddings of others.
  """
  import jax
  import numpy as np

  with extra("train"):
    from tqdm import tqdm

  from effseg_jax import experiment
  from effseg_jax.input_pipeline.datasets.clips import ClipFiles
  from effseg_jax.models.avesformer import embed
  from effseg_jax.training import trees

  opened = [experiment.open_dataset(config, split) for split in splits]
  if not all(isinstance(dataset, ClipFiles) for dataset in opened):
    raise UserError(
      f"{config.data.name} has no sounds in files; expected s4, ms3 or avss, not packed."
    )
  model = experiment.make_model(config.model, opened[0].num_classes)
  if model.audio != "vggish":
    raise UserError(
      f"{config.model.name} trains its sound encoder ({model.audio}), so there is nothing to store;"
      " expected a model with VGGish."
    )
  params = experiment.read_variables(weights, model).get("params", {})
  if "audio" not in params:
    raise UserError(f"--weights={weights} holds no VGGish.")
  own = {"params": {"audio": params["audio"]}}
  _check_folder(Path(output), {"vggish_sha256": trees.fingerprint(own["params"]["audio"])})

  run = jax.jit(lambda variables, patches: embed(model, variables, patches))
  own, made = jax.device_put(own), 0
  for dataset in opened:
    for index in tqdm(range(len(dataset)), desc=dataset.split, unit=" clips", disable=None):
      path = dataset.embedding_path(index, output)
      if path.is_file():
        continue
      path.parent.mkdir(parents=True, exist_ok=True)
      new = path.with_suffix(".part")
      with new.open("wb") as file:
        np.save(file, np.asarray(run(own, dataset.patches(index)), np.float32))
      os.replace(new, path)
      made += 1
  return made


def _check_folder(output: Path, facts: dict[str, str]) -> None:
  """Records in the folder which weights were used; other weights raise `UserError`."""
  path = output / _FACTS
  if not path.is_file():
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts) + "\n", encoding="utf-8")
  elif json.loads(path.read_text(encoding="utf-8")) != facts:
    raise UserError(f"{output} has embeddings of another VGGish; choose another --output.")


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  define_config(values)
  flags.DEFINE_string(
    "weights", None, "File with a VGGish; default: the experiment's init_from.", flag_values=values
  )
  flags.DEFINE_string("output", None, "Folder of the embeddings.", flag_values=values)
  flags.DEFINE_list(
    "splits",
    None,
    "Splits; default: those that the experiment trains and evaluates on.",
    flag_values=values,
  )


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and embeds."""
  no_arguments(arguments)
  if values.config is None or not values.output:
    raise UserError("--config and --output are needed; see effseg embed_audio --help.")
  config = values.config
  weights = values.weights or config.init_from
  if not weights:
    raise UserError("--weights is needed: the official vggish.pth, or anything that holds one.")
  splits = values.splits or list(dict.fromkeys([config.data.train_split, config.eval.split]))
  made = embed_splits(config, weights, values.output, splits)
  print(f"{made:,} clips embedded in {values.output}; read with --config.data.options.embeddings")
