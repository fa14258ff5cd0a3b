"""The published layout both ways, and starting weights of every kind."""

import argparse
import gzip
import json
import random
import warnings

import pytest
import torch
import torchvision

from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.training.optim import parameter_groups
from dino_lightning.weights.backbone_loading import start_backbone_from
from dino_lightning.weights.loading import load_initial_weights, load_weights
from dino_lightning.weights.published_layout import (
    backbone_to_published_key,
    from_published,
    to_published,
    to_published_key,
)
from dino_lightning.weights.reading import coco_names, read_checkpoint, read_weights
from tests.conftest import TINY_SIZES
from tests.golden_recipe import GOLDEN

SIZES = {
    "4scale": {},
    "5scale": {"feature_strides": [4, 8, 16, 32], "num_feature_levels": 5},
}


def manifest(scale):
    return json.loads(gzip.decompress((GOLDEN / f"state_dict_{scale}_r50.json.gz").read_bytes()))


@pytest.mark.parametrize("scale", SIZES)
def test_state_dict_is_the_published_one(scale):
    model = DINO(num_classes=91, **SIZES[scale])
    expected = manifest(scale)
    published = to_published(model.state_dict())
    assert set(published) == set(expected["entries"])
    assert len(published) == {"4scale": 626, "5scale": 630}[scale]
    for key, entry in expected["entries"].items():
        assert list(published[key].shape) == entry["shape"], key
        if entry.get("alias_of"):
            assert published[key] is published[entry["alias_of"]], key
    names = [to_published_key(name).format(layer=0) for name, _ in model.named_parameters()]
    assert names == expected["named_parameters_order"]
    assert sum(p.numel() for p in model.parameters()) == expected["num_parameters_unique"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["num_trainable_at_build"]
    back, ignored = from_published(published)
    assert not ignored
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("rule", "published_rule"),
    [("default", "default"), ("offsets", "ddetr_in_mmdet"), ("no_norm_decay", "large_wd")],
)
def test_parameter_groups_are_the_published_ones(rule, published_rule):
    expected = json.loads(gzip.decompress((GOLDEN / "param_groups_4scale_r50.json.gz").read_bytes()))[published_rule]
    model = DINO(num_classes=91)
    name_of = {id(p): to_published_key(name).format(layer=0) for name, p in model.named_parameters()}
    groups = parameter_groups(model, lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4, rule=rule)
    expected = [group for group in expected if group["names"]]
    assert [[name_of[id(p)] for p in group["params"]] for group in groups] == [group["names"] for group in expected]
    for group, other in zip(groups, expected, strict=True):
        rate = other["lr"] if isinstance(other["lr"], float) else float(other["lr"].split("(")[1].rstrip(")"))
        assert group["lr"] == pytest.approx(rate)
        decay = other["weight_decay"]
        assert group["weight_decay"] == (pytest.approx(1e-4) if isinstance(decay, str) else decay)


def tiny(num_classes, **changes):
    return DINO(num_classes=num_classes, **{**TINY_SIZES, "backbone_norm": "frozen", **changes})


@pytest.fixture
def published_file(tmp_path):
    """A checkpoint as the published code writes it: aliases, a Namespace inside, 91 classes."""
    torch.manual_seed(1)
    model = tiny(91)
    path = tmp_path / "checkpoint0011_4scale.pth"
    content = {"model": to_published(model.state_dict()), "args": argparse.Namespace(lr=1e-4), "epoch": 11}
    torch.save(content, path)
    return path, model


def test_published_file_loads_exactly(published_file):
    path, source = published_file
    model = tiny(91)
    report = load_weights(model, path)
    assert "91 of 91 classes kept" in str(report)
    assert report.total("loaded") == len(model.state_dict())
    assert report.total("re-mapped") == report.total("new") == report.total("ignored") == 0
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_coco_classes_are_matched_by_name(published_file):
    path, source = published_file
    names = ["Dog", "person", "floor lamp", "traffic-light"]
    model = tiny(len(names))
    before = model.state_dict()["decoder.class_head.weight"].clone()
    report = load_weights(model, path, names)
    assert "3 of 4 classes matched by name, 1 new (Dog, person, traffic-light; new: floor lamp)" in str(report)
    assert "assumed to be COCO's categories" in str(report)
    assert report.counts["class heads", "re-mapped"] == report.total("re-mapped") == 5
    coco = coco_names()
    for key in ("decoder.class_head.weight", "query_selection.class_head.bias", "label_embedding.weight"):
        ours, theirs = model.state_dict()[key], source.state_dict()[key]
        assert torch.equal(ours[0], theirs[coco.index("dog")])
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[3], theirs[10])
    assert torch.equal(model.state_dict()["decoder.class_head.weight"][2], before[2])
    assert torch.equal(model.label_embedding.weight[-1], source.label_embedding.weight[-1])


def test_cocos_91_rows_give_80_contiguous_classes(published_file):
    path, source = published_file
    names = [name for name in coco_names() if name != "N/A"]
    assert len(names) == 80
    by_name, by_order = tiny(80), tiny(80)
    assert "80 of 80 classes matched by name" in str(load_weights(by_name, path, names))
    assert "80 of 80 classes matched by COCO's order" in str(load_weights(by_order, path))
    rows = [row for row, name in enumerate(coco_names()) if name != "N/A"]
    for model in (by_name, by_order):
        assert torch.equal(model.decoder.class_head.bias, source.decoder.class_head.bias[rows])
        assert torch.equal(model.query_selection.class_head.weight, source.query_selection.class_head.weight[rows])


def test_classes_without_names_are_kept_in_order_and_that_is_said(tmp_path):
    source = tiny(2)
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    model = tiny(2)
    report = load_weights(model, tmp_path / "bare.pth", ["room", "hall"])
    assert "2 of 2 classes kept in the order of the file, which has no names for them." in str(report)
    assert torch.equal(model.decoder.class_head.bias, source.decoder.class_head.bias)


def test_a_class_unknown_to_the_file_starts_afresh(published_file):
    path, _ = published_file
    model = tiny(1)
    bias = model.decoder.class_head.bias.clone()
    report = load_weights(model, path, ["room"])
    assert "class heads are new (91 classes in the file, 1 here)" in str(report)
    assert report.counts["class heads", "new"] == report.total("new") == 5
    assert torch.equal(model.decoder.class_head.bias, bias)


def test_the_table_counts_every_tensor_of_the_model(published_file):
    path, _ = published_file
    model = tiny(3)
    report = load_weights(model, path, ["dog", "room", "hall"])
    assert sum(report.total(outcome) for outcome in ("loaded", "re-mapped", "new")) == len(model.state_dict())
    rows = {line[2:19].strip(): line[19:].split() for line in str(report).splitlines()}
    assert rows[""] == ["loaded", "re-mapped", "new", "ignored"]
    assert rows["class heads"] == ["0", "5", "0", "0"]
    backbone = sum(key.startswith("backbone.") for key in model.state_dict())
    assert rows["backbone"] == [str(backbone), "0", "0", "0"]
    assert rows["all tensors"] == [str(len(model.state_dict()) - 5), "5", "0", "0"]


def test_counters_of_batch_norms_are_ignored_and_averaged_weights_left_alone(tmp_path):
    source = tiny(2)
    published = to_published(source.state_dict())
    extra = {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)}
    torch.save({"model": published | extra, "ema_model": {}}, tmp_path / "file.pth")
    report = load_weights(tiny(2), tmp_path / "file.pth")
    assert report.counts["backbone", "ignored"] == report.total("ignored") == 1
    assert "ema_model" in str(report)


def test_a_label_embedding_of_another_size_is_no_hindrance(tmp_path):
    """In published files it has a size of its own, dn_labelbook_size + 1."""
    source = tiny(4)
    state = to_published(source.state_dict())
    for rows in (3, 92):
        state["label_enc.weight"] = torch.arange(rows * 32.0).view(rows, 32)
        torch.save({"model": state}, tmp_path / "file.pth")
        model = tiny(4)
        load_weights(model, tmp_path / "file.pth")
        assert torch.equal(model.decoder.class_head.weight, source.decoder.class_head.weight)
        assert torch.equal(model.label_embedding.weight[:3], state["label_enc.weight"][:3])
        assert torch.equal(model.label_embedding.weight[-1], state["label_enc.weight"][-1])


def test_prefix_of_data_parallel_and_single_aliases_are_accepted(tmp_path):
    model = tiny(2)
    published = to_published(model.state_dict())
    state = {
        f"module.{key}": value for key, value in published.items() if not key.startswith("transformer.decoder.class")
    }
    torch.save(state, tmp_path / "bare.pth")
    assert read_weights(tmp_path / "bare.pth").state.keys() == model.state_dict().keys()


def test_another_architecture_is_refused(published_file):
    path, _ = published_file
    with pytest.raises(CheckpointError, match=r"other shape .*model fit it: --model.ffn_dim=48\.$"):
        load_weights(tiny(91, ffn_dim=56), path)
    with pytest.raises(CheckpointError, match=r"another architecture: .*entries are missing.*num_decoder_layers=2\.$"):
        load_weights(tiny(91, num_decoder_layers=3), path)
    options = {"feature_strides": [8, 16, 32], "num_feature_levels": 3}
    with pytest.raises(CheckpointError, match=r"--model.num_feature_levels=2 --model.feature_strides=\[16,32\]\.$"):
        load_weights(tiny(91, **options), path)


# ------------------------------------------------------------------ backbones alone


@pytest.mark.parametrize("wrapped", ["bare", "model", "state_dict"])
def test_a_torchvision_backbone_loads_into_the_backbone_alone(tmp_path, wrapped):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    state = network.state_dict()
    torch.save(state if wrapped == "bare" else {wrapped: state, "epoch": 3}, tmp_path / "resnet18.pth")
    model = tiny(2, backbone="resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_initial_weights(model, str(tmp_path / "resnet18.pth"), ["a", "b"])
    assert "torchvision backbone" in str(report)
    assert "Only the backbone is loaded" in str(report)
    after = model.state_dict()
    assert torch.equal(after["backbone.body.layer2.0.conv1.weight"], state["layer2.0.conv1.weight"])
    assert all(torch.equal(after[key], before[key]) for key in after if not key.startswith("backbone."))
    count = sum(key.startswith("backbone.") for key in after)
    assert report.total("loaded") == report.counts["backbone", "loaded"] == count
    assert report.total("new") == len(after) - count
    assert report.total("ignored") == len(state) - count  # classifier, and counters of batch norms


def test_a_backbone_of_another_network_is_refused(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match=r"resnet18.pth, a torchvision backbone, does not fit .* resnet34"):
        load_initial_weights(tiny(2, backbone="resnet34"), str(tmp_path / "resnet18.pth"))


@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny"])
def test_a_backbone_as_its_authors_publish_it(tmp_path, name):
    """Names of the published network, a classifier, masks and a last norm that a detector has no use for."""
    torch.manual_seed(0)
    kind = name.partition("_")[0]
    state = {}
    for key, value in torchvision.models.get_model(name, weights=None).features.state_dict().items():
        published = backbone_to_published_key(f"body.features.{key}", kind)
        value = value.view(49, 49) if key.endswith("position_index") else value
        state[published] = value.flatten() if published.endswith("gamma") else value
    extra = {"norm.weight": torch.ones(768), "norm.bias": torch.zeros(768), "head.weight": torch.zeros(1000, 768)}
    torch.save({"model": state | extra | {"head.bias": torch.zeros(1000)}}, tmp_path / "published.pth")
    model = tiny(2, backbone=name)
    report = start_backbone_from(model, str(tmp_path / "published.pth"))
    assert report.counts["backbone", "new"] == 4  # the norms of the two maps
    assert report.counts["backbone", "ignored"] == 4
    own = model.backbone.state_dict()
    for key, value in own.items():
        if not key.startswith("norms."):
            given = state[backbone_to_published_key(key, kind)]
            assert torch.equal(value.flatten(), given.flatten()), key


def test_a_detector_is_no_backbone(published_file):
    path, _ = published_file
    with pytest.raises(CheckpointError, match="whole detector"):
        start_backbone_from(tiny(2), str(path))


def test_names_of_torchvisions_weights(monkeypatch):
    """The download is torchvision's own affair, so it is left out here."""
    state = {key: value + 1 for key, value in torchvision.models.resnet18(weights=None).state_dict().items()}
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **_: state)
    for place in ("IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"):
        model = tiny(2, backbone="resnet18")
        report = load_initial_weights(model, place)
        assert torch.equal(model.backbone.state_dict()["body.conv1.weight"], state["conv1.weight"])
        assert f"{place} for resnet18, a torchvision backbone: " in report.line()
    with pytest.raises(CheckpointError, match=r"another network; those of the backbone resnet18 are ResNet18_Weights"):
        load_initial_weights(tiny(2, backbone="resnet18"), "ResNet50_Weights.IMAGENET1K_V1")
    with pytest.raises(CheckpointError, match=r"no torchvision weights 'IMAGENET1K_V9'; there are \['IMAGENET1K_V1'\]"):
        load_initial_weights(tiny(2, backbone="resnet18"), "IMAGENET1K_V9")
    with pytest.raises(CheckpointError, match="resnet10 has no torchvision weights"):
        load_initial_weights(tiny(2), "IMAGENET1K_V1")


# ------------------------------------------------------------------ files that are none


class Payload:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "code", "list", "other model", "missing"])
def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, kind, capsys):
    path = tmp_path / "file.pth"
    if kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        torch.save({"model": {"a": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        torch.save({"model": Payload()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other model":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(tiny(1), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


def test_values_that_are_no_numbers_are_refused(tmp_path):
    state = tiny(2).state_dict()
    state["decoder.norm.weight"] = state["decoder.norm.weight"] * float("nan")
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "diverged.ckpt")
    with pytest.raises(CheckpointError, match=r"1 of its \d+ tensors hold values .*model.decoder.norm.weight"):
        load_weights(tiny(2), tmp_path / "diverged.ckpt")


ODD_CONTENT = {
    "names that are numbers": {1: torch.zeros(2)},
    "a sparse tensor": {"decoder.norm.weight": torch.zeros(4).to_sparse()},
    "a list of names": {"state_dict": ["decoder.norm.weight"]},
    "no heads": {"model": {"transformer.decoder.norm.weight": torch.zeros(2)}},
    "shapes of another rank": {
        "model": {"transformer.level_embed": torch.zeros(()), "label_enc.weight": torch.zeros(())}
    },
    "settings that are none": {"hyper_parameters": 3, "state_dict": {"model.decoder.norm.weight": torch.zeros(2)}},
    "swin of a strange size": {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(5, 1)},
    "integers for weights": {"decoder.norm.weight": torch.zeros(32, dtype=torch.int64)},
}


@pytest.mark.parametrize("content", ODD_CONTENT.values(), ids=ODD_CONTENT.keys())
def test_odd_content_is_refused_in_one_sentence(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as caught:
        load_weights(tiny(2), tmp_path / "odd.pth")
    assert str(caught.value).startswith(str(tmp_path / "odd.pth"))
    assert "\n" not in str(caught.value)


# what the fuzz test flips bits in, by the format: torch.save's own now, and that of files from before 2020
FORMATS = {"zip": True, "legacy": False}


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS.keys())
def test_damaged_files_are_refused_or_hold_what_the_model_needs(tmp_path, new, capsys):
    """Bits flipped, bytes lost or doubled at places drawn from a seed: never a traceback, never code of the file."""
    good = tmp_path / "good.pth"
    args = argparse.Namespace(lr=1e-4, nheads=4, names=["a", "b"])
    torch.save({"model": to_published(tiny(2).state_dict()), "args": args}, good, _use_new_zipfile_serialization=new)
    content = good.read_bytes()
    draw = random.Random(5)
    model, bad = tiny(2), tmp_path / "bad.pth"
    refused = 0
    # where names and shapes are, which matter more than values do
    pickled = content.find(b"transformer.")
    for trial in range(120):
        damaged = bytearray(content)
        near = (pickled, pickled + 20_000) if trial % 2 else (0, len(content))
        for _ in range(draw.choice((1, 1, 3, 20))):
            place = min(draw.randrange(*near), len(damaged) - 1)
            kind = draw.random()
            if kind < 0.8:
                damaged[place] ^= 1 << draw.randrange(8)
            elif kind < 0.9:
                del damaged[place : place + draw.randrange(1, 50)]
            else:
                damaged[place:place] = damaged[place : place + draw.randrange(1, 50)]
        if trial % 10 == 0:
            damaged = damaged[: draw.randrange(len(damaged))]
        bad.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_weights(model, bad)
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error)
                assert str(bad) in str(error)
    assert refused > (110 if new else 40)  # of a legacy file, most bits are of values, and nothing guards them
    assert not capsys.readouterr().out


def test_a_flipped_bit_among_the_values_is_noticed(tmp_path):
    path = tmp_path / "values.pth"
    torch.save({"a": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    place = content.find(torch.ones(4).numpy().tobytes()) + 40
    content[place] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["a"].ne(1).sum() == 1  # PyTorch itself does not look
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)
