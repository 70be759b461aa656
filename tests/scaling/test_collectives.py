"""What crosses devices: the reader on known programs, and what our training steps exchange."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effseg_jax import configs, create_model
from effseg_jax.configs.avesformer import synthetic as audio_visual
from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets.stand_in import stand_in
from effseg_jax.models import flops
from effseg_jax.scaling import ahead_of_time, topologies
from effseg_jax.scaling.collectives import read_collectives, totals
from effseg_jax.scaling.program import read_program
from effseg_jax.training import sharding
from tests import small_config
from tests.universal_models import SMALL as SMALL_UNIVERSAL

SMALL = {"widths": (8, 16, 32, 32), "depths": (0, 1, 1, 1), "num_classes": 8}
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None

# As the compilers write them: lists, iota with and without transposition, a mesh with its device
# order, a part of an axis; loops; and both halves of an asynchronous operation.
TEXT = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %in_loop = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %in_loop)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (x: f32[8], y: bf16[4,6]) -> f32[8] {
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %y.1 = bf16[4,6]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %x.1)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %gather = (bf16[4,6]{1,0}, bf16[4,24]{1,0}) all-gather-start(%y.1), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, metadata={op_name="jit(step)/gather"}
  %gathered = bf16[4,24]{1,0} all-gather-done(%gather)
  %mesh = f32[8]{0} all-reduce(%x.1), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%add
  %part = f32[8]{0} all-reduce(%x.1), channel_id=4, replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, to_apply=%add
  %cut = f32[8]{0} all-reduce(%x.1), channel_id=5, replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}, to_apply=%add
  %send = f32[8]{0} collective-permute(%x.1), channel_id=6, source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def _mesh(*sizes):
  """A mesh of more devices than there are here, for the reader alone."""
  shape = dict(zip(sharding.AXES, sizes, strict=True))

  class Described:
    axis_names = sharding.AXES
    size = int(np.prod(sizes))
    devices = np.zeros(sizes)

  Described.shape = shape
  return Described


def test_every_way_of_writing_groups_is_understood():
  found = read_collectives(read_program(TEXT), _mesh(2, 2, 2))
  assert [(entry.kind, entry.axes, entry.nbytes, entry.times) for entry in found] == [
    ("all-reduce", ("model",), 32, 5),
    ("all-gather", ("data", "fsdp"), 4 * 4 * 6 * 2, 1),
    ("all-reduce", ("data", "fsdp", "model"), 32, 1),
    ("all-reduce", ("data",), 32, 1),
    ("all-reduce", ("fsdp",), 32, 1),
    ("collective-permute", ("fsdp",), 32, 1),
  ]
  assert found[1].source == "jit(step)/gather"
  assert found[0].bytes_sent == 5 * 32  # twice a half of it, five times
  assert found[1].bytes_sent == 3 / 4 * 192
  in_all = {(total.kind, total.axes): total.nbytes for total in totals(found)}
  assert in_all["all-reduce", ("model",)] == 160


def test_real_programs_are_read_as_they_were_asked_for():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 1})

  def found(spec_in, spec_out):
    array = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, spec_in))
    program = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, spec_out)).lower(array)
    program = read_program(program.compile().as_text())
    return [(entry.kind, entry.axes, entry.nbytes) for entry in read_collectives(program, mesh)]

  assert found(P("data"), P()) == [("all-gather", ("data",), 8 * 64 * 4)]
  assert found(P(("data", "fsdp")), P("data")) == [("all-gather", ("fsdp",), 4 * 64 * 4)]
  assert found(P("data", None), P(None, "data")) == [("all-to-all", ("data",), 4 * 64 * 4)]
  assert found(P("data"), P("data")) == []


def test_traffic_counts_loops_and_what_is_read_of_an_array():
  def step(x):
    return jax.lax.scan(lambda total, row: (total + jnp.sin(row), None), jnp.zeros(1000), x)[0]

  program = jax.jit(step).lower(jax.ShapeDtypeStruct((50, 1000), jnp.float32)).compile()
  moved = read_program(program.as_text()).main_memory_bytes()
  # Each turn reads a row and the total and writes the total: not all rows, and not just once.
  assert 2 * 50 * 4000 <= moved <= 8 * 50 * 4000


def test_traffic_counts_the_padding_of_tiles():
  text = """
HloModule m

ENTRY %main (x: f32[300,4,32]) -> bf16[4,300,32] {
  %x = f32[300,4,32]{0,2,1:T(8,128)} parameter(0)
  ROOT %y = bf16[4,300,32]{2,1,0:T(8,128)(2,1)S(1)} convert(%x)
}
"""
  program = read_program(text)
  (x,), (y,) = (line.result for line in program.computations["main"])
  assert (x.nbytes, x.stored_bytes) == (4 * 300 * 4 * 32, 4 * 384 * 4 * 32)
  assert (y.nbytes, y.stored_bytes) == (2 * 4 * 300 * 32, 2 * 4 * 304 * 128)
  assert program.main_memory_bytes() == x.stored_bytes  # the result is on the chip


def _spectral():
  config = small_config.get_config()
  config.model.name = "afformer_tiny_fft"
  return config


def _universal():
  config = configs.load("proscale/synthetic:r50,111")
  config.model.update({**SMALL_UNIVERSAL, "decoder_layers": 1, "proscale_layers": (1, 0, 1)})
  del config.model.num_classes
  config.task.num_points = 64
  config.train.batch_size = 4
  config.data.options.size = config.data.augment.crop = (64, 64)
  return config


def _audio_visual():
  config = audio_visual.get_config()
  config.model.update({"widths": (32, 32, 32, 32), "width": 32, "hidden": 32})
  config.train.batch_size = 4
  return config


def _compiled(config, axes, devices):
  config.mesh.update(dict(zip(sharding.AXES, axes, strict=True)))
  data = config.data
  dataset = stand_in(data.name, config.task.name, data.options.to_dict())
  mesh = sharding.make_mesh(config.mesh, devices)
  step = ahead_of_time.trace_step(config, dataset, mesh)
  level = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", "O0")  # the TPU's compiler, too, hurries then
  try:
    return step, ahead_of_time.compile_step(step)
  finally:
    jax.config.update("jax_optimization_level", level)


@pytest.fixture(scope="module", params=["virtual devices", "v5e:2x2"])
def data_parallel(request):
  """For the devices that are always here, and for TPUs where their compiler is installed."""
  if request.param == "virtual devices":
    return _compiled(small_config.get_config(), (4, 1, 1), jax.devices())
  if not HAS_LIBTPU:
    pytest.skip("needs libtpu")
  devices = topologies.find_topology(request.param).devices
  return _compiled(small_config.get_config(), (4, 1, 1), devices)


def _nbytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_only_gradients_statistics_and_sums_cross_devices(data_parallel):
  step, compiled = data_parallel
  exchanged = compiled.exchanged
  assert {entry.kind for entry in exchanged} == {"all-reduce"}
  assert {entry.axes for entry in exchanged} == {("data",)}
  assert all(entry.times == 1 for entry in exchanged)
  # The gradients once; means and variances, and their gradients; counts and sums of the loss.
  gradients = _nbytes(step.state.params)
  statistics = _nbytes(step.state.model_state["batch_stats"])
  counts = 4 * 8 * 8 + 64
  total = sum(entry.nbytes for entry in exchanged)
  assert gradients <= total <= 1.1 * gradients + 4 * statistics + counts
  # Nothing of an image's size: the largest array is that of a parameter.
  largest = max(array.nbytes for entry in exchanged for array in entry.arrays)
  assert largest <= max(leaf.size * 4 for leaf in jax.tree.leaves(step.state.params))


@pytest.mark.parametrize("platform", ["virtual devices", "v5e:2x2"])
@pytest.mark.parametrize("experiment", [_spectral, _universal, _audio_visual])
def test_no_model_exchanges_activations_or_waits_in_loops(experiment, platform):
  if platform == "virtual devices":
    devices = jax.devices()
  elif HAS_LIBTPU:
    devices = topologies.find_topology(platform).devices
  else:
    pytest.skip("needs libtpu")
  step, compiled = _compiled(experiment(), (4, 1, 1), devices)
  assert {entry.kind for entry in compiled.exchanged} == {"all-reduce"}
  assert all(entry.times == 1 for entry in compiled.exchanged)
  gradients = _nbytes(step.state.params)
  assert gradients <= sum(entry.nbytes for entry in compiled.exchanged) <= 1.1 * gradients


def test_the_account_of_a_step(data_parallel):
  step, compiled = data_parallel
  assert compiled.error == ""
  assert step.batch["image"].shape == (4, small_config.SIZE, small_config.SIZE, 3)
  held = sharding.bytes_per_device(step.state)
  assert held == _nbytes(step.state)
  assert compiled.peak_bytes > held
  assert compiled.moved_bytes > held
  # Backward costs twice what forward does; the loss has products, too, and depthwise
  # convolutions, which are written out, have none.
  forward = flops.count(create_model("afformer_tiny", **SMALL), (64, 64)).products
  assert 2 * 2.0 * 4 * forward < step.products < 2 * 4.5 * 4 * forward


def test_parameters_that_are_cut_are_gathered_and_nothing_else_is():
  step, compiled = _compiled(small_config.get_config(), (1, 4, 1), jax.devices())
  assert sharding.bytes_per_device(step.state.params) < 0.6 * _nbytes(step.state.params)
  largest = max(leaf.size * 4 for leaf in jax.tree.leaves(step.state.params))
  gathers = [entry for entry in compiled.exchanged if entry.kind == "all-gather"]
  assert gathers
  assert all(array.nbytes <= largest for entry in gathers for array in entry.arrays)
  assert {entry.axes for entry in compiled.exchanged} == {("fsdp",)}


def test_a_batch_that_cannot_be_cut_says_so():
  config = small_config.get_config()
  config.train.batch_size = 6
  mesh = sharding.make_mesh(config.mesh)
  assert ahead_of_time.next_batch_size(config, mesh) == 8
  dataset = stand_in("synthetic", "semantic", config.data.options.to_dict())
  with pytest.raises(UserError, match="a multiple of 4"):
    ahead_of_time.trace_step(config, dataset, mesh)


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
@pytest.mark.parametrize(
  ("name", "chips", "devices", "hosts"),
  [
    ("v5e:1x1", 1, 1, 1),
    ("v5e:4x4", 16, 16, 4),
    ("v4:2x2x2", 8, 8, 2),
    ("v5p:2x2x2", 8, 8, 2),
    ("v6e:16x16", 256, 256, 64),
    ("tpu7x:2x2x2", 8, 16, 2),
    ("v5e:4x4*2", 32, 32, 8),
  ],
)
def test_slices(name, chips, devices, hosts):
  topology = topologies.find_topology(name)
  assert (topology.num_chips, len(topology.devices), topology.num_hosts) == (chips, devices, hosts)
  assert 50 < topology.peak_flops / topology.hbm_rate < 600  # FLOPs per byte


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_slices_divide_the_data_axis():
  devices = topologies.find_topology("v5e:2x2*2").devices
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "model": 1}, devices)
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  assert slices[:, :, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(UserError, match="a multiple of 2"):
    sharding.make_mesh({"data": 1, "fsdp": 8, "model": 1}, devices)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:4", "H100:2x2", "v5e:2x2*0"])
def test_an_unknown_slice_names_the_known(name):
  with pytest.raises(UserError, match="v5e:4x4"):
    topologies.find_topology(name)


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_an_impossible_slice_says_so():
  with pytest.raises(UserError, match="no such slice"):
    topologies.find_topology("v5e:3x4")


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install"):
    topologies.find_topology("v5e:4x4")


def test_a_program_of_another_libtpu_ends_in_one_line():
  class Foreign:
    def compile(self):
      return self

    def memory_analysis(self):
      return jax.jit(lambda x: x).lower(1.0).compile().memory_analysis()

    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\n*** stack trace ***")

  mesh = jax.make_mesh((1,), ("data",))
  step = ahead_of_time.TracedStep(mesh, None, {}, 0, Foreign(), 0.0)
  with pytest.raises(UserError, match=r"cannot read .*RET_CHECK failure\); pip install") as caught:
    ahead_of_time.compile_step(step)
  assert "\n" not in str(caught.value)
