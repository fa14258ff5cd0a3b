"""State dicts of DINO as detrex and mmdetection write them, in the names of published checkpoints.

Both keep heads of their own for each decoder layer, and number their classes from 0 without gaps. What makes the same
weights give other numbers, the position embedding and mmdetection's clamp of reported boxes, is not in their files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["detrex", "mmdet"]
PROJECTS: dict[Layout, str] = {"detrex": "detrex", "mmdet": "mmdetection"}

# (theirs, published), read in both directions, the first that fits wins: # is a number, * the rest of the name. The
# published side is in a form that needs no arithmetic, see `_plain`.
_NAMES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "detrex": (
        ("backbone.stem.conv1.weight", "backbone.0.body.conv1.weight"),
        ("backbone.stem.conv1.norm.*", "backbone.0.body.bn1.*"),
        ("backbone.layer#.#.shortcut.weight", "backbone.0.body.layer#.#.downsample.0.weight"),
        ("backbone.layer#.#.shortcut.norm.*", "backbone.0.body.layer#.#.downsample.1.*"),
        ("backbone.layer#.#.conv#.norm.*", "backbone.0.body.layer#.#.bn#.*"),
        ("backbone.layer#.*", "backbone.0.body.layer#.*"),
        ("backbone.*", "backbone.0.*"),
        ("neck.convs.#.conv.*", "input_proj.convs.#.0.*"),
        ("neck.convs.#.norm.*", "input_proj.convs.#.1.*"),
        ("neck.extra_convs.#.conv.*", "input_proj.extra_convs.#.0.*"),
        ("neck.extra_convs.#.norm.*", "input_proj.extra_convs.#.1.*"),
        ("transformer.level_embeds", "transformer.level_embed"),
        ("transformer.encoder.layers.#.attentions.0.*", "transformer.encoder.layers.#.self_attn.*"),
        ("transformer.encoder.layers.#.norms.0.*", "transformer.encoder.layers.#.norm1.*"),
        ("transformer.encoder.layers.#.norms.1.*", "transformer.encoder.layers.#.norm2.*"),
        ("transformer.encoder.layers.#.ffns.0.layers.0.0.*", "transformer.encoder.layers.#.linear1.*"),
        ("transformer.encoder.layers.#.ffns.0.layers.1.*", "transformer.encoder.layers.#.linear2.*"),
        ("transformer.decoder.layers.#.attentions.0.attn.*", "transformer.decoder.layers.#.self_attn.*"),
        ("transformer.decoder.layers.#.attentions.1.*", "transformer.decoder.layers.#.cross_attn.*"),
        # in the order of execution, which is not that of the published numbers
        ("transformer.decoder.layers.#.norms.0.*", "transformer.decoder.layers.#.norm2.*"),
        ("transformer.decoder.layers.#.norms.1.*", "transformer.decoder.layers.#.norm1.*"),
        ("transformer.decoder.layers.#.norms.2.*", "transformer.decoder.layers.#.norm3.*"),
        ("transformer.decoder.layers.#.ffns.0.layers.0.0.*", "transformer.decoder.layers.#.linear1.*"),
        ("transformer.decoder.layers.#.ffns.0.layers.1.*", "transformer.decoder.layers.#.linear2.*"),
        ("transformer.decoder.ref_point_head.*", "transformer.decoder.ref_point_head.*"),
        ("transformer.decoder.norm.*", "transformer.decoder.norm.*"),
        ("transformer.tgt_embed.*", "transformer.tgt_embed.*"),
        ("transformer.enc_output.*", "transformer.enc_output.*"),
        ("transformer.enc_output_norm.*", "transformer.enc_output_norm.*"),
        ("label_enc.weight", "label_enc.weight"),
        ("class_embed.#.*", "class_embed.#.*"),
        ("bbox_embed.#.*", "bbox_embed.#.*"),
    ),
    "mmdet": (
        ("backbone.patch_embed.projection.*", "backbone.0.patch_embed.proj.*"),
        ("backbone.patch_embed.*", "backbone.0.patch_embed.*"),
        ("backbone.stages.#.blocks.#.attn.w_msa.*", "backbone.0.layers.#.blocks.#.attn.*"),
        ("backbone.stages.#.blocks.#.ffn.layers.0.0.*", "backbone.0.layers.#.blocks.#.mlp.fc1.*"),
        ("backbone.stages.#.blocks.#.ffn.layers.1.*", "backbone.0.layers.#.blocks.#.mlp.fc2.*"),
        ("backbone.stages.#.*", "backbone.0.layers.#.*"),
        ("backbone.norm#.*", "backbone.0.norm#.*"),
        ("backbone.*", "backbone.0.body.*"),
        ("neck.convs.#.conv.*", "input_proj.convs.#.0.*"),
        ("neck.convs.#.gn.*", "input_proj.convs.#.1.*"),
        ("neck.extra_convs.#.conv.*", "input_proj.extra_convs.#.0.*"),
        ("neck.extra_convs.#.gn.*", "input_proj.extra_convs.#.1.*"),
        ("level_embed", "transformer.level_embed"),
        ("query_embedding.*", "transformer.tgt_embed.*"),
        ("memory_trans_fc.*", "transformer.enc_output.*"),
        ("memory_trans_norm.*", "transformer.enc_output_norm.*"),
        ("dn_query_generator.label_embedding.*", "label_enc.*"),
        ("encoder.layers.#.self_attn.*", "transformer.encoder.layers.#.self_attn.*"),
        ("encoder.layers.#.norms.0.*", "transformer.encoder.layers.#.norm1.*"),
        ("encoder.layers.#.norms.1.*", "transformer.encoder.layers.#.norm2.*"),
        ("encoder.layers.#.ffn.layers.0.0.*", "transformer.encoder.layers.#.linear1.*"),
        ("encoder.layers.#.ffn.layers.1.*", "transformer.encoder.layers.#.linear2.*"),
        ("decoder.layers.#.self_attn.attn.*", "transformer.decoder.layers.#.self_attn.*"),
        ("decoder.layers.#.cross_attn.*", "transformer.decoder.layers.#.cross_attn.*"),
        ("decoder.layers.#.norms.0.*", "transformer.decoder.layers.#.norm2.*"),
        ("decoder.layers.#.norms.1.*", "transformer.decoder.layers.#.norm1.*"),
        ("decoder.layers.#.norms.2.*", "transformer.decoder.layers.#.norm3.*"),
        ("decoder.layers.#.ffn.layers.0.0.*", "transformer.decoder.layers.#.linear1.*"),
        ("decoder.layers.#.ffn.layers.1.*", "transformer.decoder.layers.#.linear2.*"),
        ("decoder.ref_point_head.*", "transformer.decoder.ref_point_head.*"),
        ("decoder.norm.*", "transformer.decoder.norm.*"),
        ("bbox_head.cls_branches.#.*", "class_embed.#.*"),
        ("bbox_head.reg_branches.#.0.*", "bbox_embed.#.layers.0.*"),
        ("bbox_head.reg_branches.#.2.*", "bbox_embed.#.layers.1.*"),
        ("bbox_head.reg_branches.#.4.*", "bbox_embed.#.layers.2.*"),
    ),
}
_ALIAS = "transformer.decoder."  # before the heads, which stand twice in published and in detrex's files


def _is_alias(key: str) -> bool:
    return key.startswith((f"{_ALIAS}class_embed.", f"{_ALIAS}bbox_embed."))


def _translated(key: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """The key by the first pair of patterns whose first one fits; None if none does."""
    for here, there in pairs:
        found = re.fullmatch(re.escape(here).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"), key)
        if found is not None:
            for value in found.groups():
                there = re.sub(r"[#*]", value, there, count=1)
            return there
    return None


def _plain(key: str, layers: int, maps: int) -> str:
    """A published name with heads numbered on into the encoder's, and extra projections from 0."""
    key = re.sub(r"^transformer\.enc_out_(class|bbox)_embed\.", rf"\1_embed.{layers}.", key)
    return re.sub(r"(?<=^input_proj\.)\d+", lambda index: _projection(int(index[0]), maps), key)


def _projection(index: int, maps: int) -> str:
    return f"convs.{index}" if index < maps else f"extra_convs.{index - maps}"


def _published(key: str, layers: int, maps: int) -> str:
    """The inverse of `_plain`."""
    key = re.sub(rf"^(class|bbox)_embed\.{layers}\.", r"transformer.enc_out_\1_embed.", key)
    key = re.sub(r"(?<=^input_proj\.)extra_convs\.(\d+)", lambda index: str(maps + int(index[1])), key)
    return re.sub(r"(?<=^input_proj\.)convs\.", "", key)


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
    names = {}
    for key in keys:
        if key.endswith("num_batches_tracked"):
            continue
        theirs = key.removeprefix(_ALIAS) if _is_alias(key) else key
        theirs = re.sub(r"^backbone\.res(\d)", lambda stage: f"backbone.layer{int(stage[1]) - 1}", theirs)  # of detrex
        plain = _translated(theirs, _NAMES[layout])
        if plain is None:
            raise KeyError(f"{key!r} is not an entry of {PROJECTS[layout]}'s DINO.")
        names[key] = _published(plain, 1 + max(layers), len(maps))
    return names


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
    back = [(published, theirs) for theirs, published in _NAMES[layout]]
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
        if _is_alias(key):
            continue
        name = _translated(_plain(key, layers, maps), back)
        if name is None:
            raise ValueError(f"{PROJECTS[layout]}'s DINO has no place for {key!r}.")
        if layout == "detrex":
            name = re.sub(r"^backbone\.layer(\d)", lambda stage: f"backbone.res{int(stage[1]) + 1}", name)
        foreign[name] = value
        if layout == "detrex" and re.match("(class|bbox)_embed", name):
            foreign[_ALIAS + name] = value
        if layout == "mmdet" and name.startswith("backbone.") and name.endswith("running_var"):
            foreign[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return foreign


def _channel_major(value: Tensor) -> Tensor:
    """The inverse of `_block_major`."""
    blocks = value.view(*value.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
    return blocks.transpose(-1, -2).flatten(-2).contiguous()
