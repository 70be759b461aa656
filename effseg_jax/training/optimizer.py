"""AdamW and SGD with learning rates, decay and freezing chosen by parameter name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from effseg_jax.errors import UserError, require_one_of
from effseg_jax.training import trees


def make_optimizer(
  config: Mapping[str, Any],
  schedule: optax.Schedule,
  params: Any,
  group_schedules: Sequence[tuple[str, optax.Schedule]] = (),
) -> optax.GradientTransformation:
  """Builds the optimizer of a configuration.

  The order is PyTorch's: clip the gradient of all trained parameters together, precondition, add
  decoupled weight decay, scale by the learning rate. Frozen parameters take no part in any of it.

  Args:
    config: `name` (`adamw` or `sgd`); `b1`, `b2`, `eps` or `momentum`; `weight_decay`;
      `clip_norm` (0: none); and three lists of regular expressions over parameter names:
      `lr_rules` and `decay_rules`, `(pattern, factor)` of which the first match counts, and
      `freeze`, patterns of parameters that stay as they are. `layer_decay`, if it is there and not
      1, is the factor from each block of a plain ViT to the one before it; see `layer_factors`.
    schedule: step -> learning rate.
    params: the parameters, or their shapes.
    group_schedules: `(pattern, schedule)` of parameters with their own; the first match counts.

  Returns:
    An optax transformation. Frozen parameters have no optimizer state.
  """
  lr_rules, decay_rules, freeze = config["lr_rules"], config["decay_rules"], config["freeze"]
  names = trees.leaf_names(params)
  trees.check_patterns([pattern for pattern, _ in lr_rules], names, "optimizer.lr_rules")
  trees.check_patterns([pattern for pattern, _ in decay_rules], names, "optimizer.decay_rules")
  trees.check_patterns(freeze, names, "optimizer.freeze")
  trees.check_patterns([pattern for pattern, _ in group_schedules], names, "schedule.groups")

  chain = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
  chain.append(_preconditioner(config))
  if config["weight_decay"]:
    chain.append(_decay_by_name(config["weight_decay"], decay_rules))
  if lr_rules:
    chain.append(_scale_by_name(lr_rules))
  if config.get("layer_decay", 1.0) != 1.0:
    chain.append(_scale_by_name(layer_factors(names, config["layer_decay"])))
  if group_schedules:
    chain.append(_scale_by_schedules(schedule, group_schedules))
  else:
    chain.append(optax.scale_by_learning_rate(schedule))
  optimizer = optax.chain(*chain)
  if freeze:
    labels = trees.map_named(
      lambda name, _: "frozen" if is_frozen(freeze, name) else "trained", params
    )
    optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
  return optimizer


def layer_factors(names: Sequence[str], decay: float) -> list[tuple[str, float]]:
  """Layer-wise learning rates of a plain ViT in `backbone`, as rules.

  Block i of L has `decay^(L - 1 - i)`; what stands before the blocks (patches, positions, class and
  register tokens) has the factor of block 0, and everything else 1.

  Args:
    names: of all parameters.
    decay: factor from a block to the one before it.

  Raises:
    UserError: if there are no blocks.
  """
  blocks = [int(m[1]) for name in names if (m := re.match(r"backbone/block_(\d+)/", name))]
  if not blocks:
    raise UserError(
      f"optimizer.layer_decay is {decay:g}, and no parameter is in backbone/block_0, ...; set it"
      " to 1."
    )
  last = max(blocks)
  factors = [(rf"^backbone/block_{i}/", decay ** (last - i)) for i in range(last + 1)]
  return [*factors, (r"^backbone/(patch_embed/|pos_embed$|cls_token$|reg_token$)", decay**last)]


def is_frozen(freeze: Sequence[str], name: str) -> bool:
  """Whether one of the patterns is found in a parameter's name."""
  return trees.first_match([(pattern, True) for pattern in freeze], name, False)


def _preconditioner(config: Mapping[str, Any]) -> optax.GradientTransformation:
  name = config["name"]
  require_one_of("optimizer.name", name, ("adamw", "sgd"))
  if name == "adamw":
    return optax.scale_by_adam(b1=config["b1"], b2=config["b2"], eps=config["eps"])
  return optax.trace(decay=config["momentum"])


def _decay_by_name(
  decay: float, rules: Sequence[tuple[str, float]]
) -> optax.GradientTransformation:
  def update(updates: Any, state: optax.EmptyState, params: Any) -> tuple[Any, optax.EmptyState]:
    factors = trees.map_named(lambda name, _: decay * trees.first_match(rules, name, 1.0), params)
    return jax.tree.map(lambda u, f, p: u + f * p if f else u, updates, factors, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_name(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
  def update(updates: Any, state: optax.EmptyState, params: Any) -> tuple[Any, optax.EmptyState]:
    del params
    scaled = trees.map_named(lambda name, leaf: leaf * trees.first_match(rules, name, 1.0), updates)
    return scaled, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_schedules(
  schedule: optax.Schedule, groups: Sequence[tuple[str, optax.Schedule]]
) -> optax.GradientTransformation:
  """`optax.scale_by_learning_rate` with a schedule for each group of parameters."""

  def update(updates: Any, state: optax.ScaleByScheduleState, params: Any) -> tuple[Any, Any]:
    del params
    default = schedule(state.count)
    rates = [(pattern, own(state.count)) for pattern, own in groups]
    scaled = trees.map_named(
      lambda name, u: u * -jnp.asarray(trees.first_match(rates, name, default), u.dtype), updates
    )
    return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

  return optax.GradientTransformation(
    lambda params: optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), update
  )
