"""One training step: gradient, update, averages, and the report of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from effseg_jax.ops import backend
from effseg_jax.tasks import BATCH_SUMS, Task
from effseg_jax.training import sharding
from effseg_jax.training.state import TrainState, frozen_leaves, keep_frozen, state_shardings

Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class StepReport:
  """The measurements of one step, on the device until they are read.

  Attributes:
    scalars: float32 (), by name: `loss` and the scalars of the task.
    counts: the task's integer counts over the batch (for example a confusion matrix), or None.
    gradient_norms: float32 (number of parameters,), the norm of each parameter's gradient.
    finite: bool (), whether loss and gradient were finite. If not, the update was skipped.
  """

  scalars: Mapping[str, jax.Array]
  counts: Any
  gradient_norms: jax.Array
  finite: jax.Array


TrainStep = Callable[..., tuple[TrainState, StepReport]]


def make_train_step(
  model: nn.Module,
  task: Task,
  optimizer: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  average_decay: float = 0.0,
  freeze: Sequence[str] = (),
) -> TrainStep:
  """Builds the step as a pure function; `compile_train_step` compiles it for a mesh.

  A step whose loss or gradient is not finite counts, and changes nothing else: neither
  parameters nor statistics nor averages.

  Args:
    model: called as `model.apply(variables, *task.model_inputs(batch), train=True, ...)`.
    task: gives the inputs and the loss.
    optimizer: from `make_optimizer`.
    accumulate: number of parts of a batch, computed one after the other; the gradient is their
      mean, weighted by `task.loss_weight` where a task has one. Batch statistics are those of the
      parts.
    average_decay: of the exponential moving average, approached as `(1 + t) / (10 + t)`.
    freeze: patterns of names. Such parameters have no gradient (nothing is computed for it), and
      their statistics stay as they are.

  Returns:
    `step(state, batch, gather=...) -> (state, report)`; `gather` all-gathers parameters that are
    sharded over devices, see `sharding.gather_parameters`.
  """

  def loss_and_state(
    params: Any, model_state: Any, batch: Batch, rng: jax.Array, options: Mapping[str, Any]
  ):
    augment_rng, dropout_rng, drop_path_rng, loss_rng = jax.random.split(rng, 4)
    batch = task.augment(batch, augment_rng)
    outputs, new_model_state = model.apply(
      {"params": params, **model_state},
      *task.model_inputs(batch),
      train=True,
      rngs={
        "dropout": dropout_rng,
        "drop_path": drop_path_rng,
        "mask": jax.random.fold_in(drop_path_rng, 1),  # a split by 5 would change all the others
      },
      mutable=list(model_state),
      **options,
    )
    loss, scalars, counts = task.loss(outputs, batch, loss_rng)
    return loss, (new_model_state, {"loss": loss, **scalars}, counts)

  def gradient(state: TrainState, batch: Batch, rng: jax.Array, gather: Callable[[Any], Any]):
    options = task.model_options(state.step) if hasattr(task, "model_options") else {}
    value_and_grad = jax.value_and_grad(
      lambda params, *rest: loss_and_state(gather(_stopped(params, freeze)), *rest, options),
      has_aux=True,
    )
    if accumulate == 1:
      (_, aux), grads = value_and_grad(state.params, state.model_state, batch, rng)
      return grads, *aux
    return _accumulated(value_and_grad, task, state, batch, rng, parts=accumulate)

  def step(
    state: TrainState, batch: Batch, gather: Callable[[Any], Any] = lambda params: params
  ) -> tuple[TrainState, StepReport]:
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    grads, model_state, scalars, counts = gradient(state, batch, rng, gather)
    model_state = keep_frozen(model_state, state.model_state, freeze)

    norms = jnp.sqrt(jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]))
    finite = jnp.isfinite(scalars["loss"]) & jnp.all(jnp.isfinite(norms))

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(params=params, model_state=model_state, opt_state=opt_state)
    if average_decay:
      decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
      new = new.replace(
        average=jax.tree.map(
          lambda old, now: old * decay + now * (1.0 - decay), state.average, new.variables()
        )
      )
    new = jax.tree.map(lambda changed, kept: jnp.where(finite, changed, kept), new, state)
    new = new.replace(step=state.step + 1, skipped=state.skipped + jnp.where(finite, 0, 1))
    return new, StepReport(scalars, counts, norms, finite)

  return step


def compile_train_step(step: TrainStep, state: TrainState, mesh: Mesh) -> TrainStep:
  """Jits a step for the state's shardings; the state passed in is donated."""
  shardings = state_shardings(state)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
    if mesh.size == 1:
      return step(state, batch)
    gather = functools.partial(sharding.gather_parameters, shardings=shardings.params)
    with backend.several_devices(sharding.batch_sharding(mesh)):
      return step(state, batch, gather)

  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(shardings, sharding.batch_sharding(mesh)),
    out_shardings=(shardings, sharding.replicated(mesh)),
  )


def _stopped(params: Any, freeze: Sequence[str]) -> Any:
  """The parameters; no gradient flows into those that are frozen."""
  if not freeze:
    return params
  frozen = frozen_leaves(params, freeze)
  return jax.tree.map(lambda stays, x: jax.lax.stop_gradient(x) if stays else x, frozen, params)


def _accumulated(
  value_and_grad: Any, task: Task, state: TrainState, batch: Batch, rng: jax.Array, *, parts: int
):
  """The mean gradient over `parts` parts; their statistics follow one another.

  The parts are strided slices, so that each device keeps the examples it already has.
  """
  cut = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), dict(batch))

  weigh = getattr(task, "loss_weight", lambda part: jnp.float32(1.0))
  weights = jax.vmap(weigh, in_axes=1, axis_size=parts)(cut)
  weights = weights / jnp.maximum(jnp.sum(weights), 1e-6)

  def one(model_state: Any, index: jax.Array):
    part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), cut)
    (_, aux), grads = value_and_grad(
      state.params, model_state, part, jax.random.fold_in(rng, index)
    )
    model_state, scalars, counts = aux
    weight = weights[index]
    grads = jax.tree.map(lambda x: x * weight, grads)
    scalars = {name: x if name in BATCH_SUMS else x * weight for name, x in scalars.items()}
    return model_state, ((grads, scalars), counts)

  # A convolution inside a loop is 20x slower on the CPU: there the loop is unrolled.
  unroll = parts if backend.platform() == "cpu" else 1

  def body(carry: Any, index: jax.Array):
    model_state, total = carry
    model_state, new = one(model_state, index)
    return (model_state, jax.tree.map(jnp.add, total, new)), None

  _, shapes = jax.eval_shape(one, state.model_state, jnp.zeros((), jnp.int32))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (model_state, ((grads, scalars), counts)), _ = jax.lax.scan(
    body, (state.model_state, zeros), jnp.arange(parts), unroll=unroll
  )
  return grads, model_state, scalars, counts
