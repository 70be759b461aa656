"""Stands for `effseg train` in the tests of sweeps: logs a curve at once, and reports to the study.

The metric grows to `sqrt(learning rate)` over 8 evaluations. A rate above 0.5 fails until the file
`repaired` is in the workdir; TRAINER_SECONDS is how long it takes.
"""

import json
import os
import pathlib
import sys
import time


def main(flags):
  """Trains; returns the exit status."""
  from effseg_jax.sweep import study

  words = dict(word.removeprefix("--").split("=", 1) for word in flags)
  rate = float(words["config.optimizer.learning_rate"])
  workdir = pathlib.Path(words["workdir"])
  with (workdir / "calls").open("a") as calls:
    calls.write("called\n")
  if rate > 0.5 and not (workdir / "repaired").exists():
    (workdir / "train.log").write_text("error: step 3: the loss is nan\n")
    return 1
  time.sleep(float(os.environ.get("TRAINER_SECONDS", "0")))
  trial = study.attach(words["study"], int(words["trial"]))
  with (workdir / "metrics.jsonl").open("w") as log:
    for step in range(1, 9):
      value = rate**0.5 * step / 8
      log.write(json.dumps({"step": step, "eval/mIoU": value, "train/speed": 1 / rate}) + "\n")
      if trial.report(step, {"mIoU": value}):
        break
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[2:]))
