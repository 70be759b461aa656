"""Learning-rate schedules: functions of the 0-based step, as the recipes define them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from effseg_jax.errors import UserError, require_one_of, suggestion


def poly(base: float, num_steps: int, power: float = 1.0, end: float = 0.0) -> optax.Schedule:
  """`(base - end) (1 - i / num_steps)^power + end`, the schedule of MMSegmentation's recipes.

  optax's own forms the difference last, which costs the rates of the last steps their digits: a
  percent at step 159,999 of 160,000.
  """
  return lambda i: (base - end) * (jnp.maximum(num_steps - i, 0) / num_steps) ** power + end


def delayed_poly(
  base: float,
  num_steps: int,
  *,
  ramp: int,
  delay: int = 0,
  power: float = 1.0,
  end: float = 0.0,
) -> optax.Schedule:
  """Nothing for `delay` steps, up to `base` within `ramp` steps, and then down as `poly`.

  The warm-up of EoMT, whose backbone begins when its new layers have warmed up. The decay reaches
  `end` at `num_steps`, counting from the end of the ramp.
  """
  begin = delay + ramp

  def schedule(i: Any) -> Any:
    rising = base * jnp.maximum(i - delay, 0) / max(ramp, 1)
    return jnp.where(i < begin, rising, poly(base, num_steps - begin, power, end)(i - begin))

  return schedule


def cosine(base: float, num_steps: int, end: float = 0.0) -> optax.Schedule:
  """Half a cosine from `base` down to `end` (Loshchilov and Hutter 2017, equation 5)."""
  return optax.cosine_decay_schedule(base, num_steps, alpha=end / base if base else 0.0)


def step(
  base: float, num_steps: int, milestones: Sequence[float], factor: float = 0.1
) -> optax.Schedule:
  """`base`, multiplied by `factor` from each milestone on: a step, or below 1 a share of them."""
  steps = [round(mark * num_steps) if mark < 1 else int(mark) for mark in milestones]
  return optax.piecewise_constant_schedule(
    base, {mark: factor ** steps.count(mark) for mark in steps}
  )


def constant(base: float, num_steps: int) -> optax.Schedule:
  """`base` at every step."""
  del num_steps
  return optax.constant_schedule(base)


def with_warmup(schedule: optax.Schedule, steps: int, ratio: float) -> optax.Schedule:
  """Scales the first `steps` steps of a schedule, linearly from `ratio` up to 1.

  The warm-up multiplies the already decaying rate:
  `lr(i) = schedule(i) * (1 - (1 - i / steps) (1 - ratio))` for `i < steps`.
  """
  if steps == 0:
    return schedule
  # The same, without the cancellation that would cost the first steps their digits.
  return lambda i: schedule(i) * (ratio + jnp.minimum(i / steps, 1.0) * (1.0 - ratio))


def make_schedule(config: Mapping[str, Any], base: float, num_steps: int) -> optax.Schedule:
  """Builds the schedule of a configuration.

  Args:
    config: `name` (`poly`, `delayed_poly`, `cosine`, `step` or `constant`) with that function's
      other arguments, `warmup_steps` and `warmup_ratio`; `groups` is not looked at.
    base: learning rate without warm-up and decay.
    num_steps: length of the training in optimizer steps.

  Returns:
    A function from the 0-based step to the learning rate.
  """
  options = dict(config)
  name = options.pop("name")
  options.pop("groups", None)
  warmup = options.pop("warmup_steps"), options.pop("warmup_ratio")
  kinds = {
    "poly": poly,
    "delayed_poly": delayed_poly,
    "cosine": cosine,
    "step": step,
    "constant": constant,
  }
  require_one_of("schedule.name", name, kinds)
  return with_warmup(kinds[name](base, num_steps, **options), *warmup)


def make_group_schedules(
  config: Mapping[str, Any], base: float, num_steps: int
) -> list[tuple[str, optax.Schedule]]:
  """Builds the schedules of parameters that have one of their own.

  Args:
    config: of `make_schedule`. `groups` are pairs of a regular expression over parameter names, and
      of what is different for them: a mapping of the schedule's arguments, and `factor` of `base`.
    base: learning rate of all other parameters.
    num_steps: length of the training in optimizer steps.

  Returns:
    `(pattern, schedule)`, of which the first match counts.

  Raises:
    UserError: for a group of another form.
  """
  found = []
  for group in config.get("groups", ()):
    if len(group) != 2 or not isinstance(group[1], Mapping):
      raise UserError(
        f"schedule.groups: {group!r} has another form; expected (pattern, {{argument: value}})."
      )
    pattern, changes = group
    changes = dict(changes)
    factor = changes.pop("factor", 1.0)
    known = [key for key in config if key not in ("name", "groups")]
    for key in changes:
      if key not in known:
        raise UserError(
          f"schedule.groups: {pattern!r} has {key!r}; expected factor or one of"
          f" {', '.join(known)}.{suggestion(key, known)}"
        )
    found.append((pattern, make_schedule({**config, **changes}, base * factor, num_steps)))
  return found
