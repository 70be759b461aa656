"""The study of a sweep: its storage, the queue of trials, sampler and pruner.

Optuna's storage is the only thing that workers share. All trials are enqueued when the study is
made, so that any number of workers together run each of them once. A worker holds a lock in the
trial's folder; a trial that is running by the storage's account and whose lock is free belonged to
a worker that died, and the next worker resumes it from its checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effseg_jax.configs import sweeps
from effseg_jax.errors import UserError, suggestion
from effseg_jax.run.trial import StudyTrial

if TYPE_CHECKING:
  import optuna

NAME = "sweep"  # of the study in its storage
CHANGES = "changes"  # user attribute of a trial of a list: field -> value
FOLDER = "folder"  # user attribute: the trial's workdir, below that of the sweep
REASON = "reason"  # user attribute: why a trial failed
PRUNED_AT = "pruned_at"  # user attribute: the step at which training ended early

_SAMPLERS = ("random", "tpe", "gp", "nsga2")
_PRUNERS = ("none", "median", "asha", "hyperband")


def import_optuna() -> Any:
  """Optuna, with its log of every trial silenced.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import optuna
  except ImportError:
    raise UserError(
      "sweeps need Optuna, which is not installed: pip install 'effseg_jax[sweep]'."
    ) from None
  optuna.logging.set_verbosity(logging.ERROR)
  return optuna


def storage_url(workdir: Path, storage: str | None) -> str:
  """Where the study is kept: an RDB URL (`sqlite:///sweep.db`), or by default a journal file."""
  return storage or f"journal://{workdir.absolute() / 'study.log'}"


def open_storage(url: str) -> Any:
  """Opens Optuna's storage.

  Args:
    url: `journal://FILE` on storage that all workers share, or any URL that Optuna takes.

  Raises:
    UserError: if it cannot be opened.
  """
  optuna = import_optuna()
  if url.startswith("journal://"):
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(url.removeprefix("journal://")))
  try:
    return optuna.storages.get_storage(url)
  except Exception as error:
    raise UserError(f"--storage={url} cannot be opened: {str(error).splitlines()[0]}") from None


def create(
  plan: sweeps.Sweep | sweeps.Search, url: str, metric: str, count: int | None = None
) -> optuna.Study:
  """Makes the study and enqueues its trials, or opens the one that is there.

  Args:
    plan: the sweep.
    url: of the storage.
    metric: the experiment's `eval.best_by`, which is maximised if the plan names no objectives.
    count: number of trials of a search; None: the plan's. A larger number than before adds trials.

  Raises:
    UserError: for an unknown sampler or pruner, a plan without trials, or a storage that holds
      the study of another plan.
  """
  optuna = import_optuna()
  objectives = objectives_of(plan, metric)
  _check(plan, objectives)
  study = optuna.create_study(
    storage=open_storage(url),
    study_name=NAME,
    directions=["maximize"] * len(objectives),
    load_if_exists=True,
  )
  described = describe(plan, objectives)
  known = study.user_attrs.get("plan")
  if known is not None and known != described:
    raise UserError(
      f"{url} holds the trials of another sweep (its space, list, pruner or objectives differ);"
      " choose another --workdir."
    )
  study.set_user_attr("plan", described)
  study.set_user_attr("pruner", dataclasses.asdict(plan.pruner))
  study.set_user_attr("objectives", list(objectives))
  wanted = len(plan.trials) if isinstance(plan, sweeps.Sweep) else count or plan.trials
  have = sum(1 for trial in study.get_trials(deepcopy=False) if "retry_of" not in trial.user_attrs)
  width = max(2, len(str(wanted - 1)))
  for number in range(have, wanted):
    changes = plan.trials[number] if isinstance(plan, sweeps.Sweep) else None
    attributes: dict[str, Any] = {FOLDER: f"{number:0{width}d}"}
    if changes is not None:
      attributes[CHANGES] = {field: _plain(value) for field, value in changes.items()}
    study.enqueue_trial({}, user_attrs=attributes)
  return study


def retry_failed(study: optuna.Study) -> int:
  """Enqueues the failed trials once more, in their folders; returns how many."""
  optuna = import_optuna()
  trials = study.get_trials(deepcopy=False)
  retried = {trial.user_attrs.get("retry_of") for trial in trials}
  failed = [
    trial
    for trial in trials
    if trial.state == optuna.trial.TrialState.FAIL and trial.number not in retried
  ]
  for trial in failed:
    attributes = {k: v for k, v in trial.user_attrs.items() if k in (CHANGES, FOLDER)}
    study.enqueue_trial(trial.params, user_attrs={**attributes, "retry_of": trial.number})
  return len(failed)


def join(plan: sweeps.Sweep | sweeps.Search, url: str, number: int = 0) -> optuna.Study:
  """Opens a study that another worker has made.

  Args:
    plan: the sweep; gives sampler and pruner.
    url: of the storage.
    number: of the trial that will be sampled. The sampler's seed depends on it and not on the
      worker, so that random trials are the same with any number of workers.

  Raises:
    UserError: if there is none.
  """
  optuna = import_optuna()
  try:
    return optuna.load_study(
      study_name=NAME,
      storage=open_storage(url),
      sampler=make_sampler(plan, number),
      pruner=make_pruner(plan.pruner),
    )
  except KeyError:
    raise UserError(
      f"{url} holds no sweep yet; start it with the same command without --worker."
    ) from None


def objectives_of(plan: sweeps.Sweep | sweeps.Search, metric: str) -> tuple[str, ...]:
  """The metric of the trials."""
  return (getattr(plan, "objectives", ()) or ()) or (metric,)


def make_sampler(plan: sweeps.Sweep | sweeps.Search, number: int) -> Any:
  """Optuna's sampler for a trial of a search."""
  samplers = import_optuna().samplers
  if isinstance(plan, sweeps.Sweep):
    return samplers.RandomSampler(seed=0)  # unused: a list's values are fixed
  seed = plan.seed * 100_003 + number
  if plan.sampler == "random":
    return samplers.RandomSampler(seed=seed)
  if plan.sampler == "tpe":
    # Running trials count as bad ones, so that workers do not all try the same place.
    return samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=8)
  if plan.sampler == "gp":
    return samplers.GPSampler(seed=seed)
  return samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, plan.trials // 4)))


def make_pruner(pruner: sweeps.Pruner) -> Any:
  """Optuna's pruner."""
  pruners = import_optuna().pruners
  if pruner.name == "median":
    return pruners.MedianPruner(
      n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.first_step
    )
  if pruner.name == "asha":
    return pruners.SuccessiveHalvingPruner(
      min_resource=pruner.first_step, reduction_factor=pruner.factor
    )
  if pruner.name == "hyperband":
    return pruners.HyperbandPruner(min_resource=pruner.first_step, reduction_factor=pruner.factor)
  return pruners.NopPruner()


def changes_of(plan: sweeps.Sweep | sweeps.Search, trial: optuna.Trial) -> dict[str, Any]:
  """The changes of a trial to the configuration; a search's values come from the sampler."""
  if isinstance(plan, sweeps.Sweep):
    return dict(plan.trials[int(trial.user_attrs[FOLDER])])
  changes: dict[str, Any] = {}
  for field, values in plan.space.items():
    if isinstance(values, sweeps.When):
      if changes.get(values.field) != values.equals:
        continue
      values = values.values  # noqa: PLW2901
    changes[field] = values.suggest(trial, field)
  return changes


def describe(plan: sweeps.Sweep | sweeps.Search, objectives: tuple[str, ...]) -> str:
  """A text that differs for plans whose trials cannot be mixed."""
  space: Any
  if isinstance(plan, sweeps.Sweep):
    space = [{field: _plain(value) for field, value in trial.items()} for trial in plan.trials]
  else:
    space = {"sampler": plan.sampler, **{field: repr(v) for field, v in plan.space.items()}}
  facts = [plan.config, space, repr(plan.pruner), list(objectives)]
  return json.dumps(facts, sort_keys=True)


def attach(url: str, number: int) -> StudyTrial:
  """The trial that a training reports to.

  Args:
    url: of the storage.
    number: of the trial in its study.

  Raises:
    UserError: if the storage has no such trial.
  """
  optuna = import_optuna()
  try:
    study = optuna.load_study(study_name=NAME, storage=open_storage(url))
    study.pruner = make_pruner(sweeps.Pruner(**study.user_attrs["pruner"]))
    frozen = study.get_trials(deepcopy=False)[number]
  except (KeyError, IndexError):
    raise UserError(f"--study={url} has no trial {number}.") from None
  metric = study.user_attrs["objectives"][0]
  return StudyTrial(optuna.trial.Trial(study, frozen._trial_id), metric)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
  """Holds a lock file; waits for it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _check(plan: sweeps.Sweep | sweeps.Search, objectives: tuple[str, ...]) -> None:
  names = {"pruner": (plan.pruner.name, _PRUNERS)}
  if isinstance(plan, sweeps.Search):
    names["sampler"] = (plan.sampler, _SAMPLERS)
    known: Mapping[str, Any] = plan.space
    fields = list(known)
    for index, (field, values) in enumerate(known.items()):
      if isinstance(values, sweeps.When) and values.field not in fields[:index]:
        raise UserError(
          f"the sweep's {field} depends on {values.field}, which must stand before it."
        )
    if len(objectives) > 1 and plan.pruner.name != "none":
      raise UserError("a sweep with several objectives cannot prune; leave its pruner out.")
  for what, (name, known_names) in names.items():
    if name not in known_names:
      raise UserError(
        f"the sweep's {what} is {name!r}; expected one of {', '.join(known_names)}."
        f"{suggestion(name, known_names)}"
      )
  if not plan.trials or (isinstance(plan, sweeps.Search) and not plan.space):
    raise UserError("the sweep has no trials.")


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value
