r"""Prints the models with their parameters and multiply-accumulates, counted on the traced model.

  effseg models --pattern='afformer*' --size=512x512 --num_classes=150

One multiply-accumulate counts as one. `products` are convolutions, linear layers and attention;
`published` adds what the papers' counter (fvcore) adds: normalisations, poolings, resizes, the one
of the logits to the image included. See `effseg_jax/models/flops.py`.

For Mask2Former, PRO-SCALE and the exits of ECO-M2F a second table shows where the cost lies, by the
published convention:

  effseg models --pattern='*_swin_tiny' --size=800x1088 --num_classes=133
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

import effseg_jax
from effseg_jax.cli import Flags, no_arguments
from effseg_jax.errors import UserError
from effseg_jax.models import flops

_HEADER = ("model", "parameters", "with dead layer", "GMACs products", "GMACs published")
_PARTS_HEADER = (
  *("model", "parameters", "total", "backbone", "encoder", "decoder"),
  *("encoder saved", "total saved"),
)
_DEPTHS = ((1, 1, 1), (2, 2, 2), (3, 3, 3))
_EXITS = (2, 3, 4, 5)  # layers; after six it is Mask2Former


def table(pattern: str, size: tuple[int, int], num_classes: int) -> str:
  """The lines to print.

  Args:
    pattern: a shell pattern over `list_models()`.
    size: (H, W) of the image.
    num_classes: of every model.

  Raises:
    UserError: if no model matches.
  """
  names = effseg_jax.list_models(pattern)
  if not names:
    raise UserError(f"--pattern={pattern}: no model matches; --pattern='*' prints all of them.")
  rows, notes = [_HEADER], {}
  for name in names:
    model = effseg_jax.create_model(name)
    if hasattr(model, "num_classes"):
      model = effseg_jax.create_model(name, num_classes=num_classes)
    if hasattr(model, "image_size"):  # of a position table; some take no other size
      model = model.clone(image_size=size)
      live, all_of_them = flops.parameter_counts(model, size)
    else:
      live, all_of_them = flops.parameter_counts(model)
    cost = flops.count(model, size)
    published = f"{cost.published / 1e9:.3f}"
    if cost.transforms:
      published = "*"
      notes["*"] = "Fourier transforms, which no published convention counts, are not in products"
    rows.append((name, f"{live:,}", f"{all_of_them:,}", f"{cost.products / 1e9:.3f}", published))
  lines = [f"one image of {size[0]}x{size[1]}, {num_classes} classes", *_aligned(rows)]
  if any(name.startswith("avesformer") for name in names):
    notes["avesformer_*:"] = "one frame and the sound of its second; no published convention"
  lines += [f"{mark} {note}" for mark, note in notes.items()]
  for backbone in ("r50", "swin_tiny"):
    if {f"{family}_{backbone}" for family in ("mask2former", "proscale", "eco_m2f")} & set(names):
      lines += ["", *parts_table(backbone, size, num_classes)]
  return "\n".join(lines)


def parts_table(backbone: str, size: tuple[int, int], num_classes: int) -> list[str]:
  """The cost of Mask2Former, PRO-SCALE and ECO-M2F, part by part and side by side.

  Args:
    backbone: "r50" or "swin_tiny".
    size: (H, W) of the image.
    num_classes: of every model.

  Returns:
    Lines. The encoder is the whole pixel decoder, as in the papers, and what is saved of it and of
    the total is relative to Mask2Former.
  """
  variants = {f"mask2former_{backbone}": {}}
  variants |= {f"proscale_{backbone} {depths}": {"proscale_layers": depths} for depths in _DEPTHS}
  variants |= {f"eco_m2f_{backbone} after {n}": {"fixed_exit": n} for n in _EXITS}
  rows, reference = [_PARTS_HEADER], None
  for title, fields in variants.items():
    model = effseg_jax.create_model(title.split()[0], num_classes=num_classes, **fields)
    costs = [cost.published for cost in flops.count_parts(model, size).values()]
    shown = [sum(costs), *costs]
    reference = reference or shown
    saved = [f"{1 - shown[i] / reference[i]:.1%}" for i in (2, 0)]
    live, _ = flops.parameter_counts(model)
    rows.append((title, f"{live:,}", *(f"{cost / 1e9:.1f}" for cost in shown), *saved))
  return [f"GMACs published, {backbone}: the network without post-processing", *_aligned(rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table, the first column left-aligned and the others right-aligned."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
    for row in rows
  ]


def parse_size(text: str) -> tuple[int, int]:
  """`"512x1024"` -> (512, 1024), rows first.

  Raises:
    UserError: if it is written otherwise.
  """
  parts = text.lower().split("x")
  if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
    raise UserError(f"--size={text}: expected rows and columns, 512x1024 for example.")
  return int(parts[0]), int(parts[1])


def define_flags(values: Flags) -> None:
  """Declares the flags."""
  flags.DEFINE_string("pattern", "*", "Which models, as a shell pattern.", flag_values=values)
  flags.DEFINE_string("size", "512x512", "Rows x columns of the image.", flag_values=values)
  flags.DEFINE_integer("num_classes", 150, "Classes of the head.", flag_values=values)


def run(values: Flags, arguments: Sequence[str]) -> int | None:
  """Checks the flags and prints the table."""
  no_arguments(arguments)
  print(table(values.pattern, parse_size(values.size), values.num_classes))
