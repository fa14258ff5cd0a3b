"""The one adapter between our state dict and the published DINO checkpoints (layout of IDEA-Research/DINO)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# Ours -> published, first match wins. Shared heads appear in the published files once for every decoder layer.
_PREFIXES = (
    ("level_embedding", "transformer.level_embed"),
    ("encoder.", "transformer.encoder."),
    ("decoder.query_position_head.", "transformer.decoder.ref_point_head."),
    ("decoder.bbox_head.", "transformer.decoder.bbox_embed.{layer}."),
    ("decoder.class_head.", "transformer.decoder.class_embed.{layer}."),
    ("decoder.", "transformer.decoder."),
    ("query_selection.content_queries.", "transformer.tgt_embed."),
    ("query_selection.output_projection.", "transformer.enc_output."),
    ("query_selection.output_norm.", "transformer.enc_output_norm."),
    ("query_selection.bbox_head.", "transformer.enc_out_bbox_embed."),
    ("query_selection.class_head.", "transformer.enc_out_class_embed."),
    ("label_embedding.", "label_enc."),
    ("neck.projections.", "input_proj."),
    ("backbone.", "backbone.0."),
)
_ATTENTION = (("self_attention.", "self_attn."), ("cross_attention.", "cross_attn."))


def to_published_key(key: str) -> str:
    """Our name of an entry -> its (first) name in a published file; `{layer}` stands for the decoder layer.

    Raises:
        KeyError: an entry the published layout has no place for.
    """
    for ours, published in _PREFIXES:
        if key.startswith(ours):
            renamed = published + key[len(ours) :]
            for our_part, published_part in _ATTENTION:
                renamed = renamed.replace(our_part, published_part)
            return renamed
    raise KeyError(f"The published DINO layout has no place for {key!r}.")
