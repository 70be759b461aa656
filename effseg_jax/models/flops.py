"""Parameters and multiply-accumulates of a model, counted on the traced computation.

Two conventions are in use, and both count one multiply-accumulate as one (XLA's cost analysis
counts two):

* *products*: convolutions, linear layers and the matrix products of attention;
* *published*: the totals of fvcore's `FlopCountAnalysis`, which are the GFLOPs of the paper. To the
  products it adds, per element, 2 for batch normalisation, 5 for layer and group normalisation, 1
  for adaptive average pooling (of its input) and 4 for bilinear resizing (of its output); nothing
  for activations, softmax, additions and biases. The resize of the logits to the image is included.

Products are read off the jaxpr. Normalisations, pools and resizes have no primitive of their own
there, so they are counted where their modules are called, while the same trace is made. The
reverse holds for the low-pass filters: their pools and resizes *are* matrix products in our
formulation. They are recognised by their constant operand, and not counted as products.

For the universal models the published convention is that of detectron2's `analyze_model`, which
applies the same counter to the network alone: no mask upsampling, no post-processing. It
counts 4 for each value that deformable attention samples and nothing for adding the samples up; 4
for each mask logit that is resized to a level; and it overlooks the products of queries and keys in
masked attention (`baddbmm`). Where our formulation has other products, theirs take their place.

The papers of SegFormer and EfficientViT count products only: both conventions are the same there.
SegFormer's head is counted in the published order, which has more products than ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from effseg_jax.models.afformer import FrequencyFilters, Stage
from effseg_jax.models.avesformer import AVESFormer
from effseg_jax.models.backbones.resnet import FrozenBatchNorm
from effseg_jax.models.backbones.vggish import PATCH, VGGish
from effseg_jax.models.efficientvit import EfficientViT, MultiScaleAttention
from effseg_jax.models.layers import BatchNorm, GroupNorm
from effseg_jax.models.mask2former import STRIDE, Attention, Mask2Former, MaskedAttentionDecoder
from effseg_jax.models.pixel_decoder import DeformableAttention, MaskFeatures
from effseg_jax.models.proscale import TokenRecalibration
from effseg_jax.models.segformer import Head as SegFormerHead
from effseg_jax.models.segformer import MMSegHead, SegFormer
from effseg_jax.models.segvit import SegViT
from effseg_jax.ops import fourier
from effseg_jax.ops.backend import target_platform

# Models whose papers count products and nothing else.
_PRODUCTS_ALONE = (SegFormer, EfficientViT)

_POOL, _RESIZE, _BATCH_NORM, _NORM, _SAMPLE = 1, 4, 2, 5, 4  # fvcore's cost per element


@dataclasses.dataclass(frozen=True)
class Count:
  """What one application of a model costs.

  Attributes:
    products: multiply-accumulates of convolutions, linear layers and attention.
    others: what the published convention adds to them.
    transforms: Fourier transforms, which neither convention has a cost for.
  """

  products: int
  others: int
  transforms: int

  @property
  def published(self) -> int:
    """The total by the published convention."""
    return self.products + self.others


def count(model: nn.Module, size: tuple[int, int]) -> Count:
  """Counts one application to one image, with the logits resized to the image.

  Args:
    model: takes images (B, H, W, 3); or frames and the sound of their seconds, and is counted for
      one frame; or sound alone.
    size: (H, W).

  Returns:
    The counts; nothing is computed or allocated.
  """
  inputs, variables = _arguments(model, size)
  cost, outputs = _count_call(model, variables, *inputs, False)
  if isinstance(model, SegViT) and not model.features_only:
    return _with_class_scores(cost, outputs, size)
  if isinstance(model, _PRODUCTS_ALONE):
    return dataclasses.replace(cost, others=0)
  if getattr(outputs, "ndim", 0) == 4:  # logits of a map: features and whole images have no resize
    resize = _RESIZE * math.prod(size) * outputs.shape[-1]
    cost = dataclasses.replace(cost, others=cost.others + resize)
  return cost


def _with_class_scores(cost: Count, outputs: Any, size: tuple[int, int]) -> Count:
  """SegViT's published counts go on to the scores at the image's size: masks resized, and mixed."""
  pixels = math.prod(size)
  queries, classes = outputs["class_logits"].shape[1:]
  return dataclasses.replace(
    cost,
    products=cost.products + queries * (classes - 1) * pixels,
    others=cost.others + _RESIZE * queries * pixels,
  )


def count_parts(model: Mask2Former, size: tuple[int, int]) -> dict[str, Count]:
  """Counts one application of each part of a universal model to one image.

  Args:
    model: of `effseg_jax.models.mask2former`.
    size: (H, W) of the image, which is padded to multiples of 32.

  Returns:
    The counts of `backbone`, `pixel_decoder` and `decoder`, which add up to the model's.
  """
  padded = tuple(n + -n % STRIDE for n in size)
  (images,), variables = _arguments(model, padded)
  own = lambda part: {kind: tree[part] for kind, tree in variables.items() if part in tree}  # noqa: E731
  costs = {}
  costs["backbone"], features = _count_call(model.backbone, own("backbone"), images, False)
  costs["pixel_decoder"], outputs = _count_call(
    model.pixel_decoder, own("pixel_decoder"), features, False
  )
  costs["decoder"], _ = _count_call(model.decoder, own("decoder"), *outputs[:2])
  return costs


def _count_call(module: nn.Module, variables: Any, *args: Any) -> tuple[Count, Any]:
  """Counts `module.apply(variables, *args)`; also returns the shapes of its outputs."""
  others = reordered = 0

  def tally(call, args, kwargs, context):
    nonlocal others, reordered
    outputs = call(*args, **kwargs)
    if context.method_name == "__call__":
      others += _cost_of_call(context.module, args, outputs)
      reordered += _products_of_published_order(context.module, args)
    return outputs

  static = {index: arg for index, arg in enumerate(args) if isinstance(arg, bool)}
  arrays = [arg for index, arg in enumerate(args) if index not in static]

  def apply(variables: Any, *arrays: Any) -> Any:
    given = iter(arrays)
    return module.apply(
      variables, *(static[i] if i in static else next(given) for i in range(len(args)))
    )

  # Traced for an accelerator: the depthwise convolutions are convolutions there, while their CPU
  # formulation has no product in it.
  with target_platform("gpu"), nn.intercept_methods(tally):
    closed, outputs = jax.make_jaxpr(apply, return_shape=True)(variables, *arrays)
  products, transforms = _products(closed.jaxpr)
  return Count(products + reordered, others, transforms), outputs


def parameter_counts(model: nn.Module, size: tuple[int, int] = (64, 64)) -> tuple[int, int]:
  """Counts the parameters that are used, and those together with the official dead layer.

  Args:
    model: takes images (B, H, W, 3).
    size: (H, W) of an image it takes.

  Returns:
    Live parameters, and live and dead ones.
  """
  variables = _arguments(model, size)[1]
  live, dead = (
    sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.get(collection, {})))
    for collection in ("params", "unused")
  )
  return live, live + dead


def _arguments(
  model: nn.Module, size: tuple[int, int]
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], Any]:
  """One image, or one frame and its sound, and the variables, as shapes."""
  if isinstance(model, AVESFormer):
    shapes = [(1, 1, *size, 3), (1, 1, *PATCH)]
  elif isinstance(model, VGGish):
    shapes = [(1, *PATCH)]
  else:
    shapes = [(1, *size, getattr(model, "in_channels", 3))]
  inputs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  with target_platform("gpu"):  # the shortest to trace, of the same shapes
    return inputs, jax.eval_shape(
      lambda key, *args: model.init(key, *args, train=False), jax.random.key(0), *inputs
    )


def _cost_of_call(module: nn.Module, args: Sequence[Any], outputs: Any) -> int:
  """What the published convention adds for a call of a module, its submodules' calls aside."""
  if isinstance(module, (BatchNorm, FrozenBatchNorm)):
    return _BATCH_NORM * args[0].size
  if isinstance(module, (nn.LayerNorm, GroupNorm)):
    return _NORM * args[0].size
  if isinstance(module, FrequencyFilters):  # the low-pass filter pools all values and resizes back
    return (_POOL + _RESIZE) * args[0].size
  if isinstance(module, Stage) and module.drop_paths and module.strides[1] > 1:
    rows, cols = outputs.shape[1:3]  # the prototypes are resized to the pixels' grid
    return _RESIZE * args[0].shape[0] * rows * cols * args[0].shape[-1]
  if isinstance(module, MaskFeatures):  # the finest memory is resized to the adapter's grid
    return _RESIZE * outputs.size
  if isinstance(module, TokenRecalibration):  # the guide is resized to the coarse grid
    return _RESIZE * outputs.size
  if isinstance(module, DeformableAttention):
    return _SAMPLE * args[0].size * len(module.sizes) * module.points
  if isinstance(module, Attention) and len(args) == 4:  # masked: queries times keys are overlooked
    return -args[0].size * args[1].shape[1]
  if isinstance(module, MaskedAttentionDecoder):
    return _masks_at_levels(module, *args)
  return 0


def _products_of_published_order(module: nn.Module, args: Sequence[Any]) -> int:
  """Products of the published order of operations, less those of ours, in a module's call."""
  if isinstance(module, MultiScaleAttention):  # keys are summed by a product with ones, twice
    return 2 * args[0].size
  if not isinstance(module, (SegFormerHead, MMSegHead)):
    return 0
  levels, square = args[0], module.features**2
  positions = [level.size // level.shape[-1] for level in levels]
  published = positions[0] * len(levels) * square
  if isinstance(module, SegFormerHead):  # kernels and biases times the convolution
    return published - sum((level.shape[-1] + 1) * square for level in levels)
  return published - sum(positions) * square


def _masks_at_levels(module: MaskedAttentionDecoder, features: Any, memories: Any) -> int:
  """The official code resizes mask logits to a level; ours multiplies by resized features."""
  others = 0
  for layer in range(module.layers):
    batch, rows, cols, channels = memories[layer % len(memories)].shape
    logits = batch * module.num_queries * rows * cols
    others += (_RESIZE - channels) * logits
  return others


def _products(jaxpr: core.Jaxpr, varying: Sequence[bool] | None = None) -> tuple[int, int]:
  """Multiply-accumulates and Fourier transforms of a jaxpr.

  Args:
    jaxpr: of the computation.
    varying: for each argument, whether it depends on weights or images; all do by default.
  """
  varying = [True] * len(jaxpr.invars) if varying is None else varying
  changing = {v for v, varies in zip(jaxpr.invars, varying, strict=True) if varies}
  products = transforms = 0
  for equation in jaxpr.eqns:
    operands = [
      not isinstance(operand, core.Literal) and operand in changing for operand in equation.invars
    ]
    if any(operands):
      changing.update(equation.outvars)
    name = equation.primitive.name
    if name == "conv_general_dilated":
      products += _conv_products(equation)
    elif name == "dot_general" and all(operands):
      products += _dot_products(equation)
    elif name == "fft" or equation.params.get("name") in fourier.TRANSFORMS:
      transforms += 1
    elif name == "while":
      raise ValueError("a loop of unknown length has no count of products")
    if name == "cond":  # all arguments but the choice go to every branch; the costliest counts
      branches = [_products(b.jaxpr, operands[1:]) for b in equation.params["branches"]]
      products += max(branch[0] for branch in branches)
      transforms += max(branch[1] for branch in branches)
    times = equation.params["length"] if name == "scan" else 1
    for inner in _inner_jaxprs(equation.params):
      same = len(inner.invars) == len(operands)
      more = _products(inner, operands if same else None)
      products, transforms = products + times * more[0], transforms + times * more[1]
  return products, transforms


def _conv_products(equation: Any) -> int:
  """Each output element takes one kernel's worth of products."""
  kernel = equation.invars[1].aval
  out_axis = equation.params["dimension_numbers"].rhs_spec[0]
  return equation.outvars[0].aval.size * (kernel.size // kernel.shape[out_axis])


def _dot_products(equation: Any) -> int:
  """Each output element takes as many products as the contracted axes have elements."""
  (axes, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  return equation.outvars[0].aval.size * math.prod(shape[axis] for axis in axes)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
  """The jaxprs among an equation's parameters: of jit, custom derivatives, remat, scan."""
  for value in params.values():
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
