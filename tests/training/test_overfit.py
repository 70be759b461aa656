"""A model learns four pictures by heart: the whole chain from loss to metric is connected."""

from __future__ import annotations

import json

import numpy as np
from command import succeed
from PIL import Image

CLASSES = 8  # as the synthetic scenes have, whose programs test_cli.py compiles
BLOCK = 16


def _write_blocks(root):
  """Four pictures of coloured blocks, whose borders lie between the model's logits."""
  (root / "classes.txt").write_text("".join(f"colour {index}\n" for index in range(CLASSES)))
  colours = np.random.default_rng(9).integers(40, 216, (CLASSES, 3))
  for index in range(4):
    rng = np.random.default_rng(index)
    cells = rng.permutation(np.arange(16) % CLASSES).reshape(4, 4).astype(np.uint8)
    label = np.kron(cells, np.ones((BLOCK, BLOCK), np.uint8))
    image = colours[label] + rng.integers(-20, 20, (*label.shape, 3))
    for kind, picture in (("images", image.astype(np.uint8)), ("labels", label)):
      folder = root / kind / "train"
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(picture).save(folder / f"{index}.png")


def test_four_pictures_are_learnt_by_heart(tmp_path):
  blocks, workdir = tmp_path / "blocks", tmp_path / "run"
  blocks.mkdir()
  _write_blocks(blocks)
  succeed(
    "train.py",
    "--config=tests/small_config.py:blocks",
    f"--config.data.root={blocks}",
    f"--workdir={workdir}",
  )
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert lines[-1]["eval/mIoU"] > 0.95
  losses = [line["train/loss"] for line in lines if "train/loss" in line]
  assert losses[-1] < 0.2 * losses[0]
