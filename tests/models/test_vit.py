"""The plain ViT against timm's, and the resizing of its positions against PyTorch's."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effseg_jax import UserError, create_model, load_weights
from effseg_jax.models.backbones.vit import Block, ViT, resize_positions
from effseg_jax.ops.resize import antialiased_bicubic_matrix
from effseg_jax.weights import vit as vit_names
from tests.vit_models import FEATURES, assert_close, channels_first, golden, images


def jax_tensor(name, shape):
  """By the rule of the authors' names."""
  z = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
  z = z.astype(np.float32)
  if name.endswith(("pos_embedding", "cls")):
    return np.float32(0.5) * z
  if name.endswith("scale"):
    return np.float32(1) + np.float32(0.1) * z
  if name.endswith("bias"):
    return np.float32(0.1) * z
  fan_in = shape[0] if any(f"/{p}/" in name for p in ("query", "key", "value")) else None
  return z * np.float32(1 / np.sqrt(fan_in or np.prod(shape[:-1])))


@functools.cache
def authors_file():
  return {name: jax_tensor(name, shape) for name, shape in golden("vit")["jax_shapes"].items()}


def features_of(tensors, class_token):
  """Outputs of both blocks with the class token kept, or dropped before the first one."""
  name = "setr_naive_l16" if class_token else "setr_mla_l16"
  fields = {**golden("vit")["fields"], "depth": 4, "out_layers": (0, 1, 2, 3)}
  model = create_model(name, features_only=True, **fields)
  more = {}  # the file has two blocks; the others stand for what it lacks
  for key, value in tensors.items():
    for layer in (0, 1):
      for part in (f"encoderblock_{layer}/", f"blocks.{layer}.", f"layers.{layer}."):
        if part in key:
          more[key.replace(part, part.replace(str(layer), str(layer + 2)))] = value
  variables = load_weights(model, {**tensors, **more}, partial="backbone")
  return variables, jax.jit(model.apply)(variables, images(0, 1, 64, 64))[:2]


@pytest.mark.parametrize("class_token", [True, False])
def test_weights_of_the_authors_give_timms_outputs(class_token):
  variables, outputs = features_of(authors_file(), class_token)
  assert set(variables["params"]) == {"backbone"}
  for block, found in enumerate(outputs):
    if class_token:
      expected = golden("vit")[f"tokens_with_cls/block{block}"][:, 1:]
      assert_close(found.reshape(1, -1, found.shape[-1]), expected, FEATURES)
    else:
      assert_close(channels_first(found), golden("vit")[f"without_cls/block{block}"], FEATURES)


def test_timms_names_are_read_like_the_authors(capsys):
  theirs = vit_names.from_jax(authors_file())
  listed = {name: tuple(shape) for name, shape in golden("vit")["timm_state_dict"]}
  assert {k: x.shape for k, x in theirs.items()} == {
    k: s for k, s in listed.items() if not k.startswith(("norm.", "head."))
  }
  for name, shape in listed.items():
    theirs.setdefault(name, np.zeros(shape, np.float32))
  expected, _ = features_of(authors_file(), True)
  found, _ = features_of(theirs, True)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert capsys.readouterr().err == ""  # nothing was resized


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("source, grid", [(4, (5, 6)), (4, (8, 8)), (4, (4, 5)), (24, (32, 32))])
def test_positions_are_resized_as_pytorch_does_it(method, source, grid):
  table = golden("vit")[f"pos{source}/param"][:, 1:]
  expected = golden("vit")[f"pos{source}/{method}/{grid[0]}x{grid[1]}"][:, 1:]
  found = resize_positions(jnp.asarray(table), (source, source), grid, method)
  np.testing.assert_allclose(found, expected, atol=2e-6)
  assert resize_positions(table, (source, source), (source, source), method) is table


@pytest.mark.parametrize("size, source", [(16, 14), (8, 14), (37, 12), (5, 5)])
def test_antialiased_matrix_is_that_of_jax(size, source):
  identity = jnp.eye(source, dtype=jnp.float32)
  expected = jax.image.resize(identity, (size, source), "cubic", antialias=True)
  np.testing.assert_allclose(antialiased_bicubic_matrix(size, source), expected, atol=2e-6)


@functools.cache
def small():
  vit = ViT(32, 2, 2, image_size=32)
  init = jax.jit(functools.partial(vit.init, out_layers=(1,)))
  return vit, init(jax.random.key(0), images(0, 1, 32, 32))


def test_transposed_grids_of_as_many_patches_are_resized():
  vit = ViT(32, 1, 2, image_size=(32, 64))
  x = images(0, 1, 64, 32)
  _, variables = small()
  embed = jax.jit(lambda table: vit.apply(with_table(table), x, method="embed")[0][:, 1:])

  def with_table(table):
    return {"params": {**variables["params"], "pos_embed": table}}

  table = jax.random.normal(jax.random.key(0), (1, 9, 32))
  expected = resize_positions(table[:, 1:], (2, 4), (4, 2))
  np.testing.assert_allclose(embed(table) - embed(0 * table), expected, atol=1e-5)
  assert np.abs(expected - table[:, 1:]).max() > 0.1


def test_whole_examples_lose_their_mlp_branch_and_no_attention():
  _, variables = small()
  block, x = Block(2, drop_path=0.5), images(0, 16, 2, 32)[..., 0]
  params = {"params": variables["params"]["block_1"]}
  without = {**params["params"], "fc2": jax.tree.map(jnp.zeros_like, params["params"]["fc2"])}
  found = jax.jit(lambda: block.apply(params, x, True, rngs={"drop_path": jax.random.key(1)}))()
  run = jax.jit(lambda params: block.apply({"params": params}, x, False))
  whole, attended = run(params["params"]), run(without)
  kept = attended + 2 * (whole - attended)
  dropped = np.array([np.allclose(a, b, atol=1e-5) for a, b in zip(found, attended, strict=True)])
  full = np.array([np.allclose(a, b, atol=1e-5) for a, b in zip(found, kept, strict=True)])
  assert (dropped ^ full).all() and dropped.any() and full.any()


def test_remat_saves_every_block_and_changes_nothing():
  vit, variables = small()
  x = images(0, 1, 32, 32)

  def gradient(vit):
    return jax.grad(
      lambda params: jnp.sum(vit.apply({"params": params}, x, out_layers=(1,))[0] ** 2)
    )

  again = vit.clone(remat=True)
  program = str(jax.make_jaxpr(gradient(again))(variables["params"]))
  assert program.count("policy=None") >= vit.depth
  ours, theirs = (jax.jit(gradient(v))(variables["params"]) for v in (vit, again))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-3), ours, theirs)


@pytest.mark.parametrize("name, fields, message", [
  ("eomt_vit_s", {"image_size": 600}, r"image_size is 600; expected a multiple of the patches' 16"),
  ("setr_pup_l16", {"image_size": (64, 40)}, r"image_size is \(64, 40\)"),
  ("segvit_b16", {"num_heads": 5}, r"embed_dim is 768; expected a multiple of num_heads, 5"),
  ("eomt_vit_l", {"query_blocks": 25}, r"query_blocks is 25; expected 1 to 24"),
  ("setr_mla_l16", {"out_layers": (3, 2, 5, 9)}, "expected 4 rising numbers of blocks"),
  ("segvit_l16", {"out_layers": (7, 23)}, "expected 3 rising"),
  ("segvit_shrunk_l16", {"shrink_at": 7}, "expected a block behind the first"),
  ("segvit_l16", {"decoder_heads": 7}, "decoder_features is 512; expected a multiple"),
  ("setr_naive_l16", {"mla_features": 8}, "has no field 'mla_features'"),
  ("setr_mla_l16", {"head_featurs": 8}, "has no field 'head_featurs'"),
  ("setr_pup_l16", {"decoder": "mla"}, "has no field 'decoder'"),
])  # fmt: skip
def test_sizes_that_do_not_go_together_are_one_line(name, fields, message):
  with pytest.raises(UserError, match=message) as caught:
    create_model(name, **fields)
  assert "\n" not in str(caught.value)
