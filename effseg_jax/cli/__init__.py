"""The command line: `effseg COMMAND --flag=value ...`.

Every command is a module of this package with three names: a docstring whose first line says what
it does, `define_flags(values)`, which declares its flags, and `run(values, arguments)`, which does
the work and may return an exit status. Parsing and failing are the same for all of them and stand
here: a mistake ends in one line and exit status 2, Ctrl-C in status 130.

`--config` takes the name of an experiment that comes with the package (`afformer/camvid:tiny`), its
path in a checkout (`configs/afformer/camvid.py:tiny`) or a file of the user's own; fields are
overridden with `--config.train.batch_size=16`. Of a field that is given twice, the last counts.
"""

from __future__ import annotations

import importlib
import keyword
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from effseg_jax.errors import DataWarning, UserError, friendly_exit, suggestion
from effseg_jax.run.memory import memory_errors

_format_warning = warnings.formatwarning

# Purpose -> command -> summary. Each command is a module of this package.
COMMANDS = {
  "Train and evaluate": {
    "train": "train a model, or resume its training",
    "eval": "evaluate a checkpoint on a split of a data set",
    "sweep": "run an experiment with many settings and compare the results",
    "folds": "compare settings by the mean of their folds",
    "plot_curves": "draw the loss and the metrics of runs",
  },
  "Use a model": {
    "predict": "segment pictures and clips",
    "models": "list the models with parameters and multiply-accumulates",
    "convert": "convert official weights to a bundle, and back",
    "export": "export a model to ONNX, OpenVINO or StableHLO",
    "export_bundle": "make one file with weights and card of a run's checkpoint",
  },
  "Data": {
    "inspect": "look at a data set before training: classes, sizes, what is wrong",
    "import": "make a data set of what annotation tools export",
    "browse": "draw a sheet of training examples",
    "prepare": "pack a data set into a few large files",
    "prepare_avsbench": "extract AVSBench's frames and sounds from its videos",
    "embed_audio": "store the VGGish embeddings of a data set's sounds",
    "write_clip": "write one of the embedded clips as a video with sound",
  },
  "Plan and understand": {
    "compile_for": "compile a training step for TPUs that are not here and report its cost",
    "plot_attention": "draw the cross-attention of an audio-visual decoder",
  },
}


class Flags(flags.FlagValues):
  """The flags of one call of a command; not absl's global ones, so that many calls can share a
  process."""

  def __init__(self, words: Sequence[str], experiment: str | None = None):
    """Keeps what `--config` declares its flags from.

    Args:
      words: that will be parsed; a flag is declared for each field among them.
      experiment: the value of `--config`.
    """
    super().__init__()
    # Not through __setattr__, which sets flags.
    self.__dict__.update(words=list(words), experiment=experiment)


class Command(Protocol):
  """What a module of this package provides."""

  __doc__: str | None

  def define_flags(self, values: Flags) -> None:
    """Declares the flags of the command."""

  def run(self, values: Flags, arguments: Sequence[str]) -> int | None:
    """Runs the command; None is exit status 0.

    Raises:
      UserError: for a mistake of the user's.
    """


def main(argv: Sequence[str] | None = None) -> None:
  """Runs `effseg COMMAND ...` and exits with its status.

  Args:
    argv: the words after `effseg`; None: those of the process.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  if not words or words[0] in ("-h", "--help", "help"):
    print(overview())
    sys.exit(0)
  if words[0] == "--version":
    from effseg_jax import __version__

    print(f"effseg_jax {__version__}")
    sys.exit(0)
  name = words[0].replace("-", "_")
  with friendly_exit():
    known = [command for group in COMMANDS.values() for command in group]
    if name not in known:
      raise UserError(
        f"there is no command {words[0]!r}; effseg --help lists them.{suggestion(name, known)}"
      )
  execute(name, words[1:])


def execute(name: str, argv: Sequence[str] | None = None) -> None:
  """Parses the flags of a command, runs it, and exits with its status.

  Args:
    name: of the module.
    argv: the words after the command; None: those of the process (for `train.py` and similar
      scripts).
  """
  module = f"{name}_" if keyword.iskeyword(name) else name  # `effseg import`
  execute_module(importlib.import_module(f"effseg_jax.cli.{module}"), f"effseg {name}", argv)


def execute_module(command: Any, usage: str, argv: Sequence[str] | None = None) -> None:
  """Parses the flags of a module that is a `Command`, runs it, and exits with its status.

  Args:
    command: the module.
    usage: how it is started, for its help.
    argv: as for `execute`.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  with friendly_exit():
    if any(word in ("-h", "--help", "--helpfull", "--helpshort") for word in words):
      print(command_help(usage, command, _take_experiment(words)[0]))
      sys.exit(0)

    if sys.platform == "win32":
      raise UserError(
        "Windows is not supported: packages that load data do not exist for it. Use WSL2 (wsl"
        " --install), and install effseg_jax there as on Linux."
      )
    # Below this level are messages of orbax and jax about their internals.
    logging.set_verbosity(logging.ERROR)
    warnings.formatwarning = _one_line
    values, arguments = parse(command, words)
    with memory_errors():
      status = command.run(values, arguments)
  sys.exit(status or 0)


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
  """A warning as a line for the user; where in the code it arose matters to others alone."""
  if issubclass(category, DataWarning):
    return f"warning: {message}\n"
  return _format_warning(message, category, *place, **more)


def parse(command: Command, words: Sequence[str]) -> tuple[Flags, list[str]]:
  """Parses the flags of a command.

  Returns:
    The values, by flag, and the words that are no flags.

  Raises:
    UserError: for an unknown flag, a value that cannot be read, or an unknown field of `--config`.
  """
  experiment, words = _take_experiment(words)
  words = _last_of_each_field(words)
  values = Flags(words, experiment)
  try:
    command.define_flags(values)
    if "config" not in values and experiment is not None:
      words = [f"--config={experiment}", *words]
    # `sweep` passes fields of a configuration on to its trials.
    arguments = values(["effseg", *words], known_only="sweep" in values)[1:]
    if "config" in values and isinstance(values.config, ConfigDict):
      _split_words(values.config, words)
  except UserError:
    raise
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    cause: BaseException = error
    while cause.args and isinstance(cause.args[0], BaseException):
      cause = cause.args[0]
    text = str(cause.args[0] if len(cause.args) == 1 else cause)
    message = " ".join(line.strip() for line in text.splitlines())
    raise UserError(f"{message} (see --help)") from None
  return values, arguments


def define_config(values: Flags) -> None:
  """Declares `--config`, with the experiment as its value, and a flag for each field in the words.

  Raises:
    UserError: if there is no such experiment.
  """
  about = "The experiment: a name such as afformer/camvid:tiny, or a file with get_config()."
  if values.experiment is None:
    flags.DEFINE_string("config", None, about, flag_values=values)
    return
  from effseg_jax import configs
  from effseg_jax.configs import defaults

  config = configs.load(values.experiment)
  # Choices come first: each brings the fields that can be set.
  for section in defaults.CHOICES:
    prefix = f"--config.{section}.name="
    chosen = [word.removeprefix(prefix) for word in values.words if word.startswith(prefix)]
    if chosen and "name" in config.get(section, ()):
      config[section].name = chosen[-1]
  defaults.complete(config)
  _check_fields(config, values.words)
  config_flags.DEFINE_config_dict(
    "config",
    config,
    about,
    flag_values=values,
    sys_argv=["effseg", *values.words],
  )


def no_arguments(arguments: Sequence[str]) -> None:
  """Raises `UserError` for a word that is no flag."""
  if arguments:
    raise UserError(f"unexpected argument {arguments[0]!r}; flags are written --name=value.")


def overview() -> str:
  """The text of `effseg --help`."""
  lines = ["usage: effseg COMMAND [--flag=value ...]", ""]
  for title, names in COMMANDS.items():
    lines.append(f"{title}:")
    lines += [f"  {name:<18}{summary}" for name, summary in names.items()]
    lines.append("")
  lines.append("effseg COMMAND --help describes a command and its flags.")
  return "\n".join(lines)


def command_help(usage: str, command: Command, experiment: str | None = None) -> str:
  """The text of `--help` of a command; with an experiment, its description and fields.

  Raises:
    UserError: if there is no such experiment.
  """
  values = Flags([])
  command.define_flags(values)
  if "config" in values and experiment:
    return _experiment_help(usage, experiment)
  lines = [f"usage: {usage} [--flag=value ...]", "", (command.__doc__ or "").strip(), ""]
  lines.append("flags:")
  for flag in sorted(values):
    default = values[flag].default
    shown = "" if default in (None, "", False) else f" (default: {default})"
    lines.append(f"  --{flag:<20} {' '.join((values[flag].help or '').split())}{shown}")
  if "config" in values:
    from effseg_jax import configs

    lines += ["", f"experiments ({usage} --config=NAME --help describes one):"]
    lines += [f"  {name}" for name in configs.names()]
  return "\n".join(lines)


def _experiment_help(usage: str, experiment: str) -> str:
  """The description of an experiment, its fields and their values."""
  from flax.traverse_util import flatten_dict

  from effseg_jax import configs

  fields = flatten_dict(configs.load(experiment).to_dict(), sep=".")
  lines = [f"usage: {usage} --config={configs.label(experiment)} [--flag=value ...]", ""]
  lines += [configs.about(experiment), "", "fields:"]
  lines += [f"  --config.{name}={value}" for name, value in sorted(fields.items())]
  return "\n".join(lines)


def _take_experiment(words: Sequence[str]) -> tuple[str | None, list[str]]:
  """The value of `--config`, of which the last counts, and the other words."""
  experiment, others, rest = None, [], iter(words)
  for word in rest:
    match = re.fullmatch(r"--?config=(.*)", word, re.DOTALL)
    if match or word in ("--config", "-config"):
      experiment = match[1] if match else next(rest, "")
    else:
      others.append(word)
  return experiment, others


def _last_of_each_field(words: Sequence[str]) -> list[str]:
  """Writes fields as `--config.FIELD=VALUE`, and drops all but the last of each.

  ml_collections would join the values of a tuple that is given twice.
  """
  found: dict[str, str] = {}
  rest = list(words)
  while rest:
    word = rest.pop(0)
    match = re.fullmatch(r"--?(config\.[\w.]+)(=.*)?", word, re.DOTALL)
    if match is None:
      found[f"{len(found)} {word}"] = word  # as often as it is there
      continue
    value = match[2]
    if value is None and rest and not rest[0].startswith("--"):
      value = f"={rest.pop(0)}"
    found.pop(match[1], None)
    found[match[1]] = f"--{match[1]}{value or ''}"
  return list(found.values())


def _check_fields(config: ConfigDict, words: Sequence[str]) -> None:
  """Raises `UserError` for a field that the experiment does not have."""
  for word in words:
    match = re.fullmatch(r"--config\.([\w.]+)(=.*)?", word, re.DOTALL)
    section: Any = config
    for number, name in enumerate(match[1].split(".") if match else ()):
      if not isinstance(section, ConfigDict) or name not in section:
        path = match[1].split(".")
        where = ".".join(path[:number]) or "the configuration"
        known = list(section) if isinstance(section, ConfigDict) else []
        fields = f"; its fields: {', '.join(known)}" if known else ""
        raise UserError(
          f"--config.{match[1]}: {where} has no field {name!r}{fields}.{suggestion(name, known)}"
        )
      section = section[name]


def _split_words(config: Any, words: Sequence[str]) -> None:
  """Makes ("a", "b") of `--config.field=a,b`, which ml_collections takes for one word."""
  for word in words:
    match = re.fullmatch(r"--?config\.([\w.]+)=(\w+(?:,\w+)+)", word)
    if match is None:
      continue
    *path, field = match[1].split(".")
    owner = config
    for name in path:
      owner = owner[name]
    if owner[field] == (match[2],):
      owner[field] = tuple(match[2].split(","))
