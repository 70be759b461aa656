"""The catalogue of models. Names are listed here without importing what they name."""

from __future__ import annotations

import fnmatch
import importlib
from typing import TYPE_CHECKING, Any

from effseg_jax import platform
from effseg_jax.errors import UserError, suggestion

if TYPE_CHECKING:
  import flax.linen as nn

# Name -> module with `create(name, **fields)`. One line makes a model known.
_CATALOGUE = {
  "afformer_tiny": "effseg_jax.models.afformer",
  "afformer_small": "effseg_jax.models.afformer",
  "afformer_base": "effseg_jax.models.afformer",
  "afformer_tiny_fft": "effseg_jax.models.afformer",
  "afformer_small_fft": "effseg_jax.models.afformer",
  "afformer_base_fft": "effseg_jax.models.afformer",
  "avesformer_r50": "effseg_jax.models.avesformer",
  "avesformer_r18": "effseg_jax.models.avesformer",
  "avesformer_pvt_v2_b2": "effseg_jax.models.avesformer",
  "avesformer_lite": "effseg_jax.models.avesformer",
  "vggish": "effseg_jax.models.backbones.vggish",
  "mask2former_r50": "effseg_jax.models.mask2former",
  "mask2former_swin_tiny": "effseg_jax.models.mask2former",
  "proscale_r50": "effseg_jax.models.mask2former",
  "proscale_swin_tiny": "effseg_jax.models.mask2former",
  "eco_m2f_r50": "effseg_jax.models.mask2former",
  "eco_m2f_swin_tiny": "effseg_jax.models.mask2former",
  "setr_naive_l16": "effseg_jax.models.setr",
  "setr_pup_l16": "effseg_jax.models.setr",
  "setr_mla_l16": "effseg_jax.models.setr",
  "segvit_b16": "effseg_jax.models.segvit",
  "segvit_l16": "effseg_jax.models.segvit",
  "segvit_shrunk_l16": "effseg_jax.models.segvit",
  "eomt_vit_s": "effseg_jax.models.eomt",
  "eomt_vit_b": "effseg_jax.models.eomt",
  "eomt_vit_l": "effseg_jax.models.eomt",
  "segformer_b0": "effseg_jax.models.segformer",
  "segformer_b1": "effseg_jax.models.segformer",
  "segformer_b2": "effseg_jax.models.segformer",
  "segformer_b3": "effseg_jax.models.segformer",
  "segformer_b4": "effseg_jax.models.segformer",
  "segformer_b5": "effseg_jax.models.segformer",
  "efficientvit_b0": "effseg_jax.models.efficientvit",
  "efficientvit_b1": "effseg_jax.models.efficientvit",
  "efficientvit_b2": "effseg_jax.models.efficientvit",
  "efficientvit_b3": "effseg_jax.models.efficientvit",
}


def list_models(pattern: str = "*") -> list[str]:
  """Returns the names that match a shell pattern, sorted."""
  return sorted(fnmatch.filter(_CATALOGUE, pattern))


def create_model(name: str, **fields: Any) -> nn.Module:
  """Creates a model by name.

  The first model that is created also sets the host's allocator, see `platform.tune_host_malloc`.

  Args:
    name: one of `list_models()`.
    **fields: fields of the model's class, over those of the named variant.

  Raises:
    UserError: for an unknown name or field, with the closest known one.
  """
  if name not in _CATALOGUE:
    raise UserError(
      f"there is no model {name!r}; list_models() names them.{suggestion(name, _CATALOGUE)}"
    )
  platform.tune_host_malloc()
  return importlib.import_module(_CATALOGUE[name]).create(name, **fields)


def build(module: type, name: str, variant: dict[str, Any], fields: dict[str, Any]) -> Any:
  """Instantiates a module class from a variant's fields and the caller's, which win.

  Raises:
    UserError: for a field the class does not have.
  """
  known = [key for key in module.__dataclass_fields__ if key not in ("parent", "name")]
  for key in fields:
    if key not in known:
      raise UserError(
        f"{name} has no field {key!r}; its fields are {', '.join(known)}.{suggestion(key, known)}"
      )
  # Modules must be hashable, and a field read from JSON may be a list.
  values = {**variant, **fields}
  return module(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
