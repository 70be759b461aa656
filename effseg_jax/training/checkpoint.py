"""Checkpoints with orbax: everything a run needs to go on, and what a reader needs to use it.

One step's folder holds the items `state` (a `TrainState`), `data` (the input iterator), `config`,
`card` (see `effseg_jax.weights.bundle`) and `run` (what must not change when a run goes on).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.checkpoint_managers import preservation_policy

import effseg_jax
from effseg_jax.errors import UserError
from effseg_jax.training import state as state_lib
from effseg_jax.training.state import TrainState, Variables
from effseg_jax.weights.bundle import Bundle, load_bundle

_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class RunDescription:
  """What is stored beside the arrays.

  Attributes:
    config: the experiment's configuration, JSON-compatible.
    card: model, classes, colours and normalisation, as in a released bundle.
    data: what the saved position in the data depends on (seed, batch size, workers, processes); a
      run that goes on must have the same.
  """

  config: Mapping[str, Any]
  card: Mapping[str, Any]
  data: Mapping[str, int | str]


class Checkpointer:
  """Saves asynchronously; keeps the latest checkpoints and the best one."""

  def __init__(self, workdir: str | Path, run: RunDescription, *, keep: int, metric: str):
    """Opens (or begins) the checkpoints of a working directory.

    Args:
      workdir: of the run; checkpoints go to `workdir/checkpoints/<step>`.
      run: stored with each checkpoint, and compared on resuming.
      keep: how many of the latest checkpoints stay, beside the best.
      metric: the evaluation metric by which the best is chosen; larger is better.
    """
    self._run = run
    policy = preservation_policy.AnyPreservationPolicy(
      [
        preservation_policy.LatestN(n=keep),
        preservation_policy.BestN(
          get_metric_fn=lambda metrics: metrics[metric],
          n=1,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    )
    self._manager = ocp.CheckpointManager(
      (Path(workdir) / _FOLDER).absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=lambda metrics: metrics[metric],  # orbax stores metrics only where this is given
        create=True,
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "data": grain.checkpoint.CheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
        "card": ocp.JsonCheckpointHandler(),
        "run": ocp.JsonCheckpointHandler(),
      },
    )

  def save(
    self, state: TrainState, batches: Any, metrics: Mapping[str, float] | None = None
  ) -> None:
    """Starts saving; the state may be donated to the next step as soon as this returns.

    Args:
      state: to save under its own step.
      batches: the grain iterator, positioned after the last batch the state has seen.
      metrics: of an evaluation of exactly this state, if there was one.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(batches),
        config=ocp.args.JsonSave(dict(self._run.config)),
        card=ocp.args.JsonSave(dict(self._run.card)),
        run=ocp.args.JsonSave(dict(self._run.data)),
      ),
      metrics=dict(metrics) if metrics else None,
      force=True,
    )

  def restore(self, state: TrainState, batches: Any) -> TrainState | None:
    """Restores the latest checkpoint onto the devices that hold `state`.

    Args:
      state: of the same shapes; gives the sharding. It is not changed.
      batches: the grain iterator; set to the saved position.

    Returns:
      The saved state, or None where nothing has been saved yet.

    Raises:
      UserError: if the run cannot go on exactly as it was, naming each difference.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    self._check_same_run(step)
    saved = _state_shapes(self._manager.directory / str(step) / "state")
    wanted = {name: tuple(leaf.shape) for name, leaf in _flat(state).items()}
    if saved != wanted:
      raise UserError(
        f"the checkpoint of step {step} in {self._manager.directory} holds another model or"
        f" optimizer: {_difference(saved, wanted)}. Use a new --workdir, or"
        " --config.init_from to start from its weights."
      )
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(batches)
      ),
    )
    return restored["state"]

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _check_same_run(self, step: int) -> None:
    saved = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
    for name, now in self._run.data.items():
      if saved.get(name) != now:
        raise UserError(
          f"this run was saved with {name} = {saved.get(name)} and goes on with {now}: the position"
          f" in the data would be another. Set it back, or use a new --workdir."
        )


def load_for_inference(path: str | Path) -> Bundle:
  """Loads a model to evaluate or to predict with.

  Args:
    path: a bundle file, a run's working directory (its best checkpoint by the evaluation metric,
      the latest if it has none), or the folder of one step.

  Returns:
    The model, its variables (the averaged ones, where the run kept an average; float32 on the
    host) and its card.

  Raises:
    UserError: if there is nothing there that can be loaded.
  """
  path = Path(path)
  if path.is_file():
    return load_bundle(path)
  step_folder = _step_folder(path)
  card = json.loads((step_folder / "card" / "metadata").read_text())
  state = _read_state(step_folder / "state")
  variables = state["average"] or {"params": state["params"], **state["model_state"]}
  model = effseg_jax.create_model(card["model"]["name"], **card["model"]["fields"])
  return Bundle(model, variables, card)


def initialise_from(state: TrainState, variables: Variables, source: str) -> TrainState:
  """Starts a run from other weights: takes what fits by name and shape, and says what did not.

  Args:
    state: a fresh state.
    variables: collections of arrays, of another head or another part of the model perhaps.
    source: where they come from, for the messages.

  Returns:
    The state with the fitting arrays replaced (in the average, too).

  Raises:
    UserError: if not one parameter fits.
  """
  ours = flatten_dict(dict(state.variables()), sep="/")
  theirs = flatten_dict(dict(variables), sep="/")
  fitting = {k for k, v in theirs.items() if k in ours and ours[k].shape == v.shape}
  if not any(name.startswith("params/") for name in fitting):
    raise UserError(f"{source}: no parameter fits the model; is it another model's file?")
  lines = [f"initialised from {source}: {len(fitting)} of {len(ours)} tensors"]
  for name in sorted(set(ours) - fitting):
    found = f"has shape {theirs[name].shape}" if name in theirs else "is not in the file"
    lines.append(f"  not loaded: {name} {tuple(ours[name].shape)} {found}")
  lines += [f"  unused: {name}" for name in sorted(set(theirs) - set(ours))]
  print("\n".join(lines), flush=True)
  merged = {name: theirs[name] if name in fitting else ours[name] for name in ours}
  return state_lib.replace_variables(state, unflatten_dict(merged, sep="/"))


def _step_folder(path: Path) -> Path:
  """The folder of the step that a path means."""
  if (path / "state").is_dir():
    return path
  folder = path / _FOLDER if (path / _FOLDER).is_dir() else path
  steps = sorted(
    (int(child.name), child)
    for child in (folder.iterdir() if folder.is_dir() else ())
    if child.name.isdigit() and (child / "state").is_dir()
  )
  if not steps:
    raise UserError(
      f"{path} holds no checkpoint; expected a bundle file (.safetensors, .npz) or the --workdir of"
      " a training run."
    )
  scored = [(_score(child), step, child) for step, child in steps]
  return max(scored)[2]


def _score(step_folder: Path) -> float:
  """The metric by which the run chose its best, stored with a step; -1 where it has none."""
  metrics = step_folder / "metrics" / "metrics"
  if not metrics.is_file():
    return -1.0
  config = json.loads((step_folder / "config" / "metadata").read_text())
  return json.loads(metrics.read_text())[config["eval"]["best_by"]]


def _read_state(folder: Path) -> dict[str, Any]:
  """Reads a saved state as nested dictionaries of host arrays."""
  checkpointer = ocp.PyTreeCheckpointer()
  tree = checkpointer.metadata(folder).item_metadata.tree
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  return checkpointer.restore(folder, restore_args=args)


def _state_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
  tree = ocp.PyTreeCheckpointer().metadata(folder).item_metadata.tree
  return {name: tuple(leaf.shape) for name, leaf in _flat(tree).items()}


def _flat(tree: Any) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
  """The first difference between two mappings of shapes, in words."""
  for name in sorted(set(saved) | set(wanted)):
    if saved.get(name) != wanted.get(name):
      return f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
  return "none"
