"""Data sets prepared by TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from effseg_jax.errors import UserError
from effseg_jax.input_pipeline.datasets import ade20k, open_dataset, tfds_folder


def _file(array, form):
  file = io.BytesIO()
  Image.fromarray(array).save(file, form)
  file.seek(0)
  return file


def label_of(index):
  return np.random.default_rng(index).integers(1, 4, (20 + index, 30), np.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data set with the features of oxford_iiit_pet, prepared as ArrayRecord."""
  import tensorflow_datasets as tfds

  class Pets(tfds.core.GeneratorBasedBuilder):
    name = "pets"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(),
        "file_name": tfds.features.Text(),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
        "annotation": tfds.features.Image(),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
      del manager
      return {"train": self._generate_examples(4), "test": self._generate_examples(1)}

    def _generate_examples(self, count):
      for index in range(count):
        label = label_of(index)
        image = np.stack([label * 60] * 3, axis=-1)  # so that image and label can be compared
        yield (
          index,
          {
            "image": _file(image, "PNG"),
            "file_name": f"{index}.jpg",
            "segmentation_mask": _file(label, "PNG"),
            "annotation": _file(np.stack([label] * 3, axis=-1), "PNG"),
          },
        )

  folder = tmp_path_factory.mktemp("tfds")
  Pets(data_dir=folder, file_format="array_record").download_and_prepare()
  assert "tensorflow" not in sys.modules
  return folder / "pets" / "1.0.0"


@pytest.mark.parametrize("label", ["segmentation_mask", "annotation"])
def test_examples_are_those_prepared(prepared, label):
  dataset = open_dataset("tfds", root=prepared, split="train", label=label, classes="a, b c, d")
  assert dataset.classes == ("a", "b c", "d")
  assert (len(dataset), dataset.name, dataset.num_classes) == (4, "pets", 3)
  for index in range(4):
    example = dataset[index]
    assert example["label"].dtype == np.uint8
    np.testing.assert_array_equal(example["image"][..., 0], 60 * (example["label"] + 1))
    assert dataset.image_size(index) == example["label"].shape
  sizes = {dataset.image_size(index) for index in range(4)}
  assert sizes == {(20 + index, 30) for index in range(4)}
  assert "tensorflow" not in sys.modules


def test_values_below_the_first_have_no_class(prepared):
  dataset = open_dataset(
    "tfds", root=prepared, split="test", label="segmentation_mask", classes="b, c", first=2
  )
  stored = label_of(0)
  np.testing.assert_array_equal(dataset[0]["label"], np.where(stored < 2, 255, stored - 2))
  few = open_dataset("tfds", root=prepared, split="test", label="annotation", classes="a", first=1)
  with pytest.raises(UserError, match="holds the label value"):
    few[0]


def test_it_travels_to_workers(prepared):
  dataset = open_dataset("tfds", root=prepared, split="train", label="annotation", classes="a,b,c")
  example = dataset[0]
  copy = pickle.loads(pickle.dumps(dataset))
  np.testing.assert_array_equal(copy[0]["label"], example["label"])


def test_known_data_sets_need_no_options(prepared, monkeypatch):
  monkeypatch.setitem(tfds_folder._KNOWN, "pets", ("annotation", ade20k.CLASSES, 1))
  dataset = open_dataset("tfds", root=prepared, split="train")
  assert dataset.classes == ade20k.CLASSES


def test_mistakes_are_explained(prepared, tmp_path):
  with pytest.raises(UserError, match=r"no features\.json\. Expected"):
    open_dataset("tfds", root=tmp_path, split="train")
  with pytest.raises(UserError, match="tfds pets has no split 'val'"):
    open_dataset("tfds", root=prepared, split="val")
  with pytest.raises(UserError, match=r"features .*; set data\.options\.label"):
    open_dataset("tfds", root=prepared, split="train")
