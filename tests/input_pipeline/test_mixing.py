"""Pasting parts of a second example: pixels keep their labels, and the sequence its determinism."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline import mixing
from effseg_jax.input_pipeline import transforms_semantic as transforms
from effseg_jax.input_pipeline.datasets.base import IGNORE_LABEL
from effseg_jax.input_pipeline.loader import train_batches


class Blocks:
  """Example i has the labels 8 i to 8 i + 7 in blocks, and says its label in its colour."""

  name = "blocks"

  def __len__(self):
    return 4

  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    label = np.kron(8 * index + rng.integers(0, 8, (5, 6)), np.ones((8, 8))).astype(np.uint8)
    label[:2] = IGNORE_LABEL
    image = np.repeat(label[..., None], 3, axis=-1)
    return {"image": image, "label": label, "valid_size": np.array(label.shape, np.int32)}


def recipe(mix, crop=(48, 56), probability=1.0):
  return transforms.semantic_transforms(
    scale=(48, 40),
    ratio=(0.8, 1.2),
    crop=crop,
    max_class_share=1.0,
    flip=0.5,
    photometric=False,
    mix=mix,
    mix_probability=probability,
  )


def draw(steps, count=6, **options):
  stream = train_batches(Blocks(), steps, batch_size=4, seed=3, **options)
  batches = list(itertools.islice(stream, count))
  stream.close()
  return batches


@pytest.mark.parametrize("mix", mixing.KINDS)
def test_what_is_pasted_keeps_its_label_and_stays_out_of_the_padding(mix):
  sources = []
  for batch in draw(recipe(mix)):
    for image, label, size in zip(batch["image"], batch["label"], batch["valid_size"], strict=True):
      inside = np.zeros(label.shape, bool)
      inside[: size[0], : size[1]] = True
      assert (label[~inside] == IGNORE_LABEL).all() and (image[~inside] == 0).all()
      counted = label != IGNORE_LABEL
      assert np.abs(image[counted].astype(int) - label[counted, None]).mean() < 3  # but for edges
      sources.append(len(np.unique(label[counted] // 8)))
  assert set(sources) <= {1, 2} and np.mean(sources) > 1.4  # a partner may be the example itself


def test_classmix_pastes_half_of_the_classes_and_no_void():
  rng = np.random.default_rng(0)
  other = Blocks()[1]
  paste = mixing.Mix("classmix", 1.0, source=[other])
  mixed = paste(Blocks()[2], rng)
  pasted = np.unique(mixed["label"][(mixed["label"] // 8 == 1)])
  present = np.unique(other["label"][other["label"] != IGNORE_LABEL])
  assert len(pasted) == -(-len(present) // 2)
  for value in pasted:  # whole, wherever it is
    np.testing.assert_array_equal(mixed["label"] == value, other["label"] == value)


def test_cutmix_pastes_one_rectangle():
  paste = mixing.Mix("cutmix", 1.0, source=[Blocks()[1]])
  shares = []
  for seed in range(40):
    mixed = paste(Blocks()[2], np.random.default_rng(seed))
    foreign = (mixed["image"] != Blocks()[2]["image"]).any(-1)
    rows, cols = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
    if len(rows):
      assert foreign[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()
    shares.append(foreign.mean())
  assert 0.2 < np.mean(shares) < 0.5 and max(shares) > 0.6


@pytest.mark.parametrize("mix", mixing.KINDS)
def test_mixing_does_not_depend_on_threads_processes_or_a_restart(mix):
  whole = draw(recipe(mix, probability=0.5))
  for key in ("image", "label"):
    found = [batch[key] for batch in draw(recipe(mix, probability=0.5), 3, start=3, num_threads=1)]
    np.testing.assert_array_equal(found, [batch[key] for batch in whole[3:]])
    half = [batch[key] for batch in draw(recipe(mix, probability=0.5), rows=(1, 3))]
    np.testing.assert_array_equal(half, [batch[key][[1, 3]] for batch in whole])


def test_mistakes_are_explained():
  with pytest.raises(UserError, match=r"data\.augment\.mix is 'cutmx'.*Did you mean 'cutmix'"):
    recipe("cutmx")
  with pytest.raises(UserError, match=r"mix_probability is 1\.5"):
    recipe("cutmix", probability=1.5)
