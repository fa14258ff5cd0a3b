"""Published Swin and ConvNeXt: every key has its place, round trips are exact, and features are the published ones.

The features are compared with plain code of our own that works on the published names, after the facts in the papers
(arXiv 2103.14030, 2201.03545) and of the published detectors: maps padded after the norm, masks of -100, odd sizes.
"""

import gzip
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

from dino_lightning.model import DINO
from dino_lightning.model.backbone import Backbone
from dino_lightning.model.large_backbones import LARGE_BACKBONES, convnext, swin
from dino_lightning.weights.published_layout import (
    backbone_from_published,
    backbone_kind,
    from_published,
    relative_position_index,
    to_published,
    to_published_key,
    wrong_indices,
)
from dino_lightning.weights.sizes import sizes
from tests.golden_recipe import GOLDEN

FIVE = {"feature_strides": [4, 8, 16, 32], "num_feature_levels": 5}
PUBLISHED = {
    "4scale_swinl": {"backbone": "swin_l"},
    "5scale_swinl": {"backbone": "swin_l", **FIVE},
    "4scale_convnext_xl": {"backbone": "convnext_xl"},
}
ENTRIES = {"4scale_swinl": 716, "5scale_swinl": 722, "4scale_convnext_xl": 709}


def manifest(name):
    return json.loads(gzip.decompress((GOLDEN / f"state_dict_{name}.json.gz").read_bytes()))


def without_memory(entries):
    """A published state dict of those shapes in which each tensor repeats one number of its own."""
    state = {}
    for number, (key, entry) in enumerate(entries.items()):
        alias = entry.get("alias_of")
        if alias:
            state[key] = state[alias]
        elif key.endswith("relative_position_index"):
            state[key] = relative_position_index(12).reshape(144, 144)
        else:
            state[key] = torch.tensor(float(number)).expand(entry["shape"])
    return state


def same(one, other):
    if one.dtype == torch.int64:
        return torch.equal(one, other)
    return one.shape == other.shape and one.flatten()[0] == other.flatten()[0] and not any(other.stride())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_entry_has_its_place_and_comes_back(name):
    told = manifest(name)
    published = without_memory(told["entries"])
    if "convnext" in name:  # of the first stage, which gives no map: as it starts, and without gradients stays
        published["backbone.0.norm0.weight"] = torch.ones(256)
        published["backbone.0.norm0.bias"] = torch.zeros(256)
    ours, ignored = from_published(published)
    assert set(ignored) == ({"backbone.0.norm0.weight", "backbone.0.norm0.bias"} if "convnext" in name else set())
    with torch.device("meta"):
        model = DINO(num_classes=91, trainable_backbone_layers=5, **PUBLISHED[name])
    expected = {key: (tuple(value.shape), value.dtype) for key, value in model.state_dict().items()}
    assert {key: (tuple(value.shape), value.dtype) for key, value in ours.items()} == expected
    assert not wrong_indices(ours)

    back = to_published(ours)
    assert set(back) == set(published) == set(told["entries"])
    assert len(back) == told["num_entries"] == ENTRIES[name]
    unused = {"backbone.0.norm0.weight", "backbone.0.norm0.bias"} & set(ignored)
    assert all(same(published[key], back[key]) for key in back.keys() - unused)
    assert all(torch.equal(published[key], back[key]) for key in unused)
    assert all(back[key] is back[entry["alias_of"]] for key, entry in told["entries"].items() if entry.get("alias_of"))

    again, _ = from_published(back)
    assert again.keys() == ours.keys()
    assert all(same(ours[key], again[key]) for key in ours)
    unused_parameters = 512 if "convnext" in name else 0
    assert sum(p.numel() for p in model.parameters()) == told["num_parameters_unique"] - unused_parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (
        told["num_trainable_at_build"] - unused_parameters
    )
    assert sizes(ours) | PUBLISHED[name] == sizes(ours)


@pytest.mark.parametrize("name", ["4scale_swinl", "5scale_swinl"])
def test_parameters_of_swin_are_in_the_published_order(name):
    with torch.device("meta"):
        model = DINO(num_classes=91, **PUBLISHED[name])
    names = [to_published_key(key, "swin").format(layer=0) for key, _ in model.named_parameters()]
    assert names == manifest(name)["named_parameters_order"]


def test_an_entry_without_a_place_is_named():
    published = without_memory(manifest("4scale_swinl")["entries"])
    published["backbone.0.absolute_pos_embed"] = torch.zeros(1)
    with pytest.raises(KeyError, match="absolute_pos_embed"):
        from_published(published)


@pytest.mark.parametrize("window", [3, 4, 7, 12])
def test_the_index_of_relative_positions_is_torchvisions(window):
    attention = ShiftedWindowAttention(8, [window, window], [0, 0], 2)
    assert torch.equal(relative_position_index(window), attention.relative_position_index)


def test_corrupt_indices_are_found():
    network = swin(embed_dim=8, depths=(2, 2), num_heads=(1, 2), window=4)
    state = {f"backbone.body.{key}": value.clone() for key, value in network.state_dict().items()}
    assert not wrong_indices(state)
    key = "backbone.body.features.1.1.attn.relative_position_index"
    state[key][5] -= 1
    assert {name: value.tolist() for name, value in wrong_indices(state).items()} == {
        key: relative_position_index(4).tolist()
    }


# ------------------------------------------------------------------ plain references on published names

SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 6), "window": 4}
CONVNEXT = {"depths": (1, 2, 3, 1), "widths": (8, 16, 24, 32)}


def plain_window_attention(weights, prefix, tokens, labels, heads, window):
    """Attention of the T tokens (T, C) of one window; those with other labels are out of sight."""
    count, channels = tokens.shape
    q, k, v = F.linear(tokens, weights[f"{prefix}.qkv.weight"], weights[f"{prefix}.qkv.bias"]).split(channels, dim=1)
    table = weights[f"{prefix}.relative_position_bias_table"]
    index = weights[f"{prefix}.relative_position_index"]
    size = channels // heads
    seen = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = (q[:, part] * size**-0.5) @ k[:, part].T + table[index.flatten(), head].view(count, count)
        scores = scores + torch.where(labels[:, None] == labels, 0.0, -100.0)
        seen.append(scores.softmax(-1) @ v[:, part])
    return F.linear(torch.cat(seen, dim=1), weights[f"{prefix}.proj.weight"], weights[f"{prefix}.proj.bias"])


def plain_block(weights, prefix, x, heads, window, shift):
    """One block on a map (H, W, C)."""
    height, width, channels = x.shape

    def norm(x, name):
        return F.layer_norm(x, (channels,), weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"], 1e-5)

    padded = F.pad(norm(x, "norm1"), (0, 0, 0, -width % window, 0, -height % window))
    rolled = padded.roll((-shift, -shift), (0, 1))
    rows, columns = (
        (torch.arange(side) >= side - window).long() + (torch.arange(side) >= side - shift).long() * (shift > 0)
        for side in padded.shape[:2]
    )
    labels = rows[:, None] * 3 + columns if shift else torch.zeros(padded.shape[:2], dtype=torch.int64)
    attended = torch.empty_like(rolled)
    for top in range(0, padded.shape[0], window):
        for left in range(0, padded.shape[1], window):
            area = slice(top, top + window), slice(left, left + window)
            tokens = rolled[area].reshape(-1, channels)
            out = plain_window_attention(weights, f"{prefix}.attn", tokens, labels[area].flatten(), heads, window)
            attended[area] = out.view(window, window, channels)
    x = x + attended.roll((shift, shift), (0, 1))[:height, :width]
    inner = F.gelu(F.linear(norm(x, "norm2"), weights[f"{prefix}.mlp.fc1.weight"], weights[f"{prefix}.mlp.fc1.bias"]))
    return x + F.linear(inner, weights[f"{prefix}.mlp.fc2.weight"], weights[f"{prefix}.mlp.fc2.bias"])


def plain_swin(weights, image, *, embed_dim, depths, num_heads, window):
    """The four maps (C, H, W) of an image (3, H, W)."""
    image = F.pad(image, (0, -image.shape[2] % 4, 0, -image.shape[1] % 4))
    x = F.conv2d(image, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4).permute(1, 2, 0)
    x = F.layer_norm(x, (embed_dim,), weights["patch_embed.norm.weight"], weights["patch_embed.norm.bias"], 1e-5)
    maps = []
    for stage, depth in enumerate(depths):
        for block in range(depth):
            shift = window // 2 if block % 2 else 0
            x = plain_block(weights, f"layers.{stage}.blocks.{block}", x, num_heads[stage], window, shift)
        norm = weights[f"norm{stage}.weight"], weights[f"norm{stage}.bias"]
        maps.append(F.layer_norm(x, x.shape[-1:], *norm, 1e-5).permute(2, 0, 1))
        if stage < 3:
            down = f"layers.{stage}.downsample"
            x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
            x = torch.cat((x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]), dim=-1)
            x = F.layer_norm(x, x.shape[-1:], weights[f"{down}.norm.weight"], weights[f"{down}.norm.bias"], 1e-5)
            x = F.linear(x, weights[f"{down}.reduction.weight"])
    return maps


def plain_convnext(weights, image, *, depths, widths):
    """As `plain_swin`."""

    def norm(x, name):
        x = x.permute(1, 2, 0)
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6).permute(2, 0, 1)

    def conv(x, name, **options):
        return F.conv2d(x[None], weights[f"{name}.weight"], weights[f"{name}.bias"], **options)[0]

    x = norm(conv(image, "downsample_layers.0.0", stride=4), "downsample_layers.0.1")
    maps = []
    for stage, depth in enumerate(depths):
        if stage:
            x = conv(norm(x, f"downsample_layers.{stage}.0"), f"downsample_layers.{stage}.1", stride=2)
        for block in range(depth):
            name = f"stages.{stage}.{block}"
            y = norm(conv(x, f"{name}.dwconv", padding=3, groups=widths[stage]), f"{name}.norm").permute(1, 2, 0)
            y = F.gelu(F.linear(y, weights[f"{name}.pwconv1.weight"], weights[f"{name}.pwconv1.bias"]))
            y = F.linear(y, weights[f"{name}.pwconv2.weight"], weights[f"{name}.pwconv2.bias"])
            x = x + (weights[f"{name}.gamma"] * y).permute(2, 0, 1)
        maps.append(norm(x, f"norm{stage}"))
    return maps


def random_published(backbone):
    """A published state dict for a backbone, every entry random but the indices."""
    generator = torch.Generator().manual_seed(3)
    kind = backbone_kind(backbone.state_dict())
    state = {}
    for key, value in backbone.state_dict().items():
        name = to_published_key(f"backbone.{key}", kind).removeprefix("backbone.0.")
        if value.dtype == torch.int64:
            side = round(value.numel() ** 0.5)
            state[name] = value.clone().reshape(side, side)
            continue
        shape = (len(value),) if name.endswith(".gamma") else value.shape
        drawn = torch.randn(shape, generator=generator)
        fan_in = max(drawn.numel() // len(drawn), 1)
        state[name] = drawn * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if drawn.ndim > 1 and not name.endswith("table"):
            state[name] = drawn * 1.5 / fan_in**0.5
        elif name.endswith("table"):
            state[name] = drawn * 2
    return state


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(LARGE_BACKBONES, "small_swin", partial(swin, **SWIN))
    monkeypatch.setitem(LARGE_BACKBONES, "small_convnext", partial(convnext, **CONVNEXT))

    def make(name):
        backbone = Backbone(name=f"small_{name}", strides=(4, 8, 16, 32), trainable_layers=5)
        published = random_published(backbone)
        ours, ignored = backbone_from_published(published)
        assert not ignored
        backbone.load_state_dict(ours)
        return backbone.eval(), published

    return make


# multiples of everything; odd maps; one window high and many wide; a single window already at stride 8
@pytest.mark.parametrize("size", [(64, 128), (75, 50), (33, 130), (97, 35)])
@pytest.mark.parametrize("name", ["swin", "convnext"])
@torch.no_grad()
def test_features_are_the_published_ones(small, name, size):
    backbone, published = small(name)
    torch.manual_seed(1)
    image = torch.randn(3, *size)
    plain = plain_swin(published, image, **SWIN) if name == "swin" else plain_convnext(published, image, **CONVNEXT)
    for found, expected in zip(backbone(image[None]), plain, strict=True):
        assert found.shape[1:] == expected.shape
        assert expected.std() > 0.1
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_torchvisions_own_attention_differs_where_one_window_covers_the_map(small):
    """Why there is an attention of our own: published networks shift and mask there, too."""
    backbone, published = small("swin")
    image = torch.randn(3, 75, 50)
    plain = plain_swin(published, image, **SWIN)
    for module in backbone.modules():
        if isinstance(module, ShiftedWindowAttention):
            module.__class__ = ShiftedWindowAttention
    maps = backbone(image[None])
    torch.testing.assert_close(maps[0][0], plain[0], atol=1e-5, rtol=1e-5)  # 19 x 13 tokens: several windows
    assert (maps[3][0] - plain[3]).abs().max() > 0.01  # 3 x 2 tokens


def test_drop_path_is_the_published_one():
    with torch.device("meta"):
        network = LARGE_BACKBONES["swin_l"]()
        other = LARGE_BACKBONES["convnext_xl"]()
    rates = [module.p for module in network.modules() if type(module).__name__ == "StochasticDepth"]
    assert rates == pytest.approx([0.2 * block / 23 for block in range(24)])
    assert not any(module.p for module in other.modules() if type(module).__name__ == "StochasticDepth")


def test_a_small_swin_trains(small):
    backbone, _ = small("swin")
    maps = backbone.train()(torch.randn(2, 3, 70, 40))
    sum(feature.square().mean() for feature in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
