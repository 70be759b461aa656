"""Everything that training changes, in one tree."""

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
from effseg_jax.training import sharding, trees

Variables = Mapping[str, Any]


@flax.struct.dataclass
class TrainState:
  """The state between two training steps.

  Attributes:
    step: int32 (), optimizer steps taken, skipped ones included.
    params: the trained parameters, float32.
    model_state: the model's other collections (`batch_stats`).
    opt_state: of the optax transformation.
    average: exponential moving average of params and model_state as a variables dictionary, or an
      empty dictionary where no average is kept.
    rng: uint32 (2,), key data of the threefry key from which each step derives its own.
    skipped: int32 (), steps whose gradient was not finite and changed nothing but the counters.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  average: Any
  rng: jax.Array
  skipped: jax.Array

  def variables(self) -> Variables:
    """The trained variables, as `model.apply` takes them."""
    return {"params": self.params, **self.model_state}

  def eval_variables(self) -> Variables:
    """The averaged variables where an average is kept, otherwise the trained ones."""
    return self.average or self.variables()


def model_shapes(model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct]) -> Variables:
  """Returns the variables' shapes for these inputs, without computing anything."""
  return jax.eval_shape(
    lambda *arrays: model.init(jax.random.key(0), *arrays, train=False), *inputs
  )


def init_state(
  model: nn.Module,
  inputs: Sequence[jax.ShapeDtypeStruct],
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  keep_average: bool,
  rules: Sequence[sharding.Rule],
  mesh: Mesh,
) -> TrainState:
  """Makes the state of step 0; each array is born on the devices that will hold it.

  Args:
    model: called as `model(*inputs, train=False)`.
    inputs: shapes and dtypes of the model's inputs, of any batch size.
    optimizer: from `make_optimizer`.
    seed: of the parameters and of everything random in training.
    keep_average: whether an exponential moving average is kept.
    rules: placement by name, see `sharding.tree_shardings`.
    mesh: from `sharding.make_mesh`.

  Returns:
    The state, sharded by the rules over the mesh.
  """
  init = functools.partial(_initial, model, inputs, optimizer, seed, keep_average)
  shardings = _shardings(jax.eval_shape(init), rules, mesh)
  # It runs once, and optimising a hundred random draws would take longer than all of training's
  # first minute: on the CPU compilation falls from 26 to 9 seconds.
  options = {"xla_backend_optimization_level": 0} if backend.platform() == "cpu" else None
  return jax.jit(init, out_shardings=shardings, compiler_options=options)()


def abstract_state(
  model: nn.Module,
  inputs: Sequence[jax.ShapeDtypeStruct],
  optimizer: optax.GradientTransformation,
  *,
  keep_average: bool,
  rules: Sequence[sharding.Rule],
  mesh: Mesh,
) -> TrainState:
  """`init_state` as shapes, dtypes and shardings alone, for a mesh of devices that may not be here.

  Args:
    model: see `init_state`, like all others.
    inputs: of the model.
    optimizer: from `make_optimizer`.
    keep_average: whether an exponential moving average is kept.
    rules: placement by name.
    mesh: from `sharding.make_mesh`.
  """
  init = functools.partial(_initial, model, inputs, optimizer, 0, keep_average)
  shapes = jax.eval_shape(init)
  shardings = _shardings(shapes, rules, mesh)
  return jax.tree.map(
    lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
    shapes,
    shardings,
  )


def _shardings(state: TrainState, rules: Sequence[sharding.Rule], mesh: Mesh) -> Any:
  """The shardings of a state of shapes, by the names that all rules of a configuration use.

  Raises:
    UserError: for a rule that matches nothing.
  """
  known = set(trees.leaf_names(state.params))
  known |= {trees.without_collection(name) for name in trees.leaf_names(state.model_state)}
  trees.check_patterns([pattern for pattern, _ in rules], sorted(known), "mesh.rules")
  return sharding.tree_shardings(state, rules, mesh, known)


def _initial(
  model: nn.Module,
  inputs: Sequence[jax.ShapeDtypeStruct],
  optimizer: optax.GradientTransformation,
  seed: int,
  keep_average: bool,
) -> TrainState:
  init_rng, train_rng = jax.random.split(jax.random.key(seed))
  inits = [jnp.zeros((1, *array.shape[1:]), array.dtype) for array in inputs]
  variables = model.init(init_rng, *inits, train=False)
  model_state = {key: value for key, value in variables.items() if key != "params"}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    model_state=model_state,
    opt_state=optimizer.init(variables["params"]),
    average=jax.tree.map(jnp.copy, dict(variables)) if keep_average else {},
    rng=jax.random.key_data(train_rng),
    skipped=jnp.zeros((), jnp.int32),
  )


def replace_variables(state: TrainState, variables: Variables) -> TrainState:
  """Puts other variables (host or device arrays of the same tree) in the state's place for them."""

  def place(new: Any, old: jax.Array) -> jax.Array:
    return jax.device_put(jnp.asarray(new, old.dtype), old.sharding)

  params = jax.tree.map(place, variables["params"], state.params)
  model_state = {
    key: jax.tree.map(place, variables[key], value) for key, value in state.model_state.items()
  }
  average = state.average
  if average:
    average = jax.tree.map(
      lambda new, old: jax.device_put(jnp.copy(new), old.sharding),
      {"params": params, **model_state},
      dict(average),
    )
  return state.replace(params=params, model_state=model_state, average=average)


def state_shardings(state: TrainState) -> Any:
  """The shardings that the state's arrays have."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def parameter_count(params: Any) -> int:
  """The number of trained scalars."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def keep_frozen(new: Any, old: Any, freeze: Sequence[str]) -> Any:
  """Returns the new statistics, but the old ones where a pattern of `freeze` is found.

  Args:
    new: collections of statistics, `{"batch_stats": ...}`.
    old: the same tree.
    freeze: patterns of names as parameters have them, `^backbone/`: without the collection.
  """
  if not freeze:
    return new
  frozen = frozen_leaves(new, freeze, trees.without_collection)
  return jax.tree.map(lambda stays, a, b: b if stays else a, frozen, new, old)


def frozen_leaves(
  tree: Any, freeze: Sequence[str], rename: Callable[[str], str] = lambda name: name
) -> Any:
  """A tree of booleans: whether a pattern of `freeze` is found in a leaf's name."""
  rules = [(pattern, True) for pattern in freeze]
  return trees.map_named(lambda name, _: trees.first_match(rules, rename(name), False), tree)
