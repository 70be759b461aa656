"""AFFormer's official names and layouts, and ours."""

from __future__ import annotations

# (pattern over our names, official name). The shared kernels have their canonical names here.
_RULES = (
  (r"backbone/stem_(\d)/", r"backbone.stem.\1."),
  (
    r"backbone/stage_(\d)/cluster_(\d)/depthwise/",
    r"backbone.patch_embed_stages.\1.patch_embeds.\2.patch_conv.dwconv.",
  ),
  (
    r"backbone/stage_(\d)/cluster_(\d)/pointwise/conv/",
    r"backbone.patch_embed_stages.\1.patch_embeds.\2.patch_conv.pwconv.",
  ),
  (
    r"backbone/stage_(\d)/cluster_(\d)/pointwise/norm/",
    r"backbone.patch_embed_stages.\1.patch_embeds.\2.patch_conv.bn.",
  ),
  (r"backbone/stage_(\d)/descriptor/reduce/", r"backbone.mhca_stages.\1.Restore.conv1."),
  (r"backbone/stage_(\d)/descriptor/expand/", r"backbone.mhca_stages.\1.Restore.conv2."),
  (r"backbone/stage_(\d)/descriptor/depthwise/", r"backbone.mhca_stages.\1.Restore.dwconv."),
  (r"backbone/stage_(\d)/descriptor/norm/", r"backbone.mhca_stages.\1.Restore.norm."),
  (r"backbone/stage_(\d)/aggregate/", r"backbone.mhca_stages.\1.aggregate."),
  (r"backbone/stage_(\d)/position/", r"backbone.mhca_stages.\1.mhca_blks.0.cpe.proj."),
)
