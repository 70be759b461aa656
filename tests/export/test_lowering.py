"""Functions become ONNX graphs that compute the same, with few nodes."""

from __future__ import annotations

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model
from effseg_jax.export import lowering, onnx_file, steps
from effseg_jax.models.afformer import pooled_low_pass
from effseg_jax.models.layers import ConvNorm, GroupNorm
from effseg_jax.ops import backend
from effseg_jax.ops.conv import conv, depthwise_conv
from effseg_jax.ops.deformable import deformable_attention_reference, grid_sample
from effseg_jax.ops.pool import max_pool_reduction
from effseg_jax.ops.resize import resize_bilinear

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
  return RNG.standard_normal(shape).astype(np.float32)


def convert(function, *inputs: np.ndarray):
  """The graph of a function, its batch free."""
  shapes = [((None, *x.shape[1:]), x.dtype) for x in inputs]
  program = steps.trace(lambda *x: (function(*x),), shapes)
  return lowering.lower(program, [f"x{i}" for i in range(len(inputs))], ["y"])


def check(function, *inputs: np.ndarray, tolerance: float = 2e-5) -> collections.Counter:
  """Compares ONNX Runtime with JAX; returns the graph's operators."""
  graph = convert(function, *inputs)
  model = onnx_file.to_model(graph, 20, {})
  onnx_file.require_onnx().checker.check_model(model, full_check=True)
  session = onnxruntime.InferenceSession(model.SerializeToString())
  (found,) = session.run(None, {f"x{i}": x for i, x in enumerate(inputs)})
  expected = np.asarray(function(*inputs))
  assert found.shape == expected.shape
  assert found.dtype == expected.dtype
  np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
  return collections.Counter(node.operator for node in graph.nodes)


IMAGE = normal(2, 8, 6, 4)
TOKENS = normal(2, 5, 12)
HEADS = normal(2, 3, 7, 4), normal(2, 3, 7, 4)
KERNEL_3, KERNEL_1, DEPTHWISE = normal(3, 3, 4, 5), normal(1, 1, 4, 5), normal(5, 5, 1, 4)
MATRIX = normal(12, 7)

FUNCTIONS = {
  "conv": lambda x: conv(x, KERNEL_3),
  "strided conv": lambda x: conv(x, KERNEL_3, 2, (1, 1)),
  "strided 1x1 conv": lambda x: conv(x, KERNEL_1, 2),
  "depthwise conv": lambda x: depthwise_conv(x, DEPTHWISE, 2),
  "max pool": lambda x: max_pool_reduction(x, 3, 2),
  "resize": lambda x: resize_bilinear(x, (16, 9)),
  "resize with corners": lambda x: resize_bilinear(x, (5, 13), align_corners=True),
  "low pass": pooled_low_pass,
  "reshape between convs": lambda x: conv(
    conv(x, KERNEL_3).reshape(x.shape[0], 6, 8, 5), KERNEL_3[:, :, :1].repeat(5, 2)
  ),
  "reductions": lambda x: x - x.mean((1, 2), keepdims=True) + x.max(-1, keepdims=True),
  "padding": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (3, 0)), constant_values=2.0),
  "stack": lambda x: jnp.stack([x, 2 * x, -x], axis=2),
  "flip and slice": lambda x: x[:, ::-1, 1::2],
  "take": lambda x: jnp.take(x, np.array([3, 0, 0]), axis=1),
  "argmax": lambda x: jnp.argmax(conv(x, KERNEL_3), axis=-1),
  "classes as uint8": lambda x: jnp.argmax(x, axis=-1).astype(jnp.uint8),
  "comparisons": lambda x: jnp.where((x > 0) & ~(x > 1), x, jnp.where(x == 0, 1.0, -x)),
  "any": lambda x: jnp.where(jnp.any(x > 1.5, axis=-1, keepdims=True), 0.0, x),
  "broadcast": lambda x: jnp.concatenate(
    [x, jnp.broadcast_to(np.arange(4, dtype=np.float32), x.shape)], axis=-1
  ),
  "powers": lambda x: jax.lax.rsqrt(jnp.square(x) + 1) + x**3 + jnp.abs(x) ** 0.5 + 1 / (3 + x**2),
  "hard swish": nn.hard_swish,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "tanh gelu": nn.gelu,
  "silu": nn.silu,
  "softmax over rows": lambda x: nn.softmax(x, axis=1),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_images(name):
  """Every rule gives what JAX gives, for a batch that the graph does not know."""
  check(FUNCTIONS[name], IMAGE)


@pytest.mark.parametrize(
  ("name", "function", "operator"),
  [
    ("gelu", lambda x: nn.gelu(x, approximate=False), "Gelu"),
    ("hard swish", nn.hard_swish, "HardSwish"),
    ("softmax", nn.softmax, "Softmax"),
    ("mean", lambda x: jnp.mean(x, axis=-1), "ReduceMean"),
    ("relu", nn.relu, "Relu"),
    ("dense", lambda x: x @ MATRIX, "MatMul"),
  ],
)
def test_what_runtimes_know_is_one_operator(name, function, operator):
  """What JAX writes as several primitives is written as the operator it stands for."""
  del name
  operators = check(function, TOKENS)
  assert operators[operator] == 1
  assert operators.total() <= 2


@pytest.mark.parametrize("fast", [True, False])
def test_layer_norm_is_one_operator(fast):
  """Both ways in which Flax computes the variance are recognised."""
  norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=fast)
  variables = {"params": {"scale": normal(12), "bias": normal(12)}}
  operators = check(lambda x: norm.apply(variables, x), TOKENS)
  assert operators == {"LayerNormalization": 1}


def test_a_normalised_convolution_is_one_operator():
  """Batch normalisation becomes part of the weights, and its input keeps channels first."""
  layer = ConvNorm(5, 3, activate=False)
  variables = layer.init(jax.random.key(0), IMAGE, False)
  variables["batch_stats"]["norm"] = {"mean": normal(5), "var": np.abs(normal(5)) + 1}
  operators = check(lambda x: layer.apply(variables, x, False), IMAGE)
  assert operators == {"Transpose": 2, "Conv": 1}


def test_a_residual_depthwise_convolution_is_one_operator():
  """`x + conv(x)` is a convolution whose central weight is larger by one."""
  operators = check(lambda x: x + depthwise_conv(x, DEPTHWISE), IMAGE)
  assert operators == {"Transpose": 2, "Conv": 1}


def test_group_norm():
  """32 groups are normalised as rows."""
  x, layer = normal(2, 4, 5, 64), GroupNorm()
  variables = {"params": {"scale": normal(64), "bias": normal(64)}}
  check(lambda x: layer.apply(variables, x), x)


def test_attention():
  """Products of two computed arrays, in both orientations, with what follows."""

  def attend(query, key):
    weights = nn.softmax(jnp.einsum("bnqd,bnkd->bnqk", query, key))
    mixed = jnp.einsum("bnqk,bnkd->bnqd", weights, key)
    linear = jnp.einsum("bnkd,bnke->bnde", nn.softmax(key, axis=2), query)
    return mixed + jnp.einsum("bnqd,bnde->bnqe", query, linear)

  check(attend, *HEADS)


def test_selections():
  """The largest, sorted values, and elements along an axis."""

  def select(x):
    values, places = jax.lax.top_k(x, 3)
    chosen = jnp.take_along_axis(x, places, axis=-1)
    return jnp.concatenate([values, chosen, jnp.sort(x, axis=-1), jnp.cumsum(x, axis=-1)], axis=-1)

  check(select, TOKENS)


def test_deformable_attention_samples_grids():
  """The form for runtimes equals the reference form, traced and in ONNX Runtime."""
  value, sizes = normal(2, 4 * 3 + 2 * 5, 2, 4), ((4, 3), (2, 5))
  locations = RNG.uniform(-0.2, 1.2, (2, 2, 2, 3, 2, 6)).astype(np.float32)
  weights = normal(2, 2, 2, 3, 6)
  reference = deformable_attention_reference(value, sizes, locations, weights)

  def attend(value, locations, weights):
    from effseg_jax.ops.deformable import deformable_attention

    return deformable_attention(value, sizes, locations, weights)

  with backend.target_platform("export"):
    np.testing.assert_allclose(attend(value, locations, weights), reference, atol=1e-5)
  operators = check(attend, value, locations, weights)
  assert operators["GridSample"] == 2


def test_grid_sample_counts_cells_outside_as_zero():
  """The corner of an image is read half a cell inside."""
  image = np.ones((1, 2, 2, 1), np.float32)
  points = np.array([[[[-1, -1], [-0.5, -0.5], [-3, 0]]]], np.float32)
  np.testing.assert_allclose(np.asarray(grid_sample(image, points)).ravel(), [0.25, 1, 0])


def test_afformer_is_a_small_graph():
  """The whole of AFFormer-tiny, at the size of the benchmarks."""
  model = create_model("afformer_tiny")
  shape = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
  shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros(shape.shape)), jax.random.key(0))
  variables = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
  program = steps.trace(
    lambda x: (model.apply(variables, x, train=False),), [((None, 512, 512, 3), np.float32)]
  )
  operators = collections.Counter(
    node.operator for node in lowering.lower(program, ["x"], ["y"]).nodes
  )
  assert operators.total() <= 450, operators
  assert operators["LayerNormalization"] == 16
  assert operators["Transpose"] <= 60


def test_an_unknown_primitive_is_named():
  """What has no operator ends in a line that names it and another format."""
  with pytest.raises(UserError, match=r"'fft'.*--format=stablehlo"):
    convert(lambda x: jnp.fft.rfft(x).real, TOKENS)


def test_an_old_opset_is_refused():
  """Gelu exists from opset 20 on."""
  with pytest.raises(UserError, match="expected one of 20, 21"):
    onnx_file.to_model(convert(nn.gelu, TOKENS), 17, {})
