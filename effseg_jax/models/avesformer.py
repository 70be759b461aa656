"""AVESFormer: efficient transformer for real-time audio-visual segmentation (arXiv 2408.01708).

Frames and the sound of their seconds in, masks of the sounding objects out; every frame
independently. The paper gives the ideas: prompt queries from the sound (section 4.1), and a decoder
that convolves early and attends late (section 4.2). What it leaves open follows AVSegFormer and its
own parameter count, and is a field here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from effseg_jax.errors import UserError, require_one_of
from effseg_jax.models import build
from effseg_jax.models.backbones.efficientnet_lite import EFFICIENTNET_LITE, EfficientNetLite
from effseg_jax.models.backbones.pvt import PVT_V2, PVTv2
from effseg_jax.models.backbones.resnet import ResNet
from effseg_jax.models.backbones.small import SmallVisualEncoder
from effseg_jax.models.backbones.vggish import EMBEDDING, PATCH, SmallAudioEncoder, VGGish
from effseg_jax.models.elf_decoder import ELFDecoder, MaskHead, PromptQueryGenerator, xavier_init
from effseg_jax.models.layers import GROUPS

Dtype = Any

BACKBONES = ("small", *EFFICIENTNET_LITE, "resnet18", "resnet34", "resnet50", *PVT_V2)
AUDIO = ("vggish", "small")
QUERIES = ("prompts", "audio")
PROMPT_MODES = ("concat", "add")
STAGE_TYPES = ("conv", "attn")
BLIND_TO = ("nothing", "sound", "picture")


class AVESFormer(nn.Module):
  """AVESFormer for audio-visual segmentation; the defaults are the reconstructed paper.

  Attributes:
    num_classes: K; 1 for a mask of all sounding objects, 71 for AVSBench-semantic.
    backbone: one of `BACKBONES`.
    freeze_backbone: whether it stays as pretraining left it, its statistics included: it has no
      gradient, and training is faster.
    audio: "vggish", which is frozen; "small": `SmallAudioEncoder`, trained with the rest. Frozen
      parts (`audio/`, `backbone/`) belong into `optimizer.freeze`, or weight decay changes them.
    width: channels of the sound's token and the queries.
    queries: keys of the decoder's attention: "prompts", from the prompt query generator, or
      "audio", the token of the sound only.
    prompts: how many the generator has.
    prompt_mode: how the sound is combined with them, "concat" or "add".
    prompt_layers: depth of the generator.
    prompt_hidden: channels inside the generator's feed-forward layers.
    stage_types: of the decoder's stages from stride 4 to 32, "conv" or "attn" each.
    depths: blocks of each stage.
    widths: channels of each stage.
    hidden: channels inside the decoder's feed-forward layers.
    heads: of all attention.
    dropout: rate in all transformer blocks.
    head_widths: channels of the two convolutions of the mask head.
    head_stride: grid on which the second one works; 4 is fast, and its logits are enlarged.
    blind_to: input that is withheld, for ablations: "nothing", "sound" (every embedding is 0)
      or "picture" (every frame is the mean colour).
    remat: compute blocks again in the backward pass instead of keeping their activations.
    dtype: of the computation; parameters, statistics, softmax and logits are float32.
  """

  num_classes: int = 1
  backbone: str = "resnet50"
  freeze_backbone: bool = False
  audio: str = "vggish"
  width: int = 256
  queries: str = "prompts"
  prompts: int = 100
  prompt_mode: str = "concat"
  prompt_layers: int = 6
  prompt_hidden: int = 1024
  stage_types: tuple[str, ...] = ("conv", "conv", "attn", "attn")
  depths: tuple[int, ...] = (2, 2, 3, 3)
  widths: tuple[int, ...] = (256, 256, 256, 256)
  hidden: int = 2048
  heads: int = 8
  dropout: float = 0.1
  head_widths: tuple[int, int] = (128, 32)
  head_stride: int = 1
  blind_to: str = "nothing"
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, frames: jax.Array, log_mel: jax.Array, train: bool = False) -> Any:
    """Segments the sounding objects.

    Args:
      frames: (B, T, H, W, 3) float32, normalised; H and W at least 32.
      log_mel: (B, T, 96, 64), the patch of each frame's second; or (B, T, 128), its embedding
        by the audio backbone (see `embed`).
      train: whether dropout and batch statistics are those of training.

    Returns:
      Mask logits, float32 (B, T, H, W, num_classes). When training a dictionary of them, `logits`,
      and the fused features they were computed from, `mask_feature` (B, T, ceil(H/4), ceil(W/4),
      C), which have a loss of their own (AVSegFormer's mixing loss).

    Raises:
      UserError: for inputs of other shapes.
    """
    _check_inputs(frames, log_mel)
    batch, time = frames.shape[:2]
    size = frames.shape[2:4]
    frames = einops.rearrange(frames, "b t h w c -> (b t) h w c")
    if self.blind_to == "picture":
      frames = jnp.zeros_like(frames)
    features = self.visual_backbone()(frames, train and not self.freeze_backbone)
    if self.freeze_backbone:
      features = jax.lax.stop_gradient(features)
    features = [features[f"res{level}"] for level in (2, 3, 4, 5)]

    sound = self._embed(log_mel.reshape(batch * time, *log_mel.shape[2:]), train)
    if self.blind_to == "sound":
      sound = jnp.zeros_like(sound)
    project = nn.Dense(self.width, kernel_init=xavier_init, dtype=self.dtype, name="project_sound")
    queries = project(sound)[:, None]
    if self.queries == "prompts":
      queries = PromptQueryGenerator(
        self.prompts,
        self.prompt_mode,
        self.prompt_layers,
        self.heads,
        self.prompt_hidden,
        self.dropout,
        self.dtype,
        name="generator",
      )(queries, train)
    fused = ELFDecoder(
      self.stage_types,
      self.depths,
      self.widths,
      self.heads,
      self.hidden,
      self.dropout,
      self.remat,
      self.dtype,
      name="decoder",
    )(features, queries, train)
    head = MaskHead(self.num_classes, self.head_widths, self.head_stride, self.dtype, name="head")
    logits, feature = (
      einops.rearrange(x, "(b t) h w k -> b t h w k", b=batch) for x in (head(fused, size), fused)
    )
    return {"logits": logits, "mask_feature": feature} if train else logits

  @nn.nowrap
  def visual_backbone(self) -> nn.Module:
    """The visual backbone, named "backbone"."""
    if self.backbone == "small":
      return SmallVisualEncoder(dtype=self.dtype, name="backbone")
    if self.backbone in PVT_V2:
      return PVTv2(**PVT_V2[self.backbone], remat=self.remat, dtype=self.dtype, name="backbone")
    if self.backbone in EFFICIENTNET_LITE:
      return EfficientNetLite(
        **EFFICIENTNET_LITE[self.backbone], remat=self.remat, dtype=self.dtype, name="backbone"
      )
    depth = int(self.backbone.removeprefix("resnet"))
    return ResNet(depth, norm="bn", remat=self.remat, dtype=self.dtype, name="backbone")

  @nn.nowrap
  def audio_backbone(self) -> nn.Module:
    """The audio backbone, named "audio"."""
    backbone = VGGish if self.audio == "vggish" else SmallAudioEncoder
    return backbone(dtype=self.dtype, name="audio")

  def _embed(self, log_mel: jax.Array, train: bool) -> jax.Array:
    """(N, 96, 64) or (N, 128) -> (N, 128)."""
    if log_mel.ndim == 2:
      if self.is_initializing():  # so that a model trained on embeddings can process sound
        self.audio_backbone()(jnp.zeros((1, *PATCH)), train)
      return log_mel
    embeddings = self.audio_backbone()(log_mel, train)
    return jax.lax.stop_gradient(embeddings) if self.audio == "vggish" else embeddings


def embed(model: AVESFormer, variables: Mapping[str, Any], log_mel: jax.Array) -> jax.Array:
  """The embedding of sound by a model's audio backbone; the model takes it instead of `log_mel`.

  VGGish does not change, so its embeddings can be stored with a data set; frames that are heard
  with the same second need only one.

  Args:
    model: with the audio backbone.
    variables: of the model.
    log_mel: (..., 96, 64).

  Returns:
    float32 (..., 128).
  """
  own = {kind: tree["audio"] for kind, tree in variables.items() if "audio" in tree}
  embeddings = model.audio_backbone().apply(own, log_mel.reshape(-1, *log_mel.shape[-2:]))
  return embeddings.reshape(*log_mel.shape[:-2], EMBEDDING)


def _check_inputs(frames: jax.Array, log_mel: jax.Array) -> None:
  if frames.ndim != 5 or frames.shape[-1] != 3 or min(frames.shape[2:4]) < 32:
    raise UserError(
      f"frames are {frames.shape}; expected (batch, time, rows, columns, 3), 32x32 at least."
    )
  shapes = [(*frames.shape[:2], 96, 64), (*frames.shape[:2], EMBEDDING)]
  if log_mel.shape not in shapes:
    raise UserError(
      f"log_mel is {log_mel.shape}; expected {shapes[0]}, or embeddings {shapes[1]}, for frames"
      f" {frames.shape}."
    )


_VARIANTS: dict[str, dict[str, Any]] = {
  "avesformer_r50": {},
  "avesformer_r18": {"backbone": "resnet18"},
  "avesformer_pvt_v2_b2": {"backbone": "pvt_v2_b2"},
  "avesformer_lite": {
    "backbone": "resnet18",
    "audio": "small",
    "width": 128,
    "prompts": 32,
    "prompt_layers": 2,
    "prompt_hidden": 256,
    "depths": (1, 1, 2, 2),
    "widths": (64, 96, 128, 128),
    "hidden": 512,
    "head_widths": (64, 32),
    "head_stride": 4,
  },
}


def create(name: str, **fields: Any) -> AVESFormer:
  """Creates one of the variants."""
  model = build(AVESFormer, name, _VARIANTS[name], fields)
  for field, known in (
    ("backbone", BACKBONES),
    ("audio", AUDIO),
    ("queries", QUERIES),
    ("prompt_mode", PROMPT_MODES),
    ("blind_to", BLIND_TO),
  ):
    require_one_of(field, getattr(model, field), known)
  for kind in model.stage_types:
    require_one_of("stage_types", kind, STAGE_TYPES)
  for field in ("stage_types", "depths", "widths"):
    if len(getattr(model, field)) != 4:
      raise UserError(f"{field} is {getattr(model, field)}; expected one for each of 4 stages.")
  step = math.lcm(GROUPS, model.heads)
  if any(width % step for width in (*model.widths, model.width)):
    raise UserError(
      f"widths are {model.widths} and width is {model.width}; expected multiples of {step}: of"
      f" {GROUPS} groups and {model.heads} heads."
    )
  return model
