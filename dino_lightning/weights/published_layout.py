"""Names and shapes of the entries in published DINO checkpoints (layout of IDEA-Research/DINO), to ours and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

BackboneKind = Literal["other", "swin", "convnext"]

# Ours -> published, first match wins. Published files repeat the heads that all decoder layers share for each layer,
# which leaves room for heads of each layer's own.
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
_HEAD = re.compile(r"^(?:transformer\.decoder\.)?(bbox_embed|class_embed)\.(\d+)\.")
_OWN_HEAD = re.compile(r"^decoder\.(bbox_head|class_head)\.(\d+)\.")  # ours, of a decoder with heads for each layer

# Parts of torchvision's blocks -> parts of the published blocks.
_SWIN_BLOCK = {"mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2."}
_CONVNEXT_BLOCK = {
    "layer_scale": "gamma",
    "block.0.": "dwconv.",
    "block.2.": "norm.",
    "block.3.": "pwconv1.",
    "block.5.": "pwconv2.",
}
_INDEX = "attn.relative_position_index"
_TABLE = "attn.relative_position_bias_table"


def backbone_kind(keys: Iterable[str]) -> BackboneKind:
    """The family of backbones that the entries of a state dict, in either layout, belong to."""
    for key in keys:
        if key.endswith(_TABLE):
            return "swin"
        if key.endswith((".layer_scale", ".gamma")):
            return "convnext"
    return "other"


def to_published_key(key: str, kind: BackboneKind = "other") -> str:
    """Our name of an entry -> its name in a published file; `{layer}` stands for each decoder layer of shared heads.

    Args:
        key: our name.
        kind: the family of the model's backbone.

    Raises:
        KeyError: the published layout has no such entry.
    """
    own = _OWN_HEAD.match(key)
    renamed = _renamed(_OWN_HEAD.sub(r"decoder.\1.", key), _PREFIXES, _ATTENTION)
    if renamed is None:
        raise KeyError(f"The published DINO layout has no entry for {key!r}.")
    if own is not None:
        return renamed.format(layer=own[2])
    if key.startswith("backbone.") and kind != "other":
        return "backbone.0." + backbone_to_published_key(key.removeprefix("backbone."), kind)
    return renamed


def from_published_key(key: str, kind: BackboneKind = "other", *, shared_heads: bool = True) -> str:
    """The name of an entry in a published file, any alias -> our name.

    Args:
        key: the published name.
        kind: the family of the model's backbone.
        shared_heads: whether all decoder layers share one head; else each has its own.

    Raises:
        KeyError: our layout has no such entry.
    """
    key = key.removeprefix("module.")
    head = _HEAD.match(key)
    key = _HEAD.sub(r"transformer.decoder.\1.{layer}.", key)
    back = [[(published, ours) for ours, published in table] for table in (_PREFIXES, _ATTENTION)]
    renamed = _renamed(key, *back)
    if renamed is None:
        raise KeyError(f"{key!r} is not an entry of a published DINO checkpoint.")
    if head is not None and not shared_heads:
        return re.sub(r"^decoder\.(bbox_head|class_head)\.", rf"decoder.\1.{head[2]}.", renamed)
    if key.startswith("backbone.0.") and kind != "other":
        return "backbone." + backbone_from_published_key(key.removeprefix("backbone.0."), kind)
    return renamed


def _renamed(key: str, prefixes: Sequence[tuple[str, str]], parts: Sequence[tuple[str, str]]) -> str | None:
    """The key with its prefix and all parts replaced; None if no prefix matches."""
    for old, new in prefixes:
        if key.startswith(old):
            renamed = new + key[len(old) :]
            for old_part, new_part in parts:
                renamed = renamed.replace(old_part, new_part)
            return renamed
    return None


def backbone_to_published_key(key: str, kind: BackboneKind) -> str:
    """The name of an entry of a Swin or ConvNeXt `Backbone` -> its name in the published network.

    Raises:
        KeyError: the published network has no such entry.
    """
    if found := re.fullmatch(r"norms\.(\d+)\.(weight|bias)", key):
        return f"norm{int(found[1]) // 2}.{found[2]}"  # every second of torchvision's features is a stage
    if found := re.fullmatch(r"body\.features\.(\d+)\.(.+)", key):
        stage, between, rest = int(found[1]) // 2, int(found[1]) % 2 == 0, found[2]
        if kind == "convnext" and between:
            return f"downsample_layers.{stage}.{rest}"
        if kind == "convnext":
            return f"stages.{stage}.{_exchanged(rest, _CONVNEXT_BLOCK)}"
        if not between:
            return f"layers.{stage}.blocks.{_exchanged(rest, _SWIN_BLOCK)}"
        if stage > 0:
            return f"layers.{stage - 1}.downsample.{rest}"
        part = {"0": "proj", "2": "norm"}.get(rest.partition(".")[0])
        if part is not None:
            return f"patch_embed.{part}.{rest.partition('.')[2]}"
    raise KeyError(f"The published {kind} network has no entry for {key!r}.")


def backbone_from_published_key(key: str, kind: BackboneKind) -> str:
    """The name of an entry of a published Swin or ConvNeXt network -> its name in our `Backbone`.

    Raises:
        KeyError: `Backbone` has no such entry.
    """
    if found := re.fullmatch(r"norm(\d)\.(weight|bias)", key):
        return f"norms.{2 * int(found[1]) + 1}.{found[2]}"
    if kind == "convnext":
        if found := re.fullmatch(r"downsample_layers\.(\d)\.(.+)", key):
            return f"body.features.{2 * int(found[1])}.{found[2]}"
        if found := re.fullmatch(r"stages\.(\d)\.(.+)", key):
            return f"body.features.{2 * int(found[1]) + 1}.{_exchanged(found[2], _reversed(_CONVNEXT_BLOCK))}"
    else:
        if found := re.fullmatch(r"patch_embed\.(proj|norm)\.(.+)", key):
            return f"body.features.0.{0 if found[1] == 'proj' else 2}.{found[2]}"
        if found := re.fullmatch(r"layers\.(\d)\.downsample\.(.+)", key):
            return f"body.features.{2 * int(found[1]) + 2}.{found[2]}"
        if found := re.fullmatch(r"layers\.(\d)\.blocks\.(.+)", key):
            return f"body.features.{2 * int(found[1]) + 1}.{_exchanged(found[2], _reversed(_SWIN_BLOCK))}"
    raise KeyError(f"{key!r} is not an entry of a published {kind} network.")


def _exchanged(rest: str, parts: Mapping[str, str]) -> str:
    """A key such as `3.block.0.weight` with the part after the block number replaced, if it is in `parts`."""
    number, _, inner = rest.partition(".")
    for old, new in parts.items():
        if inner.startswith(old):
            return f"{number}.{new}{inner[len(old) :]}"
    return rest


def _reversed(parts: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in parts.items()}


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> the published one, with the decoder's heads under all their names.

    Published ConvNeXt files have a norm for each of the four stages. That of a stage without a feature map is never
    trained, so it is written with its initial ones and zeros.

    Raises:
        KeyError: the published layout has no such entry.
        ValueError: the state dict is not that of a detector.
    """
    layers = [int(key.split(".")[2]) for key in state if key.startswith("decoder.layers.")]
    if not layers:
        raise ValueError("There is no decoder among the weights.")
    kind = backbone_kind(state)
    published: dict[str, Tensor] = {}
    for key, value in state.items():
        name = to_published_key(key, kind)
        value = _value_to_published(name, value)
        if "{layer}" in name:
            for layer in range(1 + max(layers)):
                alias = name.format(layer=layer)
                published[alias] = published[alias.removeprefix("transformer.decoder.")] = value
        else:
            published[name] = value
            if _OWN_HEAD.match(key):
                published[name.removeprefix("transformer.decoder.")] = value
    if kind == "convnext":
        for stage in range(4):
            gamma = published.get(f"backbone.0.stages.{stage}.0.gamma")
            if gamma is not None and f"backbone.0.norm{stage}.weight" not in published:
                published[f"backbone.0.norm{stage}.weight"] = torch.ones_like(gamma)
                published[f"backbone.0.norm{stage}.bias"] = torch.zeros_like(gamma)
    return published


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A published state dict, with or without aliases -> ours, and the entries left out.

    Left out are the counters of batch norms, which frozen norms do not use, and the norms of ConvNeXt stages without a
    feature map. Swin's `relative_position_index` is reshaped, and may be corrupt: see `wrong_indices`. Whether the
    decoder's layers share their heads is seen from the values.

    Raises:
        KeyError: our layout has no such entry.
        ValueError: two values of one entry, or heads of some layers only.
    """
    kind, shared_heads = backbone_kind(state), has_shared_heads(state)
    ours: dict[str, Tensor] = {}
    ignored = []
    norms = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            ignored.append(key)
            continue
        name = from_published_key(key, kind, shared_heads=shared_heads)
        value = _value_from_published(key, value)
        if name in ours and not torch.equal(ours[name], value):
            raise ValueError(f"{key!r} repeats an entry with another value.")
        ours[name] = value
        if name.startswith("backbone.norms."):
            norms[key] = name
    if kind == "convnext":
        widths = map_widths(ours)
        for key, name in norms.items():
            if len(ours[name]) not in widths:
                del ours[name]
                ignored.append(key)
    return ours, tuple(ignored)


def has_shared_heads(state: Mapping[str, Tensor]) -> bool:
    """Whether all decoder layers of a published state dict have the same box head and the same class head.

    Raises:
        ValueError: there are heads for some of the decoder's layers only.
    """
    layers = {int(found[1]) for key in state if (found := re.match(r"transformer\.decoder\.layers\.(\d+)\.", key))}
    heads = {int(found[2]) for key in state if (found := _HEAD.match(key))}
    if heads and heads != layers and heads != {0}:
        raise ValueError(f"its decoder has {len(layers)} layers, and heads for {len(heads)} of them.")
    values: dict[str, Tensor] = {}
    return all(
        torch.equal(value, values.setdefault(_HEAD.sub(r"\1.", key), value))
        for key, value in state.items()
        if _HEAD.match(key)
    )


def backbone_from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict of a published Swin or ConvNeXt classifier -> our `Backbone`'s, and the entries left out.

    Left out are the head of the classifier and what follows from the sizes.
    """
    kind = backbone_kind(state)
    ours: dict[str, Tensor] = {}
    ignored = []
    for key, value in state.items():
        try:
            ours[backbone_from_published_key(key, kind)] = _value_from_published(key, value)
        except KeyError:
            ignored.append(key)
    return ours, tuple(ignored)


def map_widths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Channels of the backbone's feature maps, from the neck's inputs in a state dict of our layout."""
    weights = [value for key, value in state.items() if re.fullmatch(r"neck\.projections\.\d+\.0\.weight", key)]
    return tuple(value.shape[1] for value in weights if value.ndim == 4 and value.shape[-1] == 1)


def relative_position_index(window: int) -> Tensor:
    """(T * T,) int64 for the T tokens of a square window: the row of the bias table for each pair."""
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
    down, right = rows[:, None] - rows + window - 1, columns[:, None] - columns + window - 1
    return (down * (2 * window - 1) + right).flatten()


def wrong_indices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The corrupt `relative_position_index` entries of our layout, with their correct values.

    Averaging of weights can corrupt these integers in published files.
    """
    wrong = {}
    for key, value in state.items():
        if key.endswith(_INDEX):
            table = state.get(key.replace(_INDEX, _TABLE))
            if table is not None:
                right = relative_position_index((round(len(table) ** 0.5) + 1) // 2)
                if not torch.equal(value, right):
                    wrong[key] = right
    return wrong


def _value_to_published(name: str, value: Tensor) -> Tensor:
    if name.endswith(".gamma"):
        return value.flatten()
    if name.endswith(_INDEX):
        side = round(value.numel() ** 0.5)
        return value.reshape(side, side)
    return value


def _value_from_published(name: str, value: Tensor) -> Tensor:
    if name.endswith(".gamma"):
        return value.reshape(-1, 1, 1)
    return value.flatten() if name.endswith(_INDEX) else value
