"""`train.py` with a network of three layers in the model's place, which compiles in a second.

`python tests/tiny_run.py --config=tests/small_config.py --workdir=...`; everything else is the real
thing, so that tests can start several processes of it. With TERMINATE_AT=N in the environment, the
last process sends itself SIGTERM in step N.
"""

from __future__ import annotations

import os
import signal

import flax.linen as nn
import jax

from effseg_jax import cli, experiment
from effseg_jax.run import finite

_check_finite = finite.check_finite


class Net(nn.Module):
  """A strided convolution with batch statistics, and a head."""

  num_classes: int = 3

  @nn.compact
  def __call__(self, images, train=False):
    """Logits at an eighth of the size."""
    x = nn.Conv(16, (8, 8), strides=8, name="conv")(images)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
    x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
    return nn.Conv(self.num_classes, (1, 1), name="head")(x)


def use_net(terminate_at: int = 0) -> None:
  """Puts it in the model's place, and perhaps a signal into a step."""

  def check(previous, *others):
    if previous and previous[0] == terminate_at and jax.process_index() == jax.process_count() - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    _check_finite(previous, *others)

  experiment.make_model = lambda config, num_classes: Net(num_classes)
  finite.check_finite = check


if __name__ == "__main__":
  use_net(int(os.environ.get("TERMINATE_AT", "0")))
  cli.execute("train")
