"""The mesh, and which part of each array lives on which device of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effseg_jax.errors import UserError
from effseg_jax.training import trees

AXES = ("data", "fsdp", "model")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

# A rule's value: "replicate", "fsdp" (shard the largest divisible dimension), or one entry per
# dimension, each the name of a mesh axis or None.
Rule = tuple[str, str | tuple[str | None, ...]]

# Cutting an array smaller than this saves less memory than its extra message costs.
_MIN_SHARDED_SIZE = 2**10


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Lays the devices out as a (data, fsdp, model) mesh.

  Several TPU slices, which only the network of the data centre connects, divide the `data` axis:
  gradients alone cross it.

  Args:
    axes: devices along `data`, `fsdp` and `model`; one of them may be -1, "all that are left".
    devices: default all devices of all processes.

  Returns:
    A mesh with automatic axes: the compiler derives shardings without annotation.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  sizes = [axes[axis] for axis in AXES]
  asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
    raise UserError(f"mesh {asked}: sizes are positive, and at most one is -1.")
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count:
    raise UserError(f"mesh {asked} does not multiply to the {count} devices that are here.")
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  kinds = (AxisType.Auto,) * len(AXES)
  if slices == 1 or devices[0].platform != "tpu":
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)
  if sizes[0] % slices:
    raise UserError(f"mesh {asked} on {slices} slices: data must be a multiple of {slices}.")
  inside = (sizes[0] // slices, *sizes[1:])
  grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
  return Mesh(grid, AXES, axis_types=kinds)


def tree_shardings(
  tree: Any, rules: Sequence[Rule], mesh: Mesh, known: Collection[str] = ()
) -> Any:
  """Gives every leaf the sharding of the first rule whose pattern is found in its name.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    rules: `(pattern, placement)`, see `Rule`; parameters without a matching rule are replicated.
    mesh: from `make_mesh`.
    known: names of parameters. A leaf whose name ends with one of them (an optimizer moment, an
      averaged weight) goes by that name, so that one rule shards all of them alike.

  Returns:
    A tree of `NamedSharding`.
  """

  def place(name: str, leaf: Any) -> NamedSharding:
    name = trees.own_name(name, known)
    placement = trees.first_match(rules, name, "replicate")
    return NamedSharding(mesh, _spec(name, tuple(leaf.shape), placement, mesh))

  return trees.map_named(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis is sharded over the `data` and `fsdp` axes together."""
  return NamedSharding(mesh, BATCH_SPEC)


def batch_ways(mesh: Mesh) -> int:
  """Number of shards of a batch; a global batch size is a multiple of it."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: Mesh, setting: str, accumulate: int = 1) -> None:
  """Raises `UserError` unless the global batch divides evenly over the mesh and processes.

  Args:
    batch_size: of all devices together.
    mesh: from `make_mesh`.
    setting: the field it comes from, for the message.
    accumulate: parts of a batch, one after the other; each of them has to divide evenly.
  """
  ways = math.lcm(batch_ways(mesh), jax.process_count())
  if batch_size >= 1 and batch_size % (ways * accumulate) == 0:
    return
  parts = f" times train.accumulate={accumulate}" if accumulate > 1 else ""
  raise UserError(
    f"{setting} is {batch_size}; expected a multiple of {ways * accumulate}:"
    f" data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices{parts}."
  )


def process_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
  """Which rows of a global batch this process puts on its devices, ascending.

  Raises:
    UserError: if other processes need the same rows, which happens where the model axis is longer
      than the devices of a process.
  """
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = {row for (span,) in indices for row in range(*span.indices(batch_size))}
  if len(rows) * jax.process_count() != batch_size:
    raise UserError(
      f"mesh model={mesh.shape['model']} reaches over several processes; expected at most the"
      f" {jax.local_device_count()} devices of one."
    )
  return tuple(sorted(rows))


def gather_parameters(params: Any, shardings: Any) -> Any:
  """All-gathers parameters that are sharded along the fsdp axis, just before they are used.

  Without it, the compiler may all-gather the activations of all examples instead, which
  it does where these are smaller. Gradients are reduce-scattered like the parameters.

  Args:
    params: arrays inside a jitted function.
    shardings: of these arrays, a `NamedSharding` each.
  """
  return jax.tree.map(_gather, params, shardings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  spec = [None if axis == "fsdp" else axis for axis in sharding.spec]
  if spec == list(sharding.spec):
    return x
  gathered = NamedSharding(sharding.mesh, PartitionSpec(*spec))
  return jax.lax.with_sharding_constraint(x, gathered)


def _gather_backward(sharding: NamedSharding, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
  return (jax.lax.with_sharding_constraint(cotangent, sharding),)


_gather.defvjp(lambda x, sharding: (_gather(x, sharding), None), _gather_backward)


def bytes_per_device(tree: Any) -> int:
  """Bytes that one device holds of a tree of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes global arrays of this process's part of a batch, sharded over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
  }


def batch_shapes(
  shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a global batch with the sharding that `put_batch` gives it."""
  sharding = batch_sharding(mesh)
  return {
    key: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    for key, array in shapes.items()
  }


def local_rows(array: jax.Array) -> np.ndarray:
  """This process's part of an array that is sharded along its leading axis, as one host array."""
  pieces = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
  return np.concatenate([np.asarray(pieces[start].data) for start in sorted(pieces)])


def _spec(
  name: str, shape: tuple[int, ...], placement: str | Sequence[str | None], mesh: Mesh
) -> PartitionSpec:
  if placement == "replicate" or not shape:
    return PartitionSpec()
  if placement == "fsdp":
    return _largest_dimension(shape, mesh.shape["fsdp"])
  if isinstance(placement, str):
    raise UserError(
      f"mesh.rules: {placement!r} for {name} is no placement; expected 'replicate', 'fsdp' or one"
      f" entry per dimension of {shape}, each an axis of {AXES} or None."
    )
  if len(placement) != len(shape):
    raise UserError(f"mesh.rules: {tuple(placement)} for {name} of shape {shape}: lengths differ.")
  for size, axis in zip(shape, placement, strict=True):
    if axis is not None and size % mesh.shape[axis]:
      raise UserError(
        f"mesh.rules: {name} of shape {shape} cannot be sharded as {tuple(placement)}."
      )
  return PartitionSpec(*placement)


def _largest_dimension(shape: tuple[int, ...], ways: int) -> PartitionSpec:
  divisible = [(size, axis) for axis, size in enumerate(shape) if size % ways == 0]
  if ways == 1 or not divisible or math.prod(shape) < _MIN_SHARDED_SIZE:
    return PartitionSpec()
  _, axis = max(divisible)
  return PartitionSpec(*(["fsdp" if i == axis else None for i in range(len(shape))]))
