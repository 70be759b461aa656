"""Files are read without PyTorch, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from effseg_jax.errors import UserError
from effseg_jax.weights.reader import read_state_dict

from .torch_files import Call, Window, save, save_legacy, whole

BASE = np.arange(24, dtype=np.float32)
SQUARE = BASE.reshape(4, 6)
EXPECTED = {
  "transposed": SQUARE.T,
  "window": SQUARE[1:, 2:4],
  "expanded": np.broadcast_to(SQUARE[:1], (3, 6)),
  "half": np.array([0.5, -2.0], np.float16),
  "brain": np.array([1.0, -0.15625], np.float32),
  "steps": np.array(7, np.int64),
  "mask": np.array([True, False]),
  "double": np.array([1 / 3]),
  "empty": np.zeros((0, 3), np.float32),
  "parameter": np.ones((2, 1), np.float32),
}
TENSORS = {
  "transposed": Window(BASE, 0, (6, 4), (1, 6)),
  "window": Window(BASE, 8, (3, 2), (6, 1)),
  "expanded": Window(BASE, 0, (3, 6), (0, 1)),
  "half": EXPECTED["half"],
  "brain": whole((EXPECTED["brain"].view(np.uint32) >> 16).astype(np.uint16)),
  "steps": EXPECTED["steps"],
  "mask": EXPECTED["mask"],
  "double": EXPECTED["double"],
  "empty": EXPECTED["empty"],
  "parameter": Window(np.ones(2, np.float32), 0, (2, 1), (1, 1), parameter=True),
}


def assert_equal(found, expected):
  """The same names in the same order, types and values."""
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert isinstance(found[name], np.ndarray)
    assert found[name].dtype == array.dtype
    assert found[name].shape == array.shape
    np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("write", [save, save_legacy])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_both_torch_formats(tmp_path, write, suffix):
  path = write(tmp_path / f"a{suffix}", TENSORS)
  assert_equal(read_state_dict(path), EXPECTED)


@pytest.mark.parametrize("write", [save, save_legacy])
def test_wrappers_prefixes_and_settings_are_taken_off(tmp_path, write):
  content = {
    "meta": {"epoch": 3, "CLASSES": ("a", "b")},
    "args": Call("argparse", "Namespace"),
    "state_dict": {"module.a": BASE, "module.b": SQUARE, "note": "not a tensor"},
    "optimizer": {"state": {0: {"momentum": BASE}}},
  }
  assert_equal(read_state_dict(write(tmp_path / "a.pth", content)), {"a": BASE, "b": SQUARE})


def test_a_module_prefix_stays_if_it_is_not_everyones(tmp_path):
  path = save(tmp_path / "a.pth", {"module.a": BASE, "b": BASE})
  assert set(read_state_dict(path)) == {"module.a", "b"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_dictionary_of_arrays(tmp_path, protocol):
  arrays = {
    "a": SQUARE,
    "fortran": np.asfortranarray(SQUARE),
    "scalar": np.float32(2.5),
    "big_endian": np.arange(3, dtype=">f4"),
  }
  content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
  path = tmp_path / "a.pkl"
  path.write_bytes(pickle.dumps(content, protocol=protocol))
  found = read_state_dict(path)
  assert list(found) == list(arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(found[name], array)
  assert found["big_endian"].dtype == np.float32


def test_safetensors_and_npz(tmp_path):
  arrays = {name: np.ascontiguousarray(EXPECTED[name]) for name in ("transposed", "half", "steps")}
  save_file(arrays, str(tmp_path / "a.safetensors"))
  np.savez(tmp_path / "a.npz", **arrays)
  assert_equal(
    dict(sorted(read_state_dict(tmp_path / "a.safetensors").items())), arrays_sorted(arrays)
  )
  assert_equal(read_state_dict(tmp_path / "a.npz"), arrays)


def test_bfloat16_in_safetensors(tmp_path):
  header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
  bits = (EXPECTED["brain"].view(np.uint32) >> 16).astype("<u2")
  path = tmp_path / "a.safetensors"
  path.write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
  assert_equal(read_state_dict(path), {"a": EXPECTED["brain"]})


def arrays_sorted(arrays):
  """By name: the order that safetensors does not keep."""
  return dict(sorted(arrays.items()))


EVIL = {
  "posix.system": Call("posix", "system", ("touch HERE",)),
  "os.system": Call("os", "system", ("touch HERE",)),
  "builtins.eval": Call("builtins", "eval", ("open('HERE', 'w')",)),
  "builtins.getattr": Call("builtins", "getattr", ((), "__class__")),
  "torch.load": Call("torch", "load", ("HERE",)),
  "numpy.load": Call("numpy", "load", ("HERE",)),
  "os.path.join": Call("os.path", "join", ("a", "b")),
  "collections.namedtuple": Call("collections", "namedtuple", ("a", "b")),
}


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("write", [save, save_legacy])
def test_a_pickle_that_asks_for_more_is_refused_by_name(tmp_path, name, write, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = write(tmp_path / "a.pth", {"a": BASE, "b": EVIL[name]})
  with pytest.raises(UserError, match=f"refers to {name},"):
    read_state_dict(path)
  assert not (tmp_path / "HERE").exists()


def test_what_pickle_itself_writes_for_an_attack_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

  class Attack:
    def __reduce__(self):
      return os.system, ("touch HERE",)

  for protocol in range(6):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": Attack()}, protocol=protocol))
    with pytest.raises(UserError, match=r"\.system"):
      read_state_dict(path)
  assert not (tmp_path / "HERE").exists()


def test_a_pickle_cannot_change_what_later_ones_meet(tmp_path):
  build = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00a\x88sb."
  path = tmp_path / "a.pkl"
  path.write_bytes(build)
  with pytest.raises(UserError, match="changes a function"):
    read_state_dict(path)


def test_a_dictionary_that_holds_itself_ends(tmp_path):
  content = {}
  content["model"] = content
  path = tmp_path / "a.pkl"
  path.write_bytes(pickle.dumps(content))
  with pytest.raises(UserError, match="no named tensors; found 'model'"):
    read_state_dict(path)


def test_arrays_of_objects_are_refused(tmp_path):
  path = tmp_path / "a.pkl"
  path.write_bytes(pickle.dumps({"a": np.array([None, "x"], object)}))
  with pytest.raises(UserError, match="expected numbers"):
    read_state_dict(path)
  np.savez(tmp_path / "a.npz", a=np.array([None, "x"], object))
  with pytest.raises(UserError, match=r"a\.npz"):
    read_state_dict(tmp_path / "a.npz")


@pytest.mark.parametrize(
  ("offset", "shape", "strides"),
  [
    (0, (1 << 40,), (0,)),
    (23, (2,), (1,)),
    (0, (5, 6), (6, 1)),
    (-1, (1,), (1,)),
    (0, (4,), (-1,)),
    (0, (4,), (1, 1)),
  ],
)
def test_a_window_beyond_its_storage_is_refused(tmp_path, offset, shape, strides):
  path = save(tmp_path / "a.pth", {"a": Window(BASE, offset, shape, strides)})
  with pytest.raises(UserError, match="damaged"):
    read_state_dict(path)


@pytest.mark.parametrize("kind", [".pth", "legacy", ".pkl", ".safetensors", ".npz"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_a_file_that_is_cut_short_is_damaged(tmp_path, kind, keep):
  path = tmp_path / f"a{'.pth' if kind == 'legacy' else kind}"
  arrays = {"a": np.ones((64, 64), np.float32), "b": BASE}
  if kind == ".pth":
    save(path, arrays)
  elif kind == "legacy":
    save_legacy(path, arrays)
  elif kind == ".pkl":
    path.write_bytes(pickle.dumps(arrays))
  elif kind == ".npz":
    np.savez(path, **arrays)
  else:
    save_file(arrays, str(path))
  whole_file = path.read_bytes()
  path.write_bytes(whole_file[: int(len(whole_file) * keep)])
  with pytest.raises(UserError, match="damaged, cut short") as caught:
    read_state_dict(path)
  assert "\n" not in str(caught.value)


def test_storages_of_the_wrong_length_are_noticed(tmp_path):
  path = save(tmp_path / "a.pth", {"a": BASE})
  with zipfile.ZipFile(path) as archive:
    entries = {name: archive.read(name) for name in archive.namelist()}
  entries["archive/data/0"] = entries["archive/data/0"][:-4]
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in entries.items():
      archive.writestr(name, content)
  with pytest.raises(UserError, match="92 bytes, not 96"):
    read_state_dict(path)


def test_other_mistakes_are_one_line(tmp_path):
  empty, text, folder = tmp_path / "empty.pth", tmp_path / "a.txt", tmp_path / "folder.pth"
  empty.touch()
  text.write_text("x")
  folder.mkdir()
  archive = tmp_path / "b.pth"
  with zipfile.ZipFile(archive, "w") as file:
    file.writestr("readme", "x")
  nothing = save(tmp_path / "c.pth", {"epoch": 3})
  number = tmp_path / "d.pkl"
  number.write_bytes(pickle.dumps(3))
  web_page = tmp_path / "e.pth"
  web_page.write_text("<!DOCTYPE html><html>quota exceeded</html>")
  for path, message in [
    (tmp_path / "none.pth", "missing"),
    (folder, "missing"),
    (empty, "is empty"),
    (text, "no known kind; expected one of .pth"),
    (archive, "without data.pkl"),
    (nothing, "no named tensors; found 'epoch'"),
    (number, "holds a int"),
    (web_page, "is a web page and not the file itself"),
  ]:
    with pytest.raises(UserError, match=message) as caught:
      read_state_dict(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_pytorch_writes(tmp_path, legacy):
  torch = pytest.importorskip("torch")
  square = torch.arange(24.0).reshape(4, 6)
  tensors = {
    "transposed": square.t(),
    "window": square[1:, 2:4],
    "half": square.half(),
    "brain": square.bfloat16(),
    "steps": torch.tensor(7),
    "mask": square > 3,
    "parameter": torch.nn.Parameter(square.clone()),
  }
  path = tmp_path / "a.pth"
  optimizer = torch.optim.AdamW([torch.nn.Parameter(square.clone())])
  content = {"state_dict": tensors, "optimizer": optimizer.state_dict(), "epoch": 3}
  torch.save(content, path, _use_new_zipfile_serialization=not legacy)
  expected = {
    name: (tensor.float() if name == "brain" else tensor).detach().numpy()
    for name, tensor in tensors.items()
  }
  assert_equal(read_state_dict(path), expected)
  stream = io.BytesIO()
  pickle.dump({"model": tensors}, stream)  # as converted backbones of detectron2 are
  path = tmp_path / "a.pkl"
  path.write_bytes(stream.getvalue())
  assert_equal(read_state_dict(path), expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pth.tar", "x.ckpt", "x.weights", "x"])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors", "npz"])
def test_the_content_counts_and_not_the_name(tmp_path, name, kind):
  arrays = {"a": np.arange(6, dtype=np.float32)}
  path = tmp_path / name
  if kind == "npz":
    with path.open("wb") as file:
      np.savez(file, **arrays)
  elif kind == "safetensors":
    save_file(arrays, str(path))
  else:
    (save_legacy if kind == "legacy" else save)(path, arrays)
  np.testing.assert_array_equal(read_state_dict(path)["a"], arrays["a"])


def test_a_pointer_of_git_lfs_is_explained(tmp_path):
  path = tmp_path / "l.safetensors"
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  with pytest.raises(UserError, match="git lfs pull"):
    read_state_dict(path)
