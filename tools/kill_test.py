r"""Kills a training run again and again, and compares it with one that was left alone.

  python tools/kill_test.py --kills=20 --output=runs/kill_test

Two runs of the same configuration: one goes through; the other is killed (SIGKILL) at random
moments and started again until it has got there, too. Moments are of three kinds, in turns: at a
random step, while a checkpoint is being written, and while the process starts. At the end every
array of the last checkpoint (parameters, optimizer, average, statistics, rng) and every logged
number of every step must be the same, bit for bit. Arguments after `--` are passed on to train.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from effseg_jax.errors import UserError, friendly_exit
from effseg_jax.run.saved_model import read_state

ROOT = Path(__file__).resolve().parents[1]

# Numbers that do not depend on the computation alone.
_TIMES = ("seconds", "images_per", "flops", "utilisation", "memory")
_POLL = 0.005  # seconds between two looks


def read_log(workdir: Path) -> dict[tuple[int, str], float]:
  """(step, name) -> number, the last word on each; times are left out."""
  found = {}
  path = workdir / "metrics.jsonl"
  for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
    try:
      record = json.loads(line)
    except ValueError:  # the kill came while it was written
      continue
    step = record.pop("step")
    for name, value in record.items():
      if not any(word in name for word in _TIMES):
        found[step, name] = value
  return found


def reached(workdir: Path) -> int:
  """The last step logged."""
  return max((step for step, _ in read_log(workdir)), default=0)


def saved(workdir: Path) -> int:
  """The step of the latest finished checkpoint."""
  steps = [path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  return max(map(int, steps), default=0)


def moment(kind: int, workdir: Path, rng: random.Random) -> tuple[str, Callable[[], bool]]:
  """When the next kill comes: a name, and a question to ask until the answer is yes."""
  if kind == 1:
    folder, begin = workdir / "checkpoints", saved(workdir)
    later = rng.randint(0, 3)  # not always the first one
    return "while saving", lambda: saved(workdir) >= begin + later and any(folder.glob("*tmp*"))
  if kind == 2:
    end = time.monotonic() + rng.uniform(0.5, 12.0)
    return "while starting", lambda: time.monotonic() >= end
  goal = reached(workdir) + rng.randint(1, 12)
  delay = rng.uniform(0, 0.1)

  def at_step() -> bool:
    if reached(workdir) < goal:
      return False
    time.sleep(delay)
    return True

  return f"after step {goal}", at_step


def interrupted_run(command: Sequence[str], workdir: Path, kills: int, rng: random.Random) -> int:
  """Starts and kills a run, then lets it finish.

  Returns:
    How many times it was killed.
  """
  done = 0
  while True:
    begin = saved(workdir)
    name, now = moment(done % 3, workdir, rng) if done < kills else ("not", lambda: False)
    with (workdir.parent / "interrupted.log").open("a") as log:
      process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
      while process.poll() is None and not now():
        time.sleep(_POLL)
      if process.poll() is None:
        process.kill()
        process.wait()
        done += 1
        print(
          f"kill {done}: {name}; from checkpoint {begin}, reached step {reached(workdir)}, saved"
          f" {saved(workdir)}",
          flush=True,
        )
        continue
    if process.returncode:
      raise UserError(f"the run ended with status {process.returncode}; see {log.name}.")
    return done


def differences(one: Path, other: Path) -> list[str]:
  """The differences between two finished runs."""
  found = []
  first, second = read_log(one), read_log(other)
  for key in sorted(set(first) | set(second)):
    if first.get(key) != second.get(key):
      found.append(f"step {key[0]} {key[1]}: {first.get(key)} and {second.get(key)}")
  step = saved(one)
  if step != saved(other):
    return [*found, f"the last checkpoints are of step {step} and {saved(other)}"]
  trees = [_flat(read_state(run / "checkpoints" / str(step) / "state")) for run in (one, other)]
  for name in sorted(set(trees[0]) | set(trees[1])):
    a, b = (tree.get(name) for tree in trees)
    if a is None or b is None or a.tobytes() != b.tobytes():
      found.append(f"{name} differs")
  print(f"compared {len(first)} logged numbers and {len(trees[0])} arrays of step {step}")
  return found


def _flat(tree: object, name: str = "") -> dict[str, np.ndarray]:
  """Leaves by their path."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  found = {}
  for key, value in items:
    path = f"{name}/{key}"
    if isinstance(value, dict | list | tuple):
      found.update(_flat(value, path))
    elif value is not None:
      found[path] = np.asarray(value)
  return found


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the test; exit status 1 if something differs."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--kills", type=int, default=20, help="how often the run is killed")
  parser.add_argument("--steps", type=int, default=200, help="length of the run")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--script", default="train.py", help="what is run")
  parser.add_argument("--config", default="tests/small_config.py", help="the experiment")
  parser.add_argument("--output", default="runs/kill_test", help="folder of both runs; is emptied")
  parser.add_argument("rest", nargs="*", help="more flags for the script, after --")
  args = parser.parse_args(argv)
  with friendly_exit():
    output = Path(args.output).absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = [
      *(sys.executable, args.script, f"--config={args.config}"),
      *(f"--config.train.num_steps={args.steps}", f"--config.eval.every={args.steps // 4}"),
      *("--config.checkpoint.every=2", "--config.log.every=1"),
      *args.rest,
    ]
    whole, killed = output / "whole", output / "killed"
    with (output / "whole.log").open("w") as log:
      status = subprocess.run(
        [*command, f"--workdir={whole}"],
        cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False,
      ).returncode  # fmt: skip
    if status:
      raise UserError(f"the uninterrupted run ended with status {status}; see {log.name}.")
    print(f"uninterrupted: {args.steps} steps", flush=True)
    count = interrupted_run(
      [*command, f"--workdir={killed}"], killed, args.kills, random.Random(args.seed)
    )
    wrong = differences(whole, killed)
    if wrong:
      print("\n".join(wrong[:20]))
      sys.exit(1)
    print(f"{count} kills, and not a bit differs")


if __name__ == "__main__":
  main()
