"""Counts come from the traced model and meet the published ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from command import call
from flax import linen as nn

from effseg_jax import UserError, create_model
from effseg_jax.cli import models as print_models
from effseg_jax.models import flops

# Parameters (live, with the dead layer), and at 512x512 with 150 classes 10^9 products and
# published multiply-accumulates.
COUNTS = {
  "tiny": (2_127_306, 2_193_354, 3.080, 3.294),
  "small": (2_323_106, 2_389_154, 3.334, 3.550),
  "base": (2_937_906, 3_003_954, 4.344, 4.572),
}


@pytest.mark.parametrize("size", COUNTS)
def test_counts_at_512(size):
  live, total, products, published = COUNTS[size]
  model = create_model(f"afformer_{size}")
  cost = flops.count(model, (512, 512))
  assert flops.parameter_counts(model) == (live, total)
  assert cost.products / 1e9 == pytest.approx(products, abs=6e-4)
  assert cost.published / 1e9 == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(("size", "products", "published"), [
  ("tiny", 23.537, 24.151), ("small", 25.571, 26.200), ("base", 33.656, 34.376),
])  # fmt: skip
def test_counts_at_the_size_of_cityscapes(size, products, published):
  cost = flops.count(create_model(f"afformer_{size}", num_classes=19), (1024, 2048))
  assert cost.products / 1e9 == pytest.approx(products, abs=6e-4)
  assert cost.published / 1e9 == pytest.approx(published, abs=6e-4)


# 10^9 multiply-accumulates of whole, backbone, pixel decoder and decoder at 800x1088, as counted on
# the official code, and fields of the model.
PARTS = {
  "mask2former_r50": ((217.4, 71.3, 122.2, 23.9), {}),
  "mask2former_swin_tiny": ((223.3, 81.3, 118.1, 23.9), {}),
  "proscale_r50": ((156.4, 71.3, 61.2, 23.9), {"proscale_layers": (3, 3, 3)}),
  "proscale_swin_tiny": ((128.4, 81.3, 23.2, 23.9), {"proscale_layers": (1, 1, 1)}),
  "eco_m2f_r50": ((217.4, 71.3, 122.2, 23.9), {}),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_universal_models(name):
  published, fields = PARTS[name]
  costs = flops.count_parts(create_model(name, **fields), (799, 1061))
  assert list(costs) == ["backbone", "pixel_decoder", "decoder"]
  found = [cost.published / 1e9 for cost in costs.values()]
  assert [sum(found), *found] == pytest.approx(published, rel=2e-3)


def test_parts_add_up():
  model = create_model("proscale_r50", depth=18, proscale_layers=(1, 0, 0), decoder_layers=1)
  whole, parts = flops.count(model, (64, 96)), flops.count_parts(model, (64, 96)).values()
  for kind in ("products", "others", "published"):
    assert getattr(whole, kind) == sum(getattr(part, kind) for part in parts)


def test_a_choice_counts_as_its_costliest_branch():
  class Choice(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
      x = nn.Dense(3)(images)
      return jax.lax.cond(images.sum() > 0, lambda x: x @ (x.mT @ x), lambda x: x, x).mean()

  assert flops.count(Choice(), (16, 4)).products == 16 * 4 * 3 * 3 + 2 * 16 * 4 * 3 * 3


def test_memory_saving_changes_no_count():
  plain, remat = (create_model("afformer_tiny", remat=remat) for remat in (False, True))
  assert flops.count(plain, (64, 64)) == flops.count(remat, (64, 64))


def test_loops_and_constants_are_understood():
  class Loop(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
      x = jnp.einsum("hk,bkwc->bhwc", jnp.ones((8, images.shape[1])), images)  # resampling
      step = nn.scan(
        lambda layer, carry, _: (layer(carry), None),
        variable_broadcast="params",
        split_rngs={"params": False},
        length=5,
      )
      return step(nn.Dense(3), x, None)[0].mean()

  assert flops.count(Loop(), (16, 4)).products == 5 * 8 * 4 * 3 * 3


def test_the_table(capsys):
  call("models", "--pattern=afformer_tiny", "--size=64x32", "--num_classes=7")
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "one image of 64x32, 7 classes"
  assert lines[1].split()[:2] == ["model", "parameters"]
  assert lines[2].split()[0] == "afformer_tiny"


def test_audio_visual_models_are_counted_for_one_frame():
  line = print_models.table("avesformer_r50", (224, 224), 1).splitlines()[2]
  assert line.split()[:4] == ["avesformer_r50", "119,501,696", "119,501,696", "20.409"]
  line = print_models.table("vggish", (224, 224), 1).splitlines()[2]
  assert line.split()[:4] == ["vggish", "72,141,184", "72,141,184", "0.864"]


def test_what_the_encoder_saves_stands_side_by_side():
  lines = print_models.parts_table("r50", (256, 256), 133)
  assert lines[0] == "GMACs published, r50: the network without post-processing"
  rows = [line.split() for line in lines[2:]]
  names = ["mask2former_r50", *3 * ["proscale_r50"], *4 * ["eco_m2f_r50"]]
  assert [row[0] for row in rows] == names
  assert [row[-2] for row in rows[:4]] == ["0.0%", "77.6%", "63.8%", "49.9%"]
  assert rows[3][1:5] == ["(3,", "3,", "3)", "45,368,839"]
  assert rows[-1][1:4] == ["after", "5", "43,985,163"]
  totals = [float(row[-6]) for row in rows[4:]]
  assert totals == sorted(totals) and totals[-1] < float(rows[0][-6])


def test_mistakes_are_one_line(capsys):
  for flags, message in [
    (["--pattern=nothing"], "no model matches"),
    (["--size=512"], "expected rows and columns"),
    (["--size=0x4"], "expected rows and columns"),
  ]:
    with pytest.raises(SystemExit) as caught:
      call("models", *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
  with pytest.raises(UserError, match="--size=ax2"):
    print_models.parse_size("ax2")


def test_models_of_a_fixed_size_are_counted_at_the_size_asked_for(capsys):
  call("models", "--pattern=eomt_vit_s", "--size=160x160", "--num_classes=5")
  assert "eomt_vit_s" in capsys.readouterr().out
