"""Counts come from the traced model and meet the published ones."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import linen as nn

from effseg_jax import UserError, create_model
from effseg_jax.models import flops
from tools import print_models

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
  print_models.main(["--pattern=afformer_tiny", "--size=64x32", "--num_classes=7"])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "one image of 64x32, 7 classes"
  assert lines[1].split()[:2] == ["model", "parameters"]
  assert lines[2].split()[0] == "afformer_tiny"


def test_audio_visual_models_are_counted_for_one_frame():
  line = print_models.table("avesformer_r50", (224, 224), 1).splitlines()[2]
  assert line.split()[:4] == ["avesformer_r50", "119,501,696", "119,501,696", "20.409"]
  line = print_models.table("vggish", (224, 224), 1).splitlines()[2]
  assert line.split()[:4] == ["vggish", "72,141,184", "72,141,184", "0.864"]


def test_mistakes_are_one_line(capsys):
  for flags, message in [
    (["--pattern=nothing"], "no model matches"),
    (["--size=512"], "expected rows and columns"),
    (["--size=0x4"], "expected rows and columns"),
  ]:
    with pytest.raises(SystemExit) as caught:
      print_models.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
  with pytest.raises(UserError, match="--size=ax2"):
    print_models.parse_size("ax2")
