"""The sizes of a detector, derived from the shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dino_lightning.model.backbone import Backbone
from dino_lightning.weights.published_layout import backbone_kind, map_widths

# Names to try for each family of backbones; those of published checkpoints first.
_CANDIDATES = {
    "swin": ("swin_l", "swin_t", "swin_s", "swin_b", "swin_b_384", "swin_l_224"),
    "convnext": ("convnext_xl", "convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    "resnet": ("resnet50", "resnet101", "resnet10", "resnet18", "resnet34", "resnet152"),
    "other": ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "efficientnet_b0"),
}


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `DINO` that follow from a state dict in our layout; unknown ones are left out.

    The number of attention heads is not among them: the shapes show only its product with the number of points.
    """
    return _plain_sizes(state) | backbone_of(state)


def _plain_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """All sizes except those of the backbone."""

    def extent(key: str, axis: int) -> int | None:
        return state[key].shape[axis] if key in state and state[key].ndim > axis else None

    found = {
        "num_classes": extent("query_selection.class_head.bias", 0),
        "num_feature_levels": extent("level_embedding", 0),
        "hidden_dim": extent("level_embedding", 1),
        "ffn_dim": extent("decoder.layers.0.linear1.weight", 0),
        "num_encoder_layers": _layers(state, "encoder"),
        "num_decoder_layers": _layers(state, "decoder"),
        "num_queries": extent("query_selection.content_queries.weight", 0),
    }
    own_heads = {"shared_heads": False} if "decoder.class_head.0.bias" in state else {}
    return {name: value for name, value in found.items() if value is not None} | own_heads


def heads_times_points(state: Mapping[str, Tensor]) -> int | None:
    """Attention heads times sampling points of deformable attention; None if the entries are missing."""
    key = "encoder.layers.0.self_attention.attention_weights.bias"
    return len(state[key]) // len(state["level_embedding"]) if key in state and "level_embedding" in state else None


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`backbone` and `feature_strides` of a state dict in our layout; empty for an unknown backbone."""
    shapes = _shapes(state)
    maps = len(map_widths(state))
    if not shapes or not 1 <= maps <= 4:
        return {}
    strides = [4, 8, 16, 32][4 - maps :]
    kind: str = backbone_kind(shapes)
    if kind == "other" and any(key.startswith("backbone.body.layer") for key in shapes):
        kind = "resnet"
    for name in _CANDIDATES[kind]:
        with torch.device("meta"):
            try:
                candidate = Backbone(name=name, strides=strides)
            except ValueError:
                continue
        if {f"backbone.{key}": value.shape for key, value in candidate.state_dict().items()} == shapes:
            return {"backbone": name, "feature_strides": strides}
    return {}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes of the backbone's entries, without the counters of batch norms, which frozen norms lack."""
    return {
        key: value.shape
        for key, value in state.items()
        if key.startswith("backbone.") and not key.endswith("num_batches_tracked")
    }


def differences(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """A sentence with the options that would make the model fit the weights in a file."""
    there, here = ({"shared_heads": True} | _plain_sizes(state) for state in (theirs, own))
    if _shapes(theirs) != _shapes(own) or map_widths(theirs) != map_widths(own):
        there, here = there | backbone_of(theirs), here | backbone_of(own)
    options = [
        f"--model.{name}={value}" for name, value in there.items() if name != "num_classes" and here.get(name) != value
    ]
    if not options:
        return "Check the backbone and its norms, the feature levels, the number of layers and the other sizes."
    return f"Options that would make the model fit it: {' '.join(options)}".replace(", ", ",") + "."


def _layers(state: Mapping[str, Tensor], part: str) -> int:
    numbers = [int(found[1]) for key in state if (found := re.match(rf"{part}\.layers\.(\d+)\.", key))]
    return 1 + max(numbers, default=-1)
