"""Checkpoints with orbax: everything that resuming a run needs, and everything that using its model
needs.

One step's folder holds the items `state` (a `TrainState`), `config`, `card` (see
`effseg_jax.weights.bundle`) and `run` (what must not change when a run is resumed). The position in
the data is the state's step: batch number n is a function of the seed and n
(`effseg_jax.input_pipeline.loader`), so that a run can be resumed with other numbers of devices,
processes and workers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from effseg_jax.errors import UserError
from effseg_jax.run import processes, seal
from effseg_jax.run.saved_model import CHECKPOINTS, steps_in
from effseg_jax.run.workdir import storage_errors
from effseg_jax.training import state as state_lib
from effseg_jax.training.state import TrainState, Variables

_BROKEN = "broken_checkpoints"
_ITEMS = ("state", "config", "card", "run")


@dataclasses.dataclass(frozen=True)
class RunDescription:
  """The data stored beside the arrays.

  Attributes:
    config: the experiment's configuration, JSON-compatible.
    card: model, classes, colours and normalisation, as in a released bundle.
    data: what the order of the data depends on (seed, batch size; name, options, number of
      examples and classes of the data set), JSON-compatible; a run that resumes must have the same.
  """

  config: Mapping[str, Any]
  card: Mapping[str, Any]
  data: Mapping[str, Any]


class Checkpointer:
  """Saves asynchronously; keeps the latest checkpoints and the best one."""

  def __init__(self, workdir: str | Path, run: RunDescription, *, keep: int, metric: str):
    """Opens (or begins) the checkpoints of a working directory; every process does.

    A checkpoint that is not whole is moved to `workdir/broken_checkpoints`, with a warning.

    Args:
      workdir: of the run; checkpoints go to `workdir/checkpoints/<step>`.
      run: stored with each checkpoint, and compared on resuming.
      keep: how many of the latest checkpoints stay, beside the best.
      metric: the evaluation metric by which the best is chosen; larger is better.

    Raises:
      UserError: if there are checkpoints and all of them are damaged, or the folder cannot be made.
    """
    self._run, self._keep, self._metric = run, keep, metric
    self._folder = (Path(workdir) / CHECKPOINTS).absolute()
    self._primary = jax.process_index() == 0
    _ignore_closed_event_loops()
    found = None
    if self._primary:
      try:
        self._set_damaged_aside()
      except UserError as error:
        found = error
    processes.agree(found)
    self._manager = self._open()

  def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
    """Starts saving; the state may be donated to the next step as soon as this returns.

    Args:
      state: to save under its own step.
      metrics: of an evaluation of exactly this state, if there was one.

    Raises:
      UserError: if the storage refuses it, or the checkpoint before.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    with storage_errors(self._folder):
      self._manager.wait_until_finished()
      self._seal()
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          config=ocp.args.JsonSave(dict(self._run.config)),
          card=ocp.args.JsonSave(dict(self._run.card)),
          run=ocp.args.JsonSave(dict(self._run.data)),
        ),
        metrics=dict(metrics) if metrics else None,
        force=True,
      )

  def restore(self, state: TrainState) -> TrainState | None:
    """Restores the latest checkpoint onto the devices that hold `state`.

    Args:
      state: of the same shapes; gives the sharding, which need not be the one it was saved with. It
        is not changed.

    Returns:
      The saved state, or None where nothing has been saved yet.

    Raises:
      UserError: if the run cannot be resumed exactly as it was, naming each difference; or if no
        checkpoint can be read.
    """
    damaged: list[int] = []
    while (step := self._manager.latest_step()) is not None:
      restored, reason = None, ""
      try:
        restored = self._restore_step(step, state)
      except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # the checkpoint is not to blame
      except Exception as error:  # whatever the library meets in a damaged file
        if seal.is_sealed(self._folder / str(step)):
          raise
        reason = str(error).splitlines()[0]
      if not processes.any_of(restored is None):
        return restored
      damaged.append(step)
      self._set_aside(step, reason)
      processes.agree(None)  # the others look only when it is gone
      self._manager.close()
      self._manager = self._open()
    if damaged:
      raise self._nothing_left(damaged)
    return None

  def saved_config(self) -> dict[str, Any] | None:
    """The configuration of the latest checkpoint; None where nothing has been saved yet."""
    step = self._manager.latest_step()
    if step is None:
      return None
    args = ocp.args.Composite(config=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)["config"]

  def check(self) -> None:
    """Raises `UserError` if the storage has refused a checkpoint that is being saved."""
    with storage_errors(self._folder):
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits until everything is on disk."""
    with storage_errors(self._folder):
      self._manager.wait_until_finished()
      self._seal()
      self._manager.close()

  def _open(self) -> ocp.CheckpointManager:
    policy = preservation_policy.AnyPreservationPolicy(
      [
        preservation_policy.LatestN(n=self._keep),
        preservation_policy.BestN(
          get_metric_fn=self._value,
          n=1,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    )
    with storage_errors(self._folder):
      return ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policy,
          # orbax stores metrics only where this is given
          best_fn=self._value,
          create=True,
          cleanup_tmp_directories=True,  # incomplete files of a killed process
        ),
        item_handlers={
          "state": ocp.StandardCheckpointHandler(),
          "config": ocp.JsonCheckpointHandler(),
          "card": ocp.JsonCheckpointHandler(),
          "run": ocp.JsonCheckpointHandler(),
        },
      )

  def _value(self, metrics: Mapping[str, float]) -> float:
    """The metric of a checkpoint; one that was saved under another `eval.best_by` may lack it."""
    return metrics.get(self._metric, -math.inf)

  def _restore_step(self, step: int, state: TrainState) -> TrainState:
    self._check_same_run(step)
    saved = _state_shapes(self._folder / str(step) / "state")
    wanted = {name: tuple(leaf.shape) for name, leaf in _flat(state).items()}
    if saved != wanted:
      raise UserError(
        f"the checkpoint of step {step} in {self._folder} holds another model or"
        f" optimizer: {_difference(saved, wanted)}. Use a new --workdir, or"
        " --config.init_from to start from its weights."
      )
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    return self._manager.restore(step, args=args)["state"]

  def _check_same_run(self, step: int) -> None:
    saved = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
    for name, now in json.loads(json.dumps(self._run.data)).items():
      if name in saved and saved[name] != now:  # earlier versions stored less
        raise UserError(
          f"this run was saved with {_change(name, saved[name], now)}: it would not resume as it"
          " was. Set it back, or use a new --workdir (with"
          f" --config.init_from={self._folder.parent} to start from its weights)."
        )

  def _seal(self) -> None:
    """Seals what is finished; the others are not there yet."""
    if self._primary:
      for folder in steps_in(self._folder).values():
        if not seal.is_sealed(folder):
          seal.seal(folder)

  def _set_damaged_aside(self) -> None:
    steps = steps_in(self._folder)
    sound, damaged = False, []
    for step in sorted(steps, reverse=True):
      # Of those before the one to resume from, only the metrics are read.
      reason = seal.fault(steps[step], _ITEMS, checksums=not sound)
      if reason is None:
        sound = True
      else:
        self._set_aside(step, reason)
        damaged.append(step)
    if damaged and not sound:
      raise self._nothing_left(damaged)

  def _set_aside(self, step: int, reason: str) -> None:
    if not self._primary:
      return
    aside = self._folder.parent / _BROKEN / str(step)
    with storage_errors(aside):
      shutil.rmtree(aside, ignore_errors=True)
      aside.parent.mkdir(exist_ok=True)
      (self._folder / str(step)).rename(aside)
    warnings.warn(
      f"the checkpoint of step {step} is damaged ({reason}) and was moved to {aside}; the one"
      " before it is used",
      stacklevel=2,
    )

  def _nothing_left(self, damaged: list[int]) -> UserError:
    return UserError(
      f"{self._folder}: no checkpoint can be read (damaged: {', '.join(map(str, damaged))}). They"
      f" are in {self._folder.parent / _BROKEN}; start again to begin from step 0."
    )


def initialise_from(state: TrainState, variables: Variables, source: str) -> TrainState:
  """Starts a run from other weights: takes tensors that fit by name and shape, and reports the
  others.

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


@functools.cache
def _ignore_closed_event_loops() -> None:
  """Where a write fails, orbax closes the event loop to which its storage library still reports.

  The failure itself is raised and reported in one line; dozens of tracebacks after it are not.
  """
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if "Event loop is closed" not in str(unraisable.exc_value):
      before(unraisable)

  sys.unraisablehook = hook


def _state_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
  tree = ocp.PyTreeCheckpointer().metadata(folder).item_metadata.tree
  return {name: tuple(leaf.shape) for name, leaf in _flat(tree).items()}


def _flat(tree: Any) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _change(name: str, saved: Any, now: Any) -> str:
  """A short description of the changes."""
  if isinstance(saved, dict) and isinstance(now, dict):
    key = next(key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key))
    return _change(f"{name}.{key}", saved.get(key), now.get(key))
  if isinstance(saved, list) and isinstance(now, list) and len(saved) + len(now) > 8:
    if len(saved) != len(now):
      return f"{len(saved)} {name} and there are {len(now)} now"
    index = next(i for i, (a, b) in enumerate(zip(saved, now, strict=True)) if a != b)
    return _change(f"{name}[{index}]", saved[index], now[index])
  return f"{name} = {saved} and now has {now}"


def _difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
  """The first difference between two mappings of shapes, in words."""
  for name in sorted(set(saved) | set(wanted)):
    if saved.get(name) != wanted.get(name):
      return f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
  return "none"
