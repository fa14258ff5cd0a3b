"""State dicts of DINO as detrex and mmdetection write them, in the names of published checkpoints.

Both keep heads of their own for each decoder layer, and number their classes from 0 without gaps. What makes the same
weights give other numbers, the position embedding and mmdetection's clamp of reported boxes, is not in their files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["detrex", "mmdet"]
PROJECTS: dict[Layout, str] = {"detrex": "detrex", "mmdet": "mmdetection"}

# Of each project, in order, the first that matches wins.
_RULES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "detrex": (
        (r"backbone\.stem\.conv1\.weight", r"backbone.0.body.conv1.weight"),
        (r"backbone\.stem\.conv1\.norm\.(.+)", r"backbone.0.body.bn1.\1"),
        (r"backbone\.res(\d)\.(\d+)\.shortcut\.weight", r"backbone.0.body.res\1.\2.downsample.0.weight"),
        (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.(.+)", r"backbone.0.body.res\1.\2.downsample.1.\3"),
        (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.(.+)", r"backbone.0.body.res\1.\2.bn\3.\4"),
        (r"backbone\.res(\d)\.(.+)", r"backbone.0.body.res\1.\2"),
        (r"backbone\.(.+)", r"backbone.0.\1"),
        (r"neck\.convs\.(\d+)\.conv\.(.+)", r"input_proj.\1.0.\2"),
        (r"neck\.convs\.(\d+)\.norm\.(.+)", r"input_proj.\1.1.\2"),
        (r"neck\.extra_convs\.(\d+)\.conv\.(.+)", r"input_proj.extra\1.0.\2"),
        (r"neck\.extra_convs\.(\d+)\.norm\.(.+)", r"input_proj.extra\1.1.\2"),
        (r"transformer\.level_embeds", r"transformer.level_embed"),
        (r"(transformer\.encoder\.layers\.\d+)\.attentions\.0\.(.+)", r"\1.self_attn.\2"),
        (r"(transformer\.encoder\.layers\.\d+)\.norms\.0\.(.+)", r"\1.norm1.\2"),
        (r"(transformer\.encoder\.layers\.\d+)\.norms\.1\.(.+)", r"\1.norm2.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.attentions\.0\.attn\.(.+)", r"\1.self_attn.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.attentions\.1\.(.+)", r"\1.cross_attn.\2"),
        # in the order of execution, which is not that of the published numbers
        (r"(transformer\.decoder\.layers\.\d+)\.norms\.0\.(.+)", r"\1.norm2.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.norms\.1\.(.+)", r"\1.norm1.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.norms\.2\.(.+)", r"\1.norm3.\2"),
        (r"(transformer\.\w+\.layers\.\d+)\.ffns\.0\.layers\.0\.0\.(.+)", r"\1.linear1.\2"),
        (r"(transformer\.\w+\.layers\.\d+)\.ffns\.0\.layers\.1\.(.+)", r"\1.linear2.\2"),
        (r"(transformer\.decoder\.(?:ref_point_head|norm)\..+)", r"\1"),
        (r"(transformer\.(?:tgt_embed|enc_output|enc_output_norm)\..+)", r"\1"),
        (r"(label_enc\.weight)", r"\1"),
        (r"((?:transformer\.decoder\.)?(?:class|bbox)_embed\.\d+\..+)", r"\1"),
    ),
    "mmdet": (
        (r"backbone\.patch_embed\.projection\.(.+)", r"backbone.0.patch_embed.proj.\1"),
        (r"backbone\.patch_embed\.(.+)", r"backbone.0.patch_embed.\1"),
        (r"backbone\.stages\.(\d\.blocks\.\d+)\.attn\.w_msa\.(.+)", r"backbone.0.layers.\1.attn.\2"),
        (r"backbone\.stages\.(\d\.blocks\.\d+)\.ffn\.layers\.0\.0\.(.+)", r"backbone.0.layers.\1.mlp.fc1.\2"),
        (r"backbone\.stages\.(\d\.blocks\.\d+)\.ffn\.layers\.1\.(.+)", r"backbone.0.layers.\1.mlp.fc2.\2"),
        (r"backbone\.stages\.(\d)\.(.+)", r"backbone.0.layers.\1.\2"),
        (r"backbone\.(norm\d\..+)", r"backbone.0.\1"),
        (r"backbone\.(.+)", r"backbone.0.body.\1"),
        (r"neck\.convs\.(\d+)\.conv\.(.+)", r"input_proj.\1.0.\2"),
        (r"neck\.convs\.(\d+)\.gn\.(.+)", r"input_proj.\1.1.\2"),
        (r"neck\.extra_convs\.(\d+)\.conv\.(.+)", r"input_proj.extra\1.0.\2"),
        (r"neck\.extra_convs\.(\d+)\.gn\.(.+)", r"input_proj.extra\1.1.\2"),
        (r"level_embed", r"transformer.level_embed"),
        (r"query_embedding\.(.+)", r"transformer.tgt_embed.\1"),
        (r"memory_trans_fc\.(.+)", r"transformer.enc_output.\1"),
        (r"memory_trans_norm\.(.+)", r"transformer.enc_output_norm.\1"),
        (r"dn_query_generator\.label_embedding\.(.+)", r"label_enc.\1"),
        (r"encoder\.layers\.(\d+)\.norms\.0\.(.+)", r"transformer.encoder.layers.\1.norm1.\2"),
        (r"encoder\.layers\.(\d+)\.norms\.1\.(.+)", r"transformer.encoder.layers.\1.norm2.\2"),
        (r"decoder\.layers\.(\d+)\.norms\.0\.(.+)", r"transformer.decoder.layers.\1.norm2.\2"),
        (r"decoder\.layers\.(\d+)\.norms\.1\.(.+)", r"transformer.decoder.layers.\1.norm1.\2"),
        (r"decoder\.layers\.(\d+)\.norms\.2\.(.+)", r"transformer.decoder.layers.\1.norm3.\2"),
        (r"decoder\.layers\.(\d+)\.self_attn\.attn\.(.+)", r"transformer.decoder.layers.\1.self_attn.\2"),
        (r"(\w+)\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"transformer.\1.layers.\2.linear1.\3"),
        (r"(\w+)\.layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"transformer.\1.layers.\2.linear2.\3"),
        (r"((?:en|de)coder\.layers\.\d+\.(?:self|cross)_attn\..+)", r"transformer.\1"),
        (r"(decoder\.(?:ref_point_head|norm)\..+)", r"transformer.\1"),
        (r"bbox_head\.cls_branches\.(\d+)\.(.+)", r"class_embed.\1.\2"),
        (r"bbox_head\.reg_branches\.(\d+)\.0\.(.+)", r"bbox_embed.\1.layers.0.\2"),
        (r"bbox_head\.reg_branches\.(\d+)\.2\.(.+)", r"bbox_embed.\1.layers.1.\2"),
        (r"bbox_head\.reg_branches\.(\d+)\.4\.(.+)", r"bbox_embed.\1.layers.2.\2"),
    ),
}  # fmt: skip


# The other way; the neck's projections are `convs` or `extra_convs` by now, and all heads are numbered.
_BACK: dict[Layout, tuple[tuple[str, str], ...]] = {
    "detrex": (
        (r"backbone\.0\.body\.conv1\.weight", r"backbone.stem.conv1.weight"),
        (r"backbone\.0\.body\.bn1\.(.+)", r"backbone.stem.conv1.norm.\1"),
        (r"backbone\.0\.body\.layer(\d)\.(\d+)\.downsample\.0\.weight", r"backbone.layer\1.\2.shortcut.weight"),
        (r"backbone\.0\.body\.layer(\d)\.(\d+)\.downsample\.1\.(.+)", r"backbone.layer\1.\2.shortcut.norm.\3"),
        (r"backbone\.0\.body\.layer(\d)\.(\d+)\.bn(\d)\.(.+)", r"backbone.layer\1.\2.conv\3.norm.\4"),
        (r"backbone\.0\.body\.(.+)", r"backbone.\1"),
        (r"backbone\.0\.(.+)", r"backbone.\1"),
        (r"input_proj\.(\w+)\.(\d+)\.0\.(.+)", r"neck.\1.\2.conv.\3"),
        (r"input_proj\.(\w+)\.(\d+)\.1\.(.+)", r"neck.\1.\2.norm.\3"),
        (r"transformer\.level_embed", r"transformer.level_embeds"),
        (r"(transformer\.encoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.attentions.0.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.attentions.0.attn.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.cross_attn\.(.+)", r"\1.attentions.1.\2"),
        (r"(transformer\.encoder\.layers\.\d+)\.norm1\.(.+)", r"\1.norms.0.\2"),
        (r"(transformer\.encoder\.layers\.\d+)\.norm2\.(.+)", r"\1.norms.1.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.norm2\.(.+)", r"\1.norms.0.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.norm1\.(.+)", r"\1.norms.1.\2"),
        (r"(transformer\.decoder\.layers\.\d+)\.norm3\.(.+)", r"\1.norms.2.\2"),
        (r"(transformer\.\w+\.layers\.\d+)\.linear1\.(.+)", r"\1.ffns.0.layers.0.0.\2"),
        (r"(transformer\.\w+\.layers\.\d+)\.linear2\.(.+)", r"\1.ffns.0.layers.1.\2"),
        (r"(.+)", r"\1"),
    ),
    "mmdet": (
        (r"backbone\.0\.body\.(.+)", r"backbone.\1"),
        (r"backbone\.0\.patch_embed\.proj\.(.+)", r"backbone.patch_embed.projection.\1"),
        (r"backbone\.0\.layers\.(\d\.blocks\.\d+)\.attn\.(.+)", r"backbone.stages.\1.attn.w_msa.\2"),
        (r"backbone\.0\.layers\.(\d\.blocks\.\d+)\.mlp\.fc1\.(.+)", r"backbone.stages.\1.ffn.layers.0.0.\2"),
        (r"backbone\.0\.layers\.(\d\.blocks\.\d+)\.mlp\.fc2\.(.+)", r"backbone.stages.\1.ffn.layers.1.\2"),
        (r"backbone\.0\.layers\.(.+)", r"backbone.stages.\1"),
        (r"backbone\.0\.(.+)", r"backbone.\1"),
        (r"input_proj\.(\w+)\.(\d+)\.0\.(.+)", r"neck.\1.\2.conv.\3"),
        (r"input_proj\.(\w+)\.(\d+)\.1\.(.+)", r"neck.\1.\2.gn.\3"),
        (r"transformer\.level_embed", r"level_embed"),
        (r"transformer\.tgt_embed\.(.+)", r"query_embedding.\1"),
        (r"transformer\.enc_output\.(.+)", r"memory_trans_fc.\1"),
        (r"transformer\.enc_output_norm\.(.+)", r"memory_trans_norm.\1"),
        (r"label_enc\.(.+)", r"dn_query_generator.label_embedding.\1"),
        (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.(.+)", r"decoder.layers.\1.self_attn.attn.\2"),
        (r"transformer\.encoder\.layers\.(\d+)\.norm1\.(.+)", r"encoder.layers.\1.norms.0.\2"),
        (r"transformer\.encoder\.layers\.(\d+)\.norm2\.(.+)", r"encoder.layers.\1.norms.1.\2"),
        (r"transformer\.decoder\.layers\.(\d+)\.norm2\.(.+)", r"decoder.layers.\1.norms.0.\2"),
        (r"transformer\.decoder\.layers\.(\d+)\.norm1\.(.+)", r"decoder.layers.\1.norms.1.\2"),
        (r"transformer\.decoder\.layers\.(\d+)\.norm3\.(.+)", r"decoder.layers.\1.norms.2.\2"),
        (r"transformer\.(\w+)\.layers\.(\d+)\.linear1\.(.+)", r"\1.layers.\2.ffn.layers.0.0.\3"),
        (r"transformer\.(\w+)\.layers\.(\d+)\.linear2\.(.+)", r"\1.layers.\2.ffn.layers.1.\3"),
        (r"class_embed\.(\d+)\.(.+)", r"bbox_head.cls_branches.\1.\2"),
        (r"bbox_embed\.(\d+)\.layers\.0\.(.+)", r"bbox_head.reg_branches.\1.0.\2"),
        (r"bbox_embed\.(\d+)\.layers\.1\.(.+)", r"bbox_head.reg_branches.\1.2.\2"),
        (r"bbox_embed\.(\d+)\.layers\.2\.(.+)", r"bbox_head.reg_branches.\1.4.\2"),
        (r"transformer\.(.+)", r"\1"),
    ),
}  # fmt: skip


def layout_of(state: Mapping[str, Tensor]) -> Layout | None:
    """Whose state dict of a DINO detector it is; None for neither of the two."""
    if "transformer.level_embeds" in state:
        return "detrex"
    return "mmdet" if "bbox_head.cls_branches.0.weight" in state else None


def official_keys(layout: Layout, keys: Mapping[str, Tensor]) -> dict[str, str]:
    """Each key of a file -> its name in the published layout; counters of batch norms are left out.

    Raises:
        KeyError: a key that this project's DINO does not have.
        ValueError: there is no decoder among them.
    """
    layers = [int(found[1]) for key in keys if (found := re.match(r"(?:transformer\.)?decoder\.layers\.(\d+)\.", key))]
    maps = {found[1] for key in keys if (found := re.match(r"neck\.convs\.(\d+)\.", key))}
    if not layers:
        raise ValueError("there is no decoder in it.")
    return {
        key: _official_key(layout, key, 1 + max(layers), len(maps))
        for key in keys
        if not key.endswith("num_batches_tracked")
    }


def _official_key(layout: Layout, key: str, layers: int, maps: int) -> str:
    for pattern, name in _RULES[layout]:
        found = re.fullmatch(pattern, key)
        if found is None:
            continue
        renamed = found.expand(name)
        renamed = re.sub(r"(?<=^backbone\.0\.body\.)res(\d)", lambda stage: f"layer{int(stage[1]) - 1}", renamed)
        renamed = re.sub(r"(?<=^input_proj\.)extra(\d+)", lambda extra: str(maps + int(extra[1])), renamed)
        # The heads that follow those of the decoder's layers are the encoder's.
        return re.sub(
            rf"^(?:transformer\.decoder\.)?(class|bbox)_embed\.{layers}\.", r"transformer.enc_out_\1_embed.", renamed
        )
    raise KeyError(f"{key!r} is not an entry of {PROJECTS[layout]}'s DINO.")


def to_official(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A foreign state dict -> the same weights in the published layout.

    mmdetection's input projections have no bias, which here is zero; its patch merging orders the pixels of a patch in
    another way. The label embedding gets the published model's spare row, of zeros: it is never looked up.

    Raises:
        KeyError: a key that this project's DINO does not have.
        ValueError: it has no decoder, or two different values under two names of one entry.
    """
    official: dict[str, Tensor] = {}
    for key, name in official_keys(layout, state).items():
        value = state[key]
        if layout == "mmdet" and re.search(r"\.downsample\.(norm|reduction)\.", name) and "layers" in name:
            value = _block_major(value)
        if name in official and not torch.equal(official[name], value):
            raise ValueError(f"{key!r} repeats an entry with another value.")
        official[name] = value
    for key in [key for key in official if re.fullmatch(r"input_proj\.\d+\.0\.weight", key)]:
        official.setdefault(key.replace("weight", "bias"), torch.zeros(len(official[key])))
    labels = official["label_enc.weight"]
    official["label_enc.weight"] = torch.cat((labels, labels.new_zeros(1, labels.shape[1])))
    return official


def _block_major(value: Tensor) -> Tensor:
    """(..., 4C) patches of 2 x 2 pixels: channel by channel, pixels 00 01 10 11 -> pixels 00 10 01 11, all channels."""
    pixels = value.view(*value.shape[:-1], -1, 4).transpose(-1, -2)
    return pixels[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def from_official(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the published layout -> as the other project writes them, without COCO's gaps among the classes.

    Raises:
        ValueError: there is something that the other project has no place for.
    """
    layers = 1 + max(int(found[1]) for key in state if (found := re.match(r"class_embed\.(\d+)\.", key)))
    maps = sum(value.shape[-1] == 1 for key, value in state.items() if re.fullmatch(r"input_proj\.\d+\.0\.weight", key))
    foreign: dict[str, Tensor] = {}
    for key, value in state.items():
        if layout == "mmdet" and re.fullmatch(r"input_proj\.\d+\.0\.bias", key):
            if bool(value.any()):
                raise ValueError("mmdetection's input projections have no bias, and these have one.")
            continue
        if key == "label_enc.weight":
            value = value[:-1]
        if layout == "mmdet" and re.search(r"^backbone\.0\.layers\.\d\.downsample\.(norm|reduction)\.", key):
            value = _channel_major(value)
        for name in _foreign_keys(layout, key, layers, maps):
            foreign[name] = value
            if layout == "mmdet" and name.startswith("backbone.") and name.endswith("running_var"):
                foreign[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return foreign


def _foreign_keys(layout: Layout, key: str, layers: int, maps: int) -> list[str]:
    """The names of a published entry, of which detrex's heads have two."""
    key = re.sub(r"^transformer\.enc_out_(class|bbox)_embed\.", rf"\1_embed.{layers}.", key)
    if re.match(r"transformer\.decoder\.(class|bbox)_embed\.", key):
        return []  # an alias
    found = re.match(r"input_proj\.(\d+)", key)
    if found:
        index = int(found[1])
        part = f"convs.{index}" if index < maps else f"extra_convs.{index - maps}"
        key = f"input_proj.{part}{key[found.end() :]}"
    for pattern, name in _BACK[layout]:
        if (matched := re.fullmatch(pattern, key)) is not None:
            key = matched.expand(name)
            break
    if layout == "detrex":
        key = re.sub(r"(?<=^backbone\.)layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", key)
        if re.match(r"(class|bbox)_embed\.", key):
            return [key, f"transformer.decoder.{key}"]
    return [key]


def _channel_major(value: Tensor) -> Tensor:
    """The inverse of `_block_major`."""
    blocks = value.view(*value.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
    return blocks.transpose(-1, -2).flatten(-2).contiguous()
