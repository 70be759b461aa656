"""The notebook's cells run one after the other, on a smaller experiment."""

from __future__ import annotations

import json
from pathlib import Path

from command import succeed

ROOT = Path(__file__).resolve().parents[1]

# What a cell is followed by, so that it takes seconds.
SMALLER = """
import sys
sys.path.insert(0, {tests!r})
import small_config
config = small_config.get_config()
"""


def test_the_cells_run(tmp_path):
  notebook = json.loads((ROOT / "colabs" / "quickstart.ipynb").read_text())
  cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
  (experiment,) = [i for i, cell in enumerate(cells) if "get_config" in cell]
  cells[experiment] += SMALLER.format(tests=str(ROOT / "tests"))
  script = "\n".join(cells).replace("runs/notebook", str(tmp_path / "run"))
  assert "step 80/80" in succeed("-c", script + "\nassert pictures['samples'].exists()")
